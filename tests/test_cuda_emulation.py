"""The emulator of CUDA itself: it runs a right kernel, and finds what is wrong with wrong ones."""

import ctypes
from contextlib import nullcontext

import pytest
import torch
from emulated import WATCHED, Library, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture(scope="module")
def faults() -> Library:
    return Library("faults.cpp", *WATCHED)


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
    with pytest.raises(RuntimeError, match="not written|without a barrier"):
        faults.call("run_reverse", values, out, 0, 0)


def test_a_buffer_that_is_written_over_too_early_shows(faults, out):
    expected = [64 * number for number in range(20)]
    faults.call("run_rounds", out, 2)
    assert out[:20].tolist() == expected
    with pytest.raises(RuntimeError, match=r"without a barrier between them.*shared.*faults\.cpp"):
        faults.call("run_rounds", out, 1)


def test_a_shuffle_orders_no_memory(faults, out):
    faults.call("run_neighbours", out, 1)
    assert out[:64].tolist() == [lane ^ 1 for lane in range(64)]
    with pytest.raises(RuntimeError, match="not written|without a barrier"):
        faults.call("run_neighbours", out, 0)


@pytest.mark.parametrize(
    ("what", "fails"), [("number", True), ("the same", False), ("sum", False), ("neighbour", True)]
)
def test_what_blocks_do_to_the_same_place(faults, what, fails):
    out = faults.guarded(torch.arange(4, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="of another block") if fails else nullcontext():
        faults.call("run_blocks", out, ["number", "the same", "sum", "neighbour"].index(what))


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


@pytest.mark.parametrize("at", [3, -1])
@pytest.mark.parametrize("entry", ["run_beyond", "run_read_beyond"])
def test_access_to_the_gap_around_a_buffer(faults, entry, at):
    """Pages without access are a few bytes further away."""
    out = faults.empty(3, dtype=torch.int32)
    arguments = (out, at) if entry == "run_beyond" else (out, out, at)
    with pytest.raises(RuntimeError, match="4 bytes out of bounds, .* of a buffer of 12"):
        faults.call(entry, *arguments)


def test_a_write_of_the_host_into_the_gap_behind_a_buffer(faults):
    out = faults.empty(3, dtype=torch.int32)
    ctypes.memset(out.data_ptr() + 12, 0, 1)
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


def test_shared_memory_that_was_not_written(faults):
    out = faults.guarded(torch.zeros(1))
    with pytest.raises(RuntimeError, match="shared memory that was not written"):
        faults.call("run_not_written", out)


def test_launches_that_no_device_takes(faults, out):
    with pytest.raises(RuntimeError, match="no device takes such a launch"):
        faults.call("run_too_large")
    faults.call("run_empty", out)


def test_the_emulator_goes_on_after_an_error(faults, values, out):
    with pytest.raises(RuntimeError):
        faults.call("run_divergent", out)
    faults.call("run_reverse", values, out, 1, 0)
    assert torch.equal(out, values.view(3, 64).flip(1).flatten())


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_who_runs_first(faults, out, order, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATION_ORDER", order)
    faults.call("run_sequence", faults.guarded(torch.zeros(1, dtype=torch.int32)), out)
    numbers = list(range(192))
    assert sorted(out.tolist()) == numbers
    expected = {"ascending": numbers, "descending": numbers[::-1]}
    assert all((out.tolist() == sequence) == (order == name) for name, sequence in expected.items())
