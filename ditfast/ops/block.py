"""Halves of a training block as one autograd node each: an adaLN operator and the Linears that read its norm.

The modulated norm is not saved: its operator's backward, which has the normalised rows at hand, writes it once more
for the Linear's weight gradient. Saved are the residual stream, the branch, and what the Linear made of the norm
(qkv, or the MLP's pre-activation); of XL/2's block 12 units of M * D in the place of the 20 that autograd keeps.

Every function takes (x, branch, gate, bias, shift, scale, eps): the residual stream (B, T, D), the pending branch with
its gate and the bias of the Linear that computed it (in the branch already; it gets its gradient here), or None, and
the modulation of the norm that follows. See :mod:`ditfast.ops.adaln`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .adaln import adaln_forward, norm_backward, norm_saved
from .attention import attention_backward, attention_forward
from .backend import Kernel, apply
from .gemm import linear_gelu, linear_gelu_backward, sum_partials
from .linear import Gradients, weight_gradient

_NORM_INPUTS = 7  # of each node: (x, branch, gate, bias, shift, scale, eps)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # flatten has no rule for batches of gradients


def _norm_forward(inputs: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, branch, gate, _, shift, scale, eps = inputs
    return adaln_forward(x, branch, gate, shift, scale, eps)


def _save(
    ctx: Any,
    inputs: Sequence[Any],
    r: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *rest: Tensor | None,
    hidden: Sequence[Tensor],
) -> None:
    """Saves what the backward needs; ``hidden`` are outputs that only it reads."""
    x, branch, gate, _, shift, scale, eps = inputs[:_NORM_INPUTS]
    ctx.mark_non_differentiable(mean, rstd, *hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*norm_saved(ctx, x, branch, gate, shift, scale, r, mean, rstd), *rest)
    ctx.eps = eps


def _norm_gradients(
    ctx: Any,
    saved: Sequence[Tensor],
    d_r: Tensor | None,
    d_norm: Callable[[], Tensor] | None,
    want_norm: bool,
    partials: Sequence[Tensor],
) -> tuple[list[Tensor | None], Tensor, list[Tensor]]:
    """(gradients of the seven inputs, the modulated norm as a matrix, the sums).

    Args:
        d_norm: computes the norm's gradient (M, D); None where there is none.
        want_norm: whether the norm is computed again.
        partials: partial sums of bias gradients, to be added up.
    """
    r, branch, gate, shift, scale, mean, rstd = saved[:_NORM_INPUTS]
    d_r = None if gate is None else d_r  # zeros from a compiled backward
    needs = ctx.needs_input_grad[:6]
    if d_norm is not None and not any(needs):  # frozen up to here, and only the weights learn
        norm = adaln_forward(r, None, None, shift, scale, ctx.eps)[1] if want_norm else r
        sums = sum_partials(partials, scale.dtype) if partials else []
        return [None] * _NORM_INPUTS, _matrix(norm), sums
    if d_norm is None and d_r is None:
        return [None] * _NORM_INPUTS, r, []
    d_out = None if d_norm is None else d_norm().view(r.shape)
    gradients, norm, sums = norm_backward(saved[:_NORM_INPUTS], d_r, d_out, needs, want_norm, partials)
    return [*gradients, None], _matrix(norm) if want_norm else norm, sums


class _NormLinear(Kernel):
    """(..., weight, bias) -> (r, y, mean, rstd) with y = norm W^T + b, (B, T, N)."""

    operator = "layer_norm_modulate and a Linear in one node"

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        r, norm, mean, rstd = _norm_forward(inputs[:_NORM_INPUTS])
        return r, F.linear(norm, *inputs[_NORM_INPUTS:]), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        r, _, mean, rstd = output
        _save(ctx, inputs, r, mean, rstd, inputs[_NORM_INPUTS], hidden=())

    @staticmethod
    def gradients(
        ctx: Any, saved: tuple[Any, ...], d_r: Tensor | None, d_y: Tensor | None, *_: None
    ) -> Gradients:
        weight = saved[_NORM_INPUTS]
        want_weight, want_bias = ctx.needs_input_grad[_NORM_INPUTS:]
        if d_y is None:
            return (*_norm_gradients(ctx, saved, d_r, None, False, [])[0], None, None)
        d_y = _matrix(d_y)
        gradients, norm, _none = _norm_gradients(ctx, saved, d_r, lambda: d_y @ weight, want_weight, [])
        return (*gradients, weight_gradient(d_y, norm, want_weight), d_y.sum(0) if want_bias else None)


class _NormAttention(Kernel):
    """(..., weight, bias, num_heads, scale) -> (r, out, qkv, stats, mean, rstd): qkv = norm W^T + b, its attention."""

    operator = "layer_norm_modulate and self_attention in one node"

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        weight, bias, num_heads, scale = inputs[_NORM_INPUTS:]
        r, norm, mean, rstd = _norm_forward(inputs[:_NORM_INPUTS])
        qkv = F.linear(norm, weight, bias)
        out, stats = attention_forward(qkv, num_heads, scale, None, True)
        return r, out, qkv, stats, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight, bias, ctx.num_heads, ctx.scale = inputs[_NORM_INPUTS:]
        r, out, qkv, stats, mean, rstd = output
        _save(ctx, inputs, r, mean, rstd, weight, qkv, out, stats, bias, hidden=(qkv, stats))

    @staticmethod
    def gradients(
        ctx: Any, saved: tuple[Any, ...], d_r: Tensor | None, d_out: Tensor | None, *_: None
    ) -> Gradients:
        weight, qkv, out, stats, _bias = saved[_NORM_INPUTS:]
        want_weight, want_bias, _, _ = ctx.needs_input_grad[_NORM_INPUTS:]
        if d_out is None:
            return (*_norm_gradients(ctx, saved, d_r, None, False, [])[0], *(None,) * 4)
        d_qkv, _none, sums = attention_backward(
            d_out, qkv, out, stats, ctx.num_heads, ctx.scale, None, False, want_bias
        )
        d_qkv = _matrix(d_qkv)
        gradients, norm, d_bias = _norm_gradients(
            ctx, saved, d_r, lambda: d_qkv @ weight, want_weight, [sums.unsqueeze(0)] if want_bias else []
        )
        d_weight = weight_gradient(d_qkv, norm, want_weight)
        return (*gradients, d_weight, d_bias[0][0] if want_bias else None, None, None)


class _NormMlp(Kernel):
    """(..., w1, b1, w2, b2, demanded) -> (r, y, pre, mean, rstd) with y = the MLP of the norm."""

    operator = "layer_norm_modulate and gelu_mlp in one node"

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        w1, b1, w2, b2, demanded = inputs[_NORM_INPUTS:]
        r, norm, mean, rstd = _norm_forward(inputs[:_NORM_INPUTS])
        act, pre = linear_gelu(_matrix(norm), w1, b1, True, demanded)
        return r, F.linear(act, w2, b2).view(norm.shape), pre, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        w1, b1, w2, _, ctx.demanded = inputs[_NORM_INPUTS:]
        r, _, pre, mean, rstd = output
        _save(ctx, inputs, r, mean, rstd, w1, w2, pre, b1, hidden=(pre,))

    @staticmethod
    def gradients(
        ctx: Any, saved: tuple[Any, ...], d_r: Tensor | None, d_y: Tensor | None, *_: None
    ) -> Gradients:
        w1, w2, pre, _b1 = saved[_NORM_INPUTS:]
        want_w1, want_b1, want_w2, want_b2, _ = ctx.needs_input_grad[_NORM_INPUTS:]
        if d_y is None:
            return (*_norm_gradients(ctx, saved, d_r, None, False, [])[0], *(None,) * 5)
        d_y = _matrix(d_y)
        d_pre, act, partial = linear_gelu_backward(d_y, w2, pre, want_b1, ctx.demanded)
        d_w2 = weight_gradient(d_y, act, want_w2)
        d_b2 = d_y.sum(0) if want_b2 else None
        del act, d_y  # before the norm's gradients are made
        gradients, norm, sums = _norm_gradients(
            ctx, saved, d_r, lambda: d_pre @ w1, want_w1, [partial] if want_b1 else []
        )
        d_b1 = sums[0][0] if want_b1 else None
        return (*gradients, weight_gradient(d_pre, norm, want_w1), d_b1, d_w2, d_b2, None)


def norm_linear(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(r, y): inputs as above, then weight (N, D) and bias (N,) or None; r is empty without a branch."""
    r, y, *_ = apply("_NormLinear", *inputs)
    return r, y


def norm_attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(r, out): inputs as above, then the packed projection's weight and bias, num_heads, scale; out (B, T, D)."""
    r, out, *_ = apply("_NormAttention", *inputs)
    return r, out


def norm_mlp(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(r, y): inputs as above, then w1, b1, w2, b2, demanded.

    b2 may be detached: whoever adds y as a branch then takes b2 as its bias, and computes its gradient.
    """
    r, y, *_ = apply("_NormMlp", *inputs)
    return r, y
