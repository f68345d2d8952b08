"""Memory, exactly: the most bytes that tensors held at once, as PyTorch's allocator on the CPU tells its profiler.

What the process as a whole takes differs from it by what the C library keeps of freed memory, which hangs on what
was freed before, and by what libraries of kernels keep to themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

ALLOCATION = "[memory]"


def peak_megabytes(call: Callable[[], Any]) -> float:
    """What `call` held at its peak, beyond what there was before, in MB of 2^20 bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == ALLOCATION]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20
