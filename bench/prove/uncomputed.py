"""Running code for its kernel launches alone, without torch's own computations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_DRAWS = ("randn", "rand")


class Uncomputed(TorchDispatchMode):
    """Within a ``with`` block torch's operators on CPU tensors give results of the right shape, strides and dtype, and
    uninitialised values; views, Python numbers and ditfast's own operators work as usual.

    A model of any size and batch runs in milliseconds; memory that is never written is never allocated.
    """

    looks_past_ditfast = True  # launches are those of calls without it

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "ditfast":
            with self:  # also within its implementation
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        written_indices = [index for index, item in enumerate(func._schema.arguments) if _is_written(item)]
        if written_indices and torch.Tag.inplace_view not in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            targets = [args[index] if index < len(args) else kwargs[names[index]] for index in written_indices]
            return targets[0] if len(func._schema.returns) == 1 else tuple(targets)
        if written_indices or _gives_views(func) or not _gives_tensors(func):
            return func(*args, **kwargs)
        if not any(isinstance(value, Tensor) for value in tree_leaves(args)):
            is_random = func._schema.name.removeprefix("aten::") in _DRAWS
            return torch.empty(args[0], dtype=kwargs.get("dtype")) if is_random else func(*args, **kwargs)
        shapes = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        return tree_map(_from_meta, shapes)


def _is_written(item: Any) -> bool:
    return item.alias_info is not None and item.alias_info.is_write


def _gives_views(func: Any) -> bool:
    return any(item.alias_info is not None for item in func._schema.returns)


def _gives_tensors(func: Any) -> bool:
    return bool(func._schema.returns) and all("Tensor" in str(item.type) for item in func._schema.returns)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _from_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return value
