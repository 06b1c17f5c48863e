"""What a model launches and moves, counted without a device: traced on meta tensors, views free.

A launch is an operator that computes or copies; its bytes are its tensor inputs, each element read once (a table
that is gathered from counts whole), and its outputs, written once. Attention counts as one kernel on q, k, v and
the output for everyone: on meta tensors PyTorch takes it apart into its math path, which no GPU runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
# allocations, and reinterpretations that carry no alias in their schema
_FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "promote_types"}


@dataclass
class Cost:
    """Launches and bytes, in all and by operator."""

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    @property
    def total_launches(self) -> int:
        return sum(self.launches.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def add(self, name: str, read: Iterable[object], written: Iterable[object]) -> None:
        """Counts one launch."""
        self.launches[name] += 1
        self.bytes[name] += sum(_bytes(item) for side in (read, written) for item in side)


def count(call: Callable[[], Any]) -> Cost:
    """Counts what a call on meta tensors would launch and move. Forward only: attention has no backward here."""
    cost = Cost()
    with torch.no_grad(), _Attention(cost) as attention, _Operators(cost, attention):
        call()
    return cost


class _Attention(TorchFunctionMode):
    """Counts attention as one kernel, and keeps its parts from being counted."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost
        self.inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _ATTENTION:
            return func(*args, **(kwargs or {}))
        self.inside = True
        try:
            out = func(*args, **(kwargs or {}))
            # the kernels of a GPU write (B, T, H, head_dim), the math path (B, H, T, head_dim): without this the
            # heads' merge would count a copy that no GPU makes
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        finally:
            self.inside = False
        self.cost.add("scaled_dot_product_attention", tree_leaves((args, kwargs)), [out])
        return out


class _Operators(TorchDispatchMode):
    """Counts every operator that is no view and no allocation."""

    def __init__(self, cost: Cost, attention: _Attention) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = cost
        self.attention = attention

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.attention.inside and not _is_free(func):
            self.cost.add(func._schema.name.split("::")[-1], tree_leaves((args, kwargs)), tree_leaves(out))
        return out


def _is_free(func: Any) -> bool:
    returned = func._schema.returns
    views = bool(returned) and all(item.alias_info is not None and not item.alias_info.is_write for item in returned)
    return views or func._schema.name.split("::")[-1] in _FREE


def _bytes(item: object) -> int:
    """Bytes of the elements a tensor holds; those that an expansion repeats are read once."""
    if not isinstance(item, Tensor):
        return 0
    elements = 1
    for size, stride in zip(item.shape, item.stride(), strict=True):
        elements *= size if stride != 0 or size == 0 else 1
    return elements * item.element_size()
