"""The attention kernels as torch operators (schema, fake, registration) and their autograd."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .library import Kernel, apply, library, register

library.define(
    "attention_forward(Tensor qkv, int num_heads, float scale, Tensor? bias, bool save) -> (Tensor out, Tensor stats)"
)
library.define(
    "attention_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor stats, int num_heads, float scale, Tensor? bias,"
    " bool want_bias, bool want_sums) -> (Tensor d_qkv, Tensor d_bias, Tensor sums)"
)


def _heads(packed: Tensor, num_heads: int) -> Tensor:
    """(B, T, 3D) -> (B, T, 3, H, head_dim), without a copy."""
    batch, tokens, width = packed.shape
    return packed.view(batch, tokens, 3, num_heads, width // (3 * num_heads))


def _forward(qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, save: bool) -> tuple[Tensor, Tensor]:
    from ..kernels.attention import attention_fwd  # imports triton

    return attention_fwd(_heads(qkv, num_heads), scale, bias, save)


def _backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    num_heads: int,
    scale: float,
    bias: Tensor | None,
    want_bias: bool,
    want_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.attention_bwd import attention_bwd

    packed = _heads(qkv, num_heads)
    d_qkv, d_bias, sums = attention_bwd(d_out, packed, out, stats, scale, bias, want_bias, want_sums)
    return d_qkv.view(qkv.shape), d_bias, sums


def _forward_fake(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    stats = qkv.new_empty((batch, num_heads, 2, tokens) if save else 0, dtype=torch.float32)
    return qkv.new_empty((batch, tokens, width // 3)), stats


def _backward_fake(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    num_heads: int,
    scale: float,
    bias: Tensor | None,
    want_bias: bool,
    want_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.attention import sum_slots

    batch, tokens, width = qkv.shape
    d_bias = cast(Tensor, bias).new_empty(cast(Tensor, bias).shape) if want_bias else qkv.new_empty(0)
    slots = sum_slots(tokens, width // (3 * num_heads), qkv.dtype, bias is not None)
    sums = qkv.new_empty((batch * slots, width) if want_sums else 0, dtype=torch.float32)
    return qkv.new_empty(qkv.shape), d_bias, sums


register("attention_forward", _forward, _forward_fake)
register("attention_backward", _backward, _backward_fake)


class _Attention(Kernel):
    """(qkv, bias, num_heads, scale) -> (out, stats)."""

    operator = "self_attention"

    @staticmethod
    def forward(qkv: Tensor, bias: Tensor | None, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
        result = torch.ops.ditfast.attention_forward.default(qkv, num_heads, scale, bias, True)
        return cast("tuple[Tensor, Tensor]", result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, bias, ctx.num_heads, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, bias, *output)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 4
        qkv, bias, out, stats = saved
        want_qkv, want_bias, _, _ = ctx.needs_input_grad
        d_qkv, d_bias, _ = torch.ops.ditfast.attention_backward.default(
            d_out, qkv, out, stats, ctx.num_heads, ctx.scale, bias, want_bias, False
        )
        return d_qkv if want_qkv else None, d_bias if want_bias else None, None, None


def attention(qkv: Tensor, bias: Tensor | None, num_heads: int, scale: float) -> Tensor:
    """(B, T, D) by the kernels, differentiable; bias None or of four axes that broadcast to (B, H, T, T)."""
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (qkv, bias))):
        return cast(Tensor, torch.ops.ditfast.attention_forward.default(qkv, num_heads, scale, bias, False)[0])
    return cast(Tensor, apply("_Attention", qkv, bias, num_heads, scale)[0])
