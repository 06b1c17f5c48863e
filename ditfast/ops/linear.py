"""Linears with an epilogue: tanh GELU, gated residual, and the MLP of both.

The fused operators take widths that are multiples of 8 (16-byte rows of 16-bit elements); others run the formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import ops as formulas
from . import check, linear_autograd
from .adaln import gated_residual
from .backend import autocast_dtype, current_backend, sharded, takes_triton


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
    check.linear(x, ("weight", "bias"), weight, bias, x.shape[-1])
    if not takes_gemm("linear_gelu", x, weight.shape, (weight, bias)):
        return formulas.linear_gelu(x, weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    out = linear_autograd.linear_gelu(x.reshape(-1, x.shape[-1]), weight, bias, _demanded())
    return out.view(*x.shape[:-1], weight.shape[0])


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
    check.linear(x, ("w1", "b1"), w1, b1, x.shape[-1])
    check.linear(x, ("w2", "b2"), w2, b2, w1.shape[0])
    if not takes_gemm("gelu_mlp", x, (*w1.shape, w2.shape[0]), (w1, b1, w2, b2)):
        return formulas.gelu_mlp(x, w1, b1, w2, b2)
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    out = linear_autograd.gelu_mlp(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2, _demanded())
    return out.view(*x.shape[:-1], w2.shape[0])


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

    DTensors run the Linear and the gate one after the other: where x and weight are sharded along K, the product is a
    partial sum, and reduced in between.

    Returns:
        (B, T, D) in residual's dtype.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, naming the argument.
    """
    check.tensor("x", x, 3)
    check.linear(x, ("weight", "bias"), weight, bias, x.shape[-1])
    check.tensor("residual", residual, 3)
    check.shape("residual", residual, (x.shape[0], x.shape[1], weight.shape[0]))
    check.same_device("residual", residual, x)
    check.modulation("gate", gate, residual)
    if autocast_dtype(x.device.type) is None:
        check.same_dtype("gate", gate, "x", x)
        check.stream("residual", residual, "x", x)
    if not takes_gemm("linear_gated_residual", x, weight.shape, (weight, bias, gate, residual)):
        return formulas.linear_gated_residual(x, weight, bias, gate, residual)
    x, weight, bias = autocast(x, weight, bias)
    if gate.dtype != x.dtype or residual.dtype not in (x.dtype, torch.float32):
        return formulas.linear_gated_residual(x, weight, bias, gate, residual)  # autocast promotes as it goes
    if sharded(x):  # what a row-parallel Linear gives is a partial sum, and reduced before the gate
        return gated_residual(residual, F.linear(x, weight, bias), gate)
    rows = x.reshape(-1, x.shape[-1])
    return linear_autograd.linear_gated_residual(rows, weight, bias, gate, residual, _demanded())


def _check_input(name: str, x: Tensor) -> None:
    check.tensor(name, x)
    if x.ndim < 1:
        raise ValueError(f"{name} must have at least 1 axis, got a scalar")


def _demanded() -> bool:
    return current_backend() == "triton"


def takes_gemm(operator: str, x: Tensor, widths: Sequence[int], others: Iterable[Tensor | None]) -> bool:
    """Whether an operator runs on the fused GEMMs for an x, Linears of these widths, and others that may learn.

    Raises:
        RuntimeError: the kernels were asked for by ``use_backend("triton")`` and cannot run, with the reason.
    """
    if not takes_triton(operator, x, 1, others):
        return False
    odd = [width for width in widths if width % 8]
    if odd and _demanded():
        reason = f"widths must be multiples of 8, got {odd[0]}"
        raise RuntimeError(f"ditfast.ops.{operator} cannot run its Triton kernel: {reason}")
    return not odd and all(widths)


def working_dtype(x: Tensor) -> torch.dtype:
    """What torch's own Linear computes in for an operand like x: autocast's dtype where it is on."""
    dtype = autocast_dtype(x.device.type)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors (some may be None) in the dtype in which torch's own Linear would take them."""
    dtype = working_dtype(next(x for x in tensors if x is not None))
    return tuple(x if x is None else x.to(dtype) for x in tensors)
