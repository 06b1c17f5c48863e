"""The arguments with which the check calls a module: an adapter's, more of them, and copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter


def drawn(adapter: Adapter, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...] | None:
    """An adapter's inputs, on the CPU whatever the default device is."""
    with torch.device("cpu"):
        return adapter.inputs(module, generator)


def varying_axes(value: Tensor, arguments: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether a tensor's first axis is that of the samples, and its second that of the tokens.

    The first argument, (B, ...) or (B, T, D), says which these are; a (B, T) has tokens only if it holds integers.
    """
    first = arguments[0]
    if not isinstance(first, Tensor) or not first.ndim or not value.ndim:
        return False, False
    has_tokens = first.ndim == 3 and value.ndim >= (3 if value.is_floating_point() else 2)
    return value.shape[0] == first.shape[0], has_tokens and value.shape[1] == first.shape[1]


def sizes(arguments: tuple[Any, ...]) -> tuple[int, int]:
    """(samples, tokens) of an adapter's inputs; 1 where they have no such axis."""
    first = arguments[0]
    if not isinstance(first, Tensor) or not first.ndim:
        return 1, 1
    return len(first), first.shape[1] if first.ndim == 3 else 1


def enlarged(
    adapter: Adapter,
    module: nn.Module,
    generator: torch.Generator,
    arguments: tuple[Any, ...],
    samples: int,
    tokens: int,
    scale: float,
) -> list[Any]:
    """Inputs of so many samples and tokens, joined from an adapter's and cut; floating-point ones times ``scale``."""
    of_samples, of_tokens = sizes(arguments)
    drawings = [
        [drawn(adapter, module, generator) or () for _ in range(-(-tokens // of_tokens))]
        for _ in range(-(-samples // of_samples))
    ]

    def joined(value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, dict):
            return {key: joined(item, (*path, key)) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        along_samples, along_tokens = varying_axes(value, arguments)
        rows = [[_at(item, path) for item in row] for row in drawings]
        parts = [torch.cat(row, 1)[:, :tokens] if along_tokens else row[0] for row in rows]
        tensor = torch.cat(parts)[:samples] if along_samples else parts[0]
        return tensor * scale if tensor.is_floating_point() else tensor

    return [joined(value, (i,)) for i, value in enumerate(arguments)]


def _at(values: Any, path: tuple[Any, ...]) -> Tensor:
    for key in path:
        values = values[key]
    return values  # type: ignore[no-any-return]


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copies of tensors on the device, floating-point ones in the dtype; in a dict (keyword arguments) too."""
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
