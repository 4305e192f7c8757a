"""One adapter layer, forward and backward with statistics, against what people run today."""

import pytest

from benchmarks.conftest import clock
from benchmarks.operations import LAYER

SUITE = (LAYER,)
pytestmark = pytest.mark.benchmark(timer=clock.now)


def test_layer(play):
    """One variant's rounds, measured in turn with those of the others."""
    play()
