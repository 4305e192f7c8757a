"""How much memory a call takes."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call) -> int:
    """Most bytes that torch's CPU allocator held for a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
