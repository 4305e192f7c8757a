"""Memory of one call: its peak, and what it keeps for the backward.

On CUDA the caching allocator knows the peak. On the CPU torch's profiler reports every allocation
and release of torch's allocator; scratch that a vendor library or a C++ container takes for itself
is not seen there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def peak_bytes(device: torch.device, call: Callable[..., object], *arguments: Any) -> int:
    """Most bytes allocated at any time during a call beyond those allocated before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call(*arguments)
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call(*arguments)
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], object], arguments: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward beside its arguments."""
    sizes: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        forward()
    given = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    return sum(size for pointer, size in sizes.items() if pointer not in given)
