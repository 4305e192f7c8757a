"""Each operator by itself: encode, decode, and the fused adapter forward and backward."""

import pytest

from benchmarks.conftest import clock
from benchmarks.operations import BACKWARD, DECODE, ENCODE, FORWARD

SUITE = (ENCODE, DECODE, FORWARD, BACKWARD)
pytestmark = pytest.mark.benchmark(timer=clock.now)


def test_operator(play):
    """One variant's rounds, measured in turn with those of the others."""
    play()
