"""Ranks, offsets and segments of the CUDA kernels against brute force, on the host."""

import pytest
from emulated import Library, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

CASES = 100_000


def test_index_arithmetic_equals_brute_force():
    """`CASES` random cases of every function; the first one that differs is named."""
    Library("index_arithmetic.cpp").call("check_index_arithmetic", 1, CASES)
