"""A model as the official release's users have it, for ``ditfast.accelerate``: the reference with timm's layers in it.

The reference writes attention and the MLP without the modules that timm has around and within them: norms of queries
and keys, activation, dropouts. They compute the same; a host pays for each.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ditfast import reference
from ditfast.config import DiTConfig


class _Attention(nn.Module):
    """timm's ``Attention`` without norms and dropout."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return cast(Tensor, self.proj_drop(out))


class _Mlp(nn.Module):
    """timm's ``Mlp`` without norm and dropout."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, width)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return cast(Tensor, self.drop2(self.fc2(self.norm(x))))


def official_style(config: DiTConfig) -> nn.Module:
    """The reference model, whose attention and MLP are written as timm's are: the same parameters by the same names."""
    model = reference.DiT(config)
    for block in model.blocks:
        hidden: int = cast(Any, block).mlp.fc1.out_features
        block.attn = _Attention(config.hidden_size, config.num_heads)
        block.mlp = _Mlp(config.hidden_size, hidden)
    return model
