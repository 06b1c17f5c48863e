"""Each operator of ditfast as a formula: the specification of kernels and fallbacks.

Shapes: B batch, T tokens, D width, H heads, F hidden width. No validation here; see ``ditfast.ops``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .transforms import beyond_gradients, refuse_second_order

_BY_FUSED_KERNELS = (
    "ditfast: attention by torch's fused kernels has no derivative of its gradient; compute the forward under "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), which has"
)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift: x (B, T, D); shift, scale (B, D). In shift's dtype.

    Source: DiT, section 3.2, "Adaptive layer norm (adaLN) block".
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(shift.dtype)


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """residual + gate * branch: residual, branch (B, T, D); gate (B, D). In residual's dtype.

    Source: DiT, section 3.2, "adaLN-Zero block" (gate is the paper's alpha).
    """
    return residual + gate.unsqueeze(1) * branch


def gated_residual_layer_norm_modulate(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The gated residual, then its modulated norm: returns (new residual, modulated norm)."""
    residual = gated_residual(residual, branch, gate)
    return residual, layer_norm_modulate(residual, shift, scale, eps)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu_tanh(x W^T + b): x (..., D); weight (F, D); bias (F,)."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear_gated_residual(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, residual: Tensor) -> Tensor:
    """residual + gate * (x W^T + b): x (B, T, K); weight (D, K); gate (B, D); residual (B, T, D)."""
    return gated_residual(residual, F.linear(x, weight, bias), gate)


def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """gelu_tanh(x W1^T + b1) W2^T + b2: x (..., D); w1 (F, D); w2 (D, F)."""
    return F.linear(linear_gelu(x, w1, b1), w2, b2)


def modulations(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """c W_i^T + b_i side by side: c (B, D); weights (N_i, D); biases (N_i,). Returns (B, sum of N_i).

    Source: DiT, section 3.2: each block's modulation is regressed from the condition.
    """
    return torch.cat([F.linear(c, weight, bias) for weight, bias in zip(weights, biases, strict=True)], dim=1)


def self_attention(qkv: Tensor, num_heads: int, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v on the packed projection: qkv (B, T, 3D) -> (B, T, D).

    The last axis of qkv is [q; k; v], each head-major. ``scale`` is head_dim ** -0.5 by default;
    ``bias`` broadcasts to (B, H, T, T).
    """
    q, k, v = split_heads(qkv, num_heads)
    return merge_heads(attention(q, k, v, bias, scale))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v: q (B, H, T, head_dim); k, v (B, H, S, head_dim); bias to (B, H, T, S).

    By torch's kernels, which have first gradients only; within torch.func's transforms that need more, by its math.
    """
    if beyond_gradients(q, k, v, bias):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    refuse_second_order(out, "ScaledDotProduct", _BY_FUSED_KERNELS)
    return out


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(B, T, 3D) -> q, k, v, (B, H, T, head_dim) each, as views."""
    batch, tokens, width = qkv.shape
    return qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, head_dim) -> (B, T, D)."""
    batch, num_heads, tokens, head_dim = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, num_heads * head_dim)


def timestep_embedding(
    t: Tensor, dim: int, freq_shift: float = 0.0, dtype: torch.dtype = torch.float32, max_period: float = 10000.0
) -> Tensor:
    """Sinusoid of the timesteps, [cos, sin]: t (B,) -> (B, dim).

    Frequencies are max_period ** (-i / (dim/2 - freq_shift)); computed in ``dtype``, at least fp32.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    half = dim // 2
    exponent = torch.arange(half, device=t.device, dtype=dtype) / (half - freq_shift)
    angles = t.to(dtype).unsqueeze(1) * max_period**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_position_table(width: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """The frozen 2-D sine-cosine position table: (rows * columns, width), fp64.

    The first half of the width encodes the column (the width coordinate comes first), the second half
    the row; each half is [sin, cos] over width / 4 frequencies 10000 ** (-i / (width / 4)).
    """
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64, device=device),
        torch.arange(columns, dtype=torch.float64, device=device),
        indexing="ij",
    )
    angles = [coordinate.reshape(-1, 1) * omega for coordinate in (column, row)]
    return torch.cat([half for angle in angles for half in (angle.sin(), angle.cos())], dim=1)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Latent (B, C, h*p, w*p) -> patch vectors (B, h*w, p*p*C), channel last in the patch vector."""
    batch, channels, height, width = x.shape
    rows, columns = height // patch_size, width // patch_size
    patches = x.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(x: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Patch vectors (B, h*w, p*p*C) -> latent (B, C, h*p, w*p); the inverse of :func:`patchify`."""
    batch, (rows, columns), channels = x.shape[0], grid_size, x.shape[2] // patch_size**2
    patches = x.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, columns * patch_size)


def guide(output: Tensor, cfg_scale: float, guided_channels: int) -> Tensor:
    """Classifier-free guidance on a batch of 2N: eps_u + cfg_scale * (eps_c - eps_u).

    Args:
        output: (2N, C, h, w), the first half conditional, the second unconditional.
        guided_channels: how many leading channels are guided; the rest keep each half's own values.

    Returns:
        (2N, C, h, w); both halves hold the guided channels.
    """
    guided, rest = output[:, :guided_channels], output[:, guided_channels:]
    conditional, unconditional = guided.chunk(2)
    half = unconditional + cfg_scale * (conditional - unconditional)
    return torch.cat([torch.cat([half, half]), rest], dim=1)
