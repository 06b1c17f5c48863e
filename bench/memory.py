"""Peak memory of a provider on its own: its weights, what it keeps between calls, and one call's peak.

On CUDA the caching allocator's counters are read; what a graph's private pool holds is found as reserved memory.
On the CPU the profiler's allocation events of torch's allocator are added up, and the tensors alive before and after.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn


class MemoryMeter:
    """Measures one provider. Created before it is built; other providers' tensors are left out.

    Args:
        device: a CPU or CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._held()

    def peak_bytes(self, call: Callable[[], object], shared_bytes: int) -> int:
        """Bytes the provider needs at its peak.

        Args:
            call: one call, already warm.
            shared_bytes: weights it uses that existed before it was built.
        """
        kept = self._held() - self._before
        peak = _cuda_peak(call, self._device) if self._device.type == "cuda" else _cpu_peak(call)
        return shared_bytes + max(kept, 0) + peak

    def _held(self) -> int:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            # allocated memory misses what a captured graph's pool reserves between replays
            return torch.cuda.memory_reserved(self._device)
        # exact types: isinstance makes lazy modules import themselves, and the compiler's fake tensors hold nothing
        tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
        storages = (t.untyped_storage() for t in tensors if t.device == self._device and t.layout == torch.strided)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(call: Callable[[], object]) -> int:
    """The most bytes alive at once among those allocated during the call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its progress lines would land in the table
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        raise RuntimeError("torch.profiler recorded nothing, so the peak memory cannot be measured")
    # events() keeps only allocations outside operators; the tree has them all
    sizes: list[tuple[int, int]] = []
    pending = list(results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        size = getattr(event.extra_fields, "alloc_size", None)
        if size is not None:
            sizes.append((event.start_time_ns, size))
    live = peak = 0
    for _, size in sorted(sizes, key=lambda item: item[0]):
        live += size
        peak = max(peak, live)
    return peak
