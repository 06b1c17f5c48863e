"""Validation shared by the operators: each error names the argument, what it must be and what it is."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import autocast_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object, ndim: int | None = None) -> None:
    """A floating tensor, of ``ndim`` axes where given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(value.shape)}")


def shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")


def same_dtype(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must have {like_name}'s dtype {like.dtype}, got {value.dtype}")


def stream(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """A residual stream: in the dtype of ``like``, or wider (fp32 beside bf16 or fp16)."""
    if value.dtype != like.dtype and value.dtype != torch.promote_types(torch.float32, like.dtype):
        raise TypeError(f"{name} must have {like_name}'s dtype {like.dtype} or be fp32, got {value.dtype}")


def modulation(name: str, value: Tensor, tokens: Tensor) -> None:
    """A per-sample vector (B, D) that belongs to tokens (B, T, D)."""
    tensor(name, value, 2)
    shape(name, value, (tokens.shape[0], tokens.shape[2]))
    same_device(name, value, tokens)


def linear(
    x: Tensor, names: tuple[str, str], weight: Tensor, bias: Tensor | None, in_features: int, name: str = "x"
) -> None:
    """A Linear's weight (out, in) and bias (out,) for an input x, called ``name``, of ``in_features``.

    Under autocast the dtypes may differ, as for torch's own Linear.
    """
    tensor(names[0], weight, 2)
    if weight.shape[1] != in_features:
        raise ValueError(f"{names[0]} must have shape (out, {in_features}), got {tuple(weight.shape)}")
    same_device(names[0], weight, x)
    exact = autocast_dtype(x.device.type) is None
    if exact:
        same_dtype(names[0], weight, name, x)
    if bias is not None:
        tensor(names[1], bias, 1)
        shape(names[1], bias, (weight.shape[0],))
        same_device(names[1], bias, x)
        if exact:
            same_dtype(names[1], bias, names[0], weight)


def epsilon(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
