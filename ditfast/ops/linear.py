"""Linears with an epilogue (tanh GELU, gated residual, the MLP of both): public functions, then their autograd.

The fused GEMMs (gemm.py) take widths that are multiples of 8 (16-byte rows of 16-bit elements); others run the formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import ops as formulas
from . import check, gemm
from .adaln import adaln_backward, gated_residual
from .backend import Kernel, apply, autocast_dtype, current_backend, sharded, takes_triton, wants_gradient


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
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor
    if wants_gradient(x, weight, bias):
        out, _ = apply("_LinearGelu", rows, weight, bias, _demanded())
    else:
        out, _ = gemm.linear_gelu(rows, weight, bias, False, _demanded())
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
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor
    if wants_gradient(x, w1, b1, w2, b2):
        out, _ = apply("_GeluMlp", rows, w1, b1, w2, b2, _demanded())
    else:
        act, _ = gemm.linear_gelu(rows, w1, b1, False, _demanded())
        out = F.linear(act, w2, b2)
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
    if sharded(x):  # a row-parallel Linear gives a partial sum, which is reduced before the gate
        return gated_residual(residual, F.linear(x, weight, bias), gate)
    inputs = (x.reshape(-1, x.shape[-1]), weight, bias, gate, residual)
    out: Tensor
    if wants_gradient(*inputs):
        out, _ = apply("_LinearGatedResidual", *inputs, _demanded(), gate.requires_grad)
    else:
        out, _ = gemm.linear_gated_residual(*inputs, False, _demanded())
    return out


def _check_input(name: str, x: Tensor) -> None:
    check.tensor(name, x)
    if x.ndim < 1:
        raise ValueError(f"{name} must have at least 1 axis, got a scalar")


def _demanded() -> bool:
    return current_backend() == "triton"


def takes_gemm(operator: str, x: Tensor, widths: Sequence[int], others: Iterable[Tensor | None]) -> bool:
    """Whether an operator runs on the fused GEMMs for x, Linears of these widths, and others that may want a gradient.

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
    """The dtype in which torch's own Linear computes for an operand like x: autocast's dtype where it is on."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return x.dtype
    dtype = autocast_dtype(x.device.type)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors (some may be None) in the dtype in which torch's own Linear would take them."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    dtype = working_dtype(next(x for x in tensors if x is not None))
    return tuple(x if x is None else x.to(dtype) for x in tensors)


Gradients = tuple[Tensor | None, ...]


def weight_gradient(d_y: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
    """d_y^T x, of a Linear."""
    return d_y.t() @ x if wanted else None


def bias_gradient(d_y: Tensor, partial: Tensor, wanted: bool) -> Tensor | None:
    """The sum over d_y's rows, of a Linear; from ``partial`` unless d_y is a DTensor."""
    if not wanted:
        return None
    return d_y.sum(0) if sharded(d_y) else gemm.summed(partial, d_y.dtype)


class _LinearGelu(Kernel):
    """(x, weight, bias, demanded) -> (gelu_tanh(pre), pre)."""

    operator = "linear_gelu"

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, demanded: bool) -> tuple[Tensor, Tensor]:
        return gemm.linear_gelu(x, weight, bias, True, demanded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else the pre-activation would get a gradient of zeros
        ctx.save_for_backward(x, weight, output[1], bias)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], d_act: Tensor | None, _: None) -> Gradients:
        if d_act is None:
            return (None,) * 4
        x, weight, pre, _bias = saved
        want_x, want_weight, want_bias, _ = ctx.needs_input_grad
        # a shard has another number of partial sums than the whole: sharded gradients are summed afterwards
        d_pre, partial = gemm.gelu_backward(d_act, pre, want_bias and not sharded(d_act))
        d_bias = bias_gradient(d_pre, partial, want_bias)
        return d_pre @ weight if want_x else None, weight_gradient(d_pre, x, want_weight), d_bias, None


class _GeluMlp(Kernel):
    """(x, w1, b1, w2, b2, demanded) -> (the MLP, the pre-activation)."""

    operator = "gelu_mlp"

    @staticmethod
    def forward(
        x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, demanded: bool
    ) -> tuple[Tensor, Tensor]:
        act, pre = gemm.linear_gelu(x, w1, b1, True, demanded)
        return F.linear(act, w2, b2), pre

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w1, b1, w2, _, demanded = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w1, w2, output[1], b1)
        ctx.demanded = demanded

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], d_y: Tensor | None, _: None) -> Gradients:
        if d_y is None:
            return (None,) * 6
        x, w1, w2, pre, _b1 = saved
        want_x, want_w1, want_b1, want_w2, want_b2, _ = ctx.needs_input_grad
        sums = want_b1 and not sharded(d_y)
        d_pre, act, partial = gemm.linear_gelu_backward(d_y, w2, pre, sums, ctx.demanded)
        return (
            d_pre @ w1 if want_x else None,
            weight_gradient(d_pre, x, want_w1),
            bias_gradient(d_pre, partial, want_b1),
            weight_gradient(d_y, act, want_w2),
            d_y.sum(0) if want_b2 else None,
            None,
        )


class _LinearGatedResidual(Kernel):
    """(x, weight, bias, gate, residual, demanded) -> (residual + gate * branch, branch).

    The branch is stored where the gate wants its gradient.
    """

    operator = "linear_gated_residual"

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, residual: Tensor, demanded: bool, save: bool
    ) -> tuple[Tensor, Tensor]:
        return gemm.linear_gated_residual(x, weight, bias, gate, residual, save, demanded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, gate, *_ = inputs
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, gate, output[1] if inputs[-1] else None, bias)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], d_r: Tensor | None, _: None) -> Gradients:
        if d_r is None:
            return (None,) * 7
        x, weight, gate, branch, _bias = saved
        want_x, want_weight, want_bias, want_gate, want_residual, _, _ = ctx.needs_input_grad
        d_x, d_weight, d_bias, d_gate = None, None, None, None
        if want_x or want_weight or want_bias or want_gate:
            wants_branch = want_x or want_weight
            branch = branch.view(d_r.shape) if want_gate else None
            _, d_branch, _, d_vectors, d_bias, _ = adaln_backward(
                d_r, None, d_r, branch, gate, None, None, None, None,
                wants=(False, wants_branch, want_gate, False, want_bias, False), partials=(),
            )  # fmt: skip
            d_branch = d_branch.view(len(x), len(weight)) if wants_branch else d_branch
            d_x = d_branch @ weight if want_x else None
            d_weight = weight_gradient(d_branch, x, want_weight)
            d_gate = d_vectors[0] if want_gate else None
        return d_x, d_weight, d_bias if want_bias else None, d_gate, d_r if want_residual else None, None, None
