"""Under ZeRO-3 a rank loads its part of the pair, with the values that whole loading gives."""

import pytest
from partitioned_loading import RANKS, run

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What the ranks report, after each has compared every weight with whole loading."""
    return run(tmp_path_factory.mktemp("pairs"))


def test_a_rank_never_holds_the_whole_pair(ranks):
    """Half of it is a rank's part; beside that there is one weight and the file it is read from."""
    for found in ranks:
        assert found["parts"] < 0.75 * found["whole"], found
        # Less than its part would mean that the measurement misses something.
        assert found["parts"] > 0.8 * found["whole"] / RANKS, found


def test_ranks_that_read_different_weights_are_refused(ranks):
    for found in ranks:
        assert "rank 1 on" in found["refusal"] and "different weights" in found["refusal"]
        assert "pair.target" in found["refusal"] and "\n" not in found["refusal"]
