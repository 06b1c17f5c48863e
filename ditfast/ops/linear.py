"""Linears with an epilogue: tanh GELU, gated residual, and the MLP of both."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import ops as formulas
from . import _check
from ._backend import autocast_dtype, current_backend


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu_tanh(x W^T + b).

    Args:
        x: (..., D).
        weight: (F, D) in x's dtype.
        bias: (F,) in x's dtype, or None.

    Returns:
        (..., F) in x's dtype (autocast's where it is on).

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, naming the argument.
    """
    _check_input("x", x)
    _check.linear(x, ("weight", "bias"), weight, bias, x.shape[-1])
    return _linear_gelu(x, weight, bias)


def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """gelu_tanh(x W1^T + b1) W2^T + b2.

    Args:
        x: (..., D).
        w1, b1: (F, D) and (F,), or None, in x's dtype.
        w2, b2: (D_out, F) and (D_out,), or None, in x's dtype.

    Returns:
        (..., D_out) in x's dtype (autocast's where it is on).

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, naming the argument.
    """
    _check_input("x", x)
    _check.linear(x, ("w1", "b1"), w1, b1, x.shape[-1])
    _check.linear(x, ("w2", "b2"), w2, b2, w1.shape[0])
    hidden = _linear_gelu(x, w1, b1)
    return torch.nn.functional.linear(hidden, w2, b2)


def linear_gated_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, residual: Tensor
) -> Tensor:
    """residual + gate * (x W^T + b).

    Args:
        x: (B, T, K).
        weight: (D, K) in x's dtype.
        bias: (D,) in x's dtype, or None.
        gate: (B, D) in x's dtype; any row stride.
        residual: (B, T, D); x's dtype, or fp32 beside bf16 and fp16.

    Returns:
        (B, T, D) in residual's dtype.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, naming the argument.
    """
    _check.tensor("x", x, 3)
    _check.linear(x, ("weight", "bias"), weight, bias, x.shape[-1])
    _check.tensor("residual", residual, 3)
    _check.shape("residual", residual, (x.shape[0], x.shape[1], weight.shape[0]))
    _check.same_device("residual", residual, x)
    _check.modulation("gate", gate, residual)
    if autocast_dtype(x.device.type) is None:
        _check.same_dtype("gate", gate, "x", x)
        _check.stream("residual", residual, "x", x)
    return formulas.linear_gated_residual(x, weight, bias, gate, residual)


def _check_input(name: str, x: Tensor) -> None:
    _check.tensor(name, x)
    if x.ndim < 1:
        raise ValueError(f"{name} must have at least 1 axis, got a scalar")


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and _takes_cublaslt(x, weight, bias):
        out = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], weight.shape[0])
    return formulas.linear_gelu(x, weight, bias)


def _takes_cublaslt(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether cuBLASLt's GELU epilogue applies: CUDA, where it is the tanh form, and nothing to save for backward."""
    backend = current_backend()
    return (
        ((x.is_cuda and backend != "torch") or (x.is_meta and backend == "triton"))
        and torch.version.hip is None
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and autocast_dtype(x.device.type) is None
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad))
    )
