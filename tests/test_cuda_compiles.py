"""csrc/cuda compiled for A100 and H100, as an install does: registers, spills and shared memory."""

import re
import shutil
import subprocess
import sys

import pytest

from benchmarks import compiled_cuda

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

# Registers of a thread that the hot kernels may use, so that as many blocks fit as were meant to:
# 65,536 on a multiprocessor. Blocks of `gather` and the segments have up to 512 threads.
MOST_REGISTERS = {
    "select_kernel": 64,
    "fill_kernel": 64,
    "gather_kernel": 112,
    "encoder_segment_kernel": 112,
    "decoder_segment_kernel": 128,
    "count_kernel": 64,
    "place_kernel": 64,
    "topk_kernel": 64,  # blocks of up to 1024 threads
    "slab_kernel": 128,  # a block of 512 threads
    "generation_kernel": 128,  # two blocks of 256 threads
    "round_weights_kernel": 64,
}
# The decoder's kernel for rows that do not start on 16 bytes: no model has such.
NOT_HOT = re.compile(r"decoder_segment_kernelI\w+?Li1ELi8E")


@pytest.fixture(scope="module")
def built():
    return compiled_cuda.build()


@pytest.fixture(scope="module")
def rows(built):
    return built[1]


def test_every_kernel_is_there_for_both_devices(rows):
    for architecture in ("sm_80", "sm_90a"):
        kernels = {row.kernel for row in rows if row.architecture == architecture}
        assert kernels >= {*MOST_REGISTERS, "norm_kernel", "scan_kernel", "product_kernel"}


def test_nothing_is_spilled(rows):
    spilling = [row for row in rows if row.spilled_bytes and not NOT_HOT.search(row.symbol)]
    assert not spilling


def test_registers_leave_room_for_the_blocks(rows):
    beyond = [row for row in rows if row.registers > MOST_REGISTERS.get(row.kernel, 128)]
    assert not beyond


def test_shared_memory_leaves_room_for_two_blocks(rows):
    """Static arrays; what a launch asks for beside them is checked by the emulator."""
    assert all(row.shared_bytes <= 48 * 1024 for row in rows)
    assert any(row.shared_bytes for row in rows)


def test_the_library_loads_where_there_is_no_gpu(built):
    code = (
        f"import torch, tca_fast.registry; torch.ops.load_library({str(built[0])!r});"
        "print(tca_fast.registry.cuda_backends())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'cuda'" in run.stdout, run.stderr


def test_a_spill_would_be_seen():
    report = """
ptxas info    : Compiling entry function '_ZN8tca_fast4cuda11fill_kernelIfEEvv' for 'sm_80'
ptxas info    : Function properties for _ZN8tca_fast4cuda11fill_kernelIfEEvv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 33 registers, used 1 barriers, 640 bytes smem, 448 bytes cmem[0]
"""
    (row,) = compiled_cuda.read_report(report)
    assert (row.kernel, row.architecture) == ("fill_kernel", "sm_80")
    assert (row.registers, row.spilled_bytes, row.shared_bytes) == (33, 16, 640)
