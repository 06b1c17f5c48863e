"""Attention in ``ditfast bench ops``: each implementation as a provider of its own, and the shapes they are held at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ditfast import ops
from ditfast.ops import attention_implementations as backends
from ditfast.ops.attention_implementations import AttentionBackend

from ...testing.operators import Shape

#: provider -> backend of self_attention; "ditfast" is its choice, "ditfast-triton" this project's kernels
PROVIDERS: dict[str, AttentionBackend] = {
    "sdpa-cudnn": "cudnn",
    "sdpa-flash": "flash",
    "sdpa-efficient": "efficient",
    "flash-attn-2": "flash_attn",
    "flash-attn-3": "flash_attn_3",
    "flash-attn-4": "flash_attn_4",
    "ditfast-triton": "triton",
}
_TOKENS = 16384  # of a batch, as FlashAttention's own figures have it
#: head dims 72 and 64, sequences short and long
SHAPES = tuple(
    Shape(_TOKENS // tokens, tokens, 16 * head_dim, num_heads=16, ratio=4)
    for head_dim in (72, 64)
    for tokens in (256, 1024, 4096)
)


def is_attention(operator: str) -> bool:
    return operator.startswith("self_attention")


def implementation(provider: str) -> Callable[..., Any]:
    """(qkv, num_heads, bias=None) -> (B, T, D); a rival's backward as its library has it by default."""
    backend = PROVIDERS[provider]
    if backend == "triton":
        return partial(ops.self_attention, backend=backend)

    def attend(qkv: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
        return backends.run_library(backend, qkv, num_heads, None, bias, deterministic=False, alone=True)

    return attend


def unavailable(
    provider: str, qkv: Tensor, num_heads: int, bias: Tensor | None = None, backward: bool = False
) -> str | None:
    """Why a provider cannot take these tensors, or None; ``backward``: where gradients of all of them are wanted."""
    if bias is not None:
        bias = bias.detach().reshape((1,) * (4 - bias.ndim) + tuple(bias.shape)).requires_grad_(backward)
    return ops.attention_backends(qkv, num_heads, bias)[PROVIDERS[provider]]
