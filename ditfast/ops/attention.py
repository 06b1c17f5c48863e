"""Self-attention on the packed qkv projection."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor

from ..reference import ops as formulas
from . import _check
from ._backend import autocast_dtype, current_backend, flash_attn_unavailable

AttentionBackend = Literal["sdpa", "flash_attn"]


def self_attention(
    qkv: Tensor,
    num_heads: int,
    scale: float | None = None,
    bias: Tensor | None = None,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v, read from the packed projection as strided views without a copy.

    Args:
        qkv: (B, T, 3D), the last axis [q; k; v], each head-major.
        num_heads: H, a divisor of D.
        scale: of the logits; head_dim ** -0.5 by default.
        bias: added to the logits, broadcasting to (B, H, T, T), in qkv's dtype.
        backend: "sdpa" (torch's, which itself chooses among cuDNN, flash and others) or "flash_attn" (the
            package, CUDA, bf16 or fp16, no bias). None takes "sdpa".

    Returns:
        (B, T, D) in qkv's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit, naming it; or the backend asked for cannot run, with
            the reason.
    """
    _check.tensor("qkv", qkv, 3)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {num_heads!r}")
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"num_heads must divide a third of qkv's last axis {qkv.shape[2]}, got {num_heads}")
    if bias is not None:
        bias = _checked_bias(bias, qkv, num_heads)
    if backend is not None and backend not in get_args(AttentionBackend):
        raise ValueError(f"backend must be None or one of {', '.join(get_args(AttentionBackend))}, got {backend!r}")
    if backend == "flash_attn":
        return _flash_attn(qkv, num_heads, scale, bias)
    if qkv.is_meta and current_backend() == "triton":
        return _trace(qkv, num_heads, scale, bias)
    return formulas.self_attention(qkv, num_heads, scale, bias)


def _trace(qkv: Tensor, num_heads: int, scale: float | None, bias: Tensor | None) -> Tensor:
    """The formula as a GPU runs it: its kernels write (B, T, H, head_dim), so the merge of the heads is a view.

    The math path, which meta tensors take, writes (B, H, T, head_dim) and would count a copy.
    """
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if out.is_contiguous():
        return out.view(batch, tokens, width // 3)  # no values on meta: only the shape counts
    return formulas.merge_heads(out)


def _checked_bias(bias: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    """The bias with four axes."""
    _check.tensor("bias", bias)
    _check.same_device("bias", bias, qkv)
    if autocast_dtype(qkv.device.type) is None:
        _check.same_dtype("bias", bias, "qkv", qkv)
    wanted = (qkv.shape[0], num_heads, qkv.shape[1], qkv.shape[1])
    padded = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if len(padded) != 4 or any(have not in (1, want) for have, want in zip(padded, wanted, strict=True)):
        raise ValueError(f"bias must broadcast to (B, H, T, T) = {wanted}, got {tuple(bias.shape)}")
    return bias.reshape(padded)


def _flash_attn(qkv: Tensor, num_heads: int, scale: float | None, bias: Tensor | None) -> Tensor:
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    reason = flash_attn_unavailable()
    if reason is None and not qkv.is_cuda:
        reason = f"qkv is on {qkv.device}, flash-attn needs CUDA"
    if reason is None and qkv.dtype not in (torch.bfloat16, torch.float16):
        reason = f"qkv has {qkv.dtype}, flash-attn needs bf16 or fp16"
    if reason is None and bias is not None:
        reason = "flash-attn takes no additive bias"
    if reason is None and (head_dim > 256 or head_dim % 8):
        reason = f"flash-attn needs a head dim that is a multiple of 8 and at most 256, got {head_dim}"
    if reason is not None:
        raise ValueError(f'backend "flash_attn" cannot run: {reason}')
    from flash_attn import flash_attn_qkvpacked_func

    out = flash_attn_qkvpacked_func(qkv.view(batch, tokens, 3, num_heads, head_dim), softmax_scale=scale)
    return cast(Tensor, out).reshape(batch, tokens, num_heads * head_dim)
