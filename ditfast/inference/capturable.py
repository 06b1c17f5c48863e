"""Whether a function can be captured, found out by watching a call of it.

A capture that fails may leave torch's allocator believing that it goes on (in torch 2.11 and before).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # torch's error, CUDA's, and its libraries'
_COPIES = (_aten._to_copy, _aten.copy_, _aten.copy)


class Refused(Exception):
    """Why a function is not captured."""


def refusal(what: str, error: Exception) -> Exception:
    """What to raise for an error in a call that went well outside of a capture: the error where memory ran out."""
    if any(words in str(error) for words in _OUT_OF_MEMORY):
        return error
    return Refused(f"{what}: {str(error).partition(chr(10))[0] or type(error).__name__}")


def capturable(function: Callable[..., Any], inputs: tuple[Tensor, ...], device: torch.device) -> Callable[..., Any]:
    """What to capture in a function's place: itself, or with the device as default, for tables made on the CPU.

    Calls it once or twice.

    Raises:
        Refused: it reads values on the host, copies from one device to another, or fails where it is watched.
    """
    if _objection(function, inputs, device) is None:
        return function

    def there(*args: Tensor) -> Any:
        with torch.device(device):
            return function(*args)

    if objection := _objection(there, inputs, device):
        raise Refused(objection)
    return there


def _objection(function: Callable[..., Any], inputs: tuple[Tensor, ...], device: torch.device) -> str | None:
    watched = _Watched(device)
    try:
        with watched:
            function(*inputs)
    except Exception as error:
        raise refusal("its forward cannot be watched", error) from error
    return watched.objection


class _Watched(TorchDispatchMode):
    """Notes the first operation that a graph cannot hold."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.objection: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.objection is None:
            given, made = (
                [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
            )
            reads = isinstance(result, (bool, int, float, complex))
            self.objection = self._stands_against(func, given, made, reads)
        return result

    def _stands_against(self, func: Any, given: list[Tensor], made: list[Tensor], reads: bool) -> str | None:
        here = any(tensor.device == self.device for tensor in given)
        if here and reads:
            return f"its forward reads values on the host ({func})"
        if here and torch.Tag.dynamic_output_shape in func.tags:
            by_mask = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
            if func.overloadpacket is not _aten.index or by_mask:
                return f"what its forward makes has a shape that depends on values ({func})"
        # a CPU's scalar is an argument of the kernel that reads it; copied, it is not
        copies = func.overloadpacket in _COPIES
        devices = {tensor.device for tensor in (*given, *made) if tensor.ndim or copies}
        if len(devices) > 1 and self.device in devices:
            return f"its forward copies between {' and '.join(sorted(map(str, devices)))} ({func})"
        if here and func.overloadpacket is _aten.lift_fresh and self.device.type != "cpu":  # torch.tensor(number)
            return f"its forward copies numbers to {self.device} ({func})"
        return None
