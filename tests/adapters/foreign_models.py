"""Models as other codebases write them, after the structural facts: written for the tests, copied from nowhere."""

import torch
import torch.nn.functional as F
from torch import nn

from ditfast.reference import ops


class Attention(nn.Module):
    """In timm's style: qkv, norms of queries and keys, dropouts, one of two implementations."""

    def __init__(self, dim, num_heads, qk_norm=False, attn_drop=0.0, proj_drop=0.0, fused_attn=True, qkv_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = fused_attn
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, attn_mask=None):
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            p = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=p, scale=self.scale)
        else:
            weights = (q * self.scale) @ k.transpose(-2, -1)
            weights = weights if attn_mask is None else weights + attn_mask
            x = self.attn_drop(weights.softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, t, d)))


class Mlp(nn.Module):
    """In timm's style: two Linears with an activation and dropouts."""

    def __init__(self, dim, hidden, act=None, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act or nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


def modulated(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """adaLN-Zero in the official release's style."""

    def __init__(self, dim, num_heads, eps=1e-6, act=None, drop_path=None, **attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.attn = Attention(dim, num_heads, **attention)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.mlp = Mlp(dim, 4 * dim, act)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.drop_path = drop_path or nn.Identity()

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + self.drop_path(gate1[:, None] * self.attn(modulated(self.norm1(x), shift1, scale1)))
        return x + self.drop_path(gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2)))


class DropPath(nn.Module):
    """Drops whole samples of a branch."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        mask = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_prob
        return x * mask / (1 - self.drop_prob)


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


class Model(nn.Module):
    """A small DiT around blocks: latents (B, 4, h, w), timesteps (B,) and labels (B,) -> (B, 8, h, w)."""

    def __init__(self, dim=48, num_heads=2, depth=2, classes=10, **block):
        super().__init__()
        self.x_embedder = nn.Conv2d(4, dim, 2, 2)
        self.t_embedder = nn.Linear(64, dim)
        self.y_embedder = nn.Embedding(classes + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, **block) for _ in range(depth))
        self.final_layer = FinalLayer(dim, 4 * 8)

    def forward(self, x, t, y):
        grid = x.shape[2] // 2, x.shape[3] // 2
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(ops.timestep_embedding(t, 64).to(x.dtype)) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return ops.unpatchify(self.final_layer(x, c), 2, grid)


def randomised(model, seed=0):
    """The model with random parameters, open gates included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


SMALL = (4, 6)  # latents of 6 tokens: Triton's interpreter takes milliseconds a token


def inputs(batch=3, seed=1, size=(8, 8)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, *size, generator=generator)
    return x, torch.tensor([1, 500, 999, 3][:batch]), torch.tensor([0, 7, 10, 2][:batch])
