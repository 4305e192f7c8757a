"""The emulator of CUDA itself: it runs a right kernel, and finds what is wrong with wrong ones."""

import pytest
import torch
from emulated import Library, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture(scope="module")
def faults() -> Library:
    return Library("faults.cpp")


@pytest.fixture
def values(faults):
    return faults.guarded(torch.arange(192, dtype=torch.int32))


@pytest.fixture
def out(faults):
    return faults.empty(192, dtype=torch.int32)


def test_a_right_kernel_gives_the_right_numbers(faults, values, out):
    faults.call("run_reverse", values, out, 1, 0)
    assert torch.equal(out, values.view(3, 64).flip(1).flatten())


def test_a_missing_barrier_shows(faults, values, out):
    faults.call("run_reverse", values, out, 0, 0)
    assert (out == -1).any()  # read before it was written


def test_a_buffer_that_is_written_over_too_early_shows(faults, out):
    expected = [64 * number for number in range(20)]
    faults.call("run_rounds", out, 2)
    assert out[:20].tolist() == expected
    faults.call("run_rounds", out, 1)
    assert out[:20].tolist() != expected


def test_a_barrier_that_one_thread_never_reaches(faults, values, out):
    with pytest.raises(RuntimeError, match=r"reverse.*divergent barrier.*ended.*faults\.cpp:\d+"):
        faults.call("run_reverse", values, out, 1, 1)


def test_barriers_on_different_lines(faults, out):
    with pytest.raises(RuntimeError, match=r"divergent barrier.*32 threads.*32 threads"):
        faults.call("run_divergent", out)


def test_warps_exchange_values(faults, values, out):
    faults.call("run_sums", values, out, 0xFFFFFFFF)
    first = [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    assert out[:64].tolist() == first


def test_a_lane_outside_the_mask(faults, values, out):
    with pytest.raises(RuntimeError, match=r"not in the mask of __shfl_xor_sync at .*faults\.cpp"):
        faults.call("run_sums", values, out, 0x0FFFFFFF)


@pytest.mark.parametrize("at", [192, -1100, 1 << 40])
def test_access_out_of_bounds(faults, out, at):
    with pytest.raises(RuntimeError, match=r"beyond.*out of bounds.*thread \(0, 0, 0\)"):
        faults.call("run_beyond", out, at)


def test_dynamic_shared_memory_has_its_size(faults, values, out):
    with pytest.raises(RuntimeError, match="out of bounds"):
        faults.call("run_sums_without_room", values, out)


def test_a_write_into_the_gap_behind_a_buffer(faults):
    out = faults.empty(3, dtype=torch.int32)
    faults.call("run_beyond", out, 3)
    del out
    assert "behind a buffer of 12 bytes" in faults.damage()
    assert faults.damage() is None


def test_undefined_behaviour(faults, out):
    faults.call("run_shifted", out, 5)
    assert out[0] == 32
    with pytest.raises(RuntimeError, match="undefined behaviour"):
        faults.call("run_shifted", out, 32)


def test_a_misaligned_vector(faults, values, out):
    faults.call("run_misaligned", values, out)
    with pytest.raises(RuntimeError, match="16 bytes"):
        faults.call("run_misaligned", values[1:], out)


def test_shared_memory_starts_as_nan(faults):
    out = faults.guarded(torch.zeros(1))
    faults.call("run_not_written", out)
    assert out.isnan().all()


def test_launches_that_no_device_takes(faults, out):
    with pytest.raises(RuntimeError, match="no device takes such a launch"):
        faults.call("run_too_large")
    faults.call("run_empty", out)


def test_the_emulator_goes_on_after_an_error(faults, values, out):
    with pytest.raises(RuntimeError):
        faults.call("run_divergent", out)
    faults.call("run_reverse", values, out, 1, 0)
    assert torch.equal(out, values.view(3, 64).flip(1).flatten())
