"""Memory of a provider on its own: its peak in a call, and what a training step's forward keeps for the backward.

The peak is its weights, what it keeps between calls, and one call's peak. On CUDA the caching allocator's counters
are read; what a graph's private pool holds is found as reserved memory. On the CPU the profiler's allocation events
of torch's allocator are added up, and the tensors alive before and after.

What is kept for the backward are the tensors that autograd saves, counted between the forward and the backward: of
each the whole storage, once, for that is what stays in memory. What is there anyway is left out: parameters and the
step's inputs, and whatever is a view of them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from ..cases.variants import Variant
    from ..cases.workload import Inputs


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
        held = self._held() - self._before
        peak = _cuda_peak(call, self._device) if self._device.type == "cuda" else _cpu_peak(call)
        return shared_bytes + max(held, 0) + peak

    def _held(self) -> int:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            # allocated memory misses what a captured graph's pool reserves between replays
            return torch.cuda.memory_reserved(self._device)
        # exact types: isinstance makes lazy modules import themselves, and the compiler's fake tensors hold nothing
        tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
        sizes = {}
        for tensor in tensors:
            if tensor.device == self._device and tensor.layout == torch.strided:
                # what a compiler traced with, and left behind, has no memory to point to
                with contextlib.suppress(RuntimeError):
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())


def saved_bytes(loss: Callable[[], Tensor], left_out: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward keeps for its backward.

    Under activation checkpointing these are what is kept until the backward begins, not what it computes again.
    Copies of parameters in another dtype, as autocast makes them, count. Works on meta tensors.

    Args:
        loss: the forward, run once; no backward follows.
        left_out: tensors whose storages do not count, besides the leaves that the loss has gradients for.

    Raises:
        ValueError: the loss has no backward.
    """
    holders: list[weakref.ref[_Kept]] = []

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor.detach())  # the tensor itself may own the node that keeps it
        holders.append(weakref.ref(holder))
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        value = loss()
    if value.grad_fn is None:
        raise ValueError(f"loss must return a tensor with a backward, got one without, of shape {tuple(value.shape)}")
    # what was saved by parts of the graph that are gone already is gone too
    tensors = [holder.tensor for reference in holders if (holder := reference()) is not None]
    excluded = list(left_out)
    for node in _nodes(value.grad_fn):
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            excluded.append(leaf)
        else:  # a Python function's node may hold tensors as attributes, which the hooks do not see
            values = tree_leaves(getattr(node, "__dict__", {}))
            # a compiled function's fake tensors hold nothing
            tensors += [item for item in values if isinstance(item, Tensor) and not isinstance(item, FakeTensor)]
    sizes = dict(map(_storage, tensors))
    for tensor in excluded:
        sizes.pop(_storage(tensor)[0], None)
    return sum(sizes.values())


def saved_in_step(variant: Variant, inputs: Inputs) -> int | None:
    """The same of a variant's training step; None where it has no loss of its own."""
    loss = variant.loss
    if loss is None:
        return None
    return saved_bytes(lambda: loss(inputs), (*inputs, *(variant.parameters or {}).values()))


@dataclass(eq=False)
class _Kept:
    """A saved tensor, for as long as the graph lives."""

    tensor: Tensor


def _nodes(root: Any) -> Iterator[Any]:
    visited, pending = {root}, [root]
    while pending:
        node = pending.pop()
        yield node
        following = {parent for parent, _ in node.next_functions if parent is not None} - visited
        visited |= following
        pending += following


def _storage(tensor: Tensor) -> tuple[int, int]:
    """(identity, bytes) of a tensor's storage; on meta tensors there is no address."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata, storage.nbytes()


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
