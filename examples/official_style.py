"""A DiT as most codebases write it, made fast by one line: python examples/official_style.py

Nothing in the model knows of ditfast. The line changes this model and no other, in place: its parameters, state-dict
keys, hooks and copies stay what they were. On a CPU the fused operators run as plain PyTorch; on an NVIDIA GPU they are
Triton kernels.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import ditfast
from ditfast.parity import judge


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """adaLN-Zero."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Model(nn.Module):
    """Patches (B, T, 16) and timesteps (B,) -> (B, T, 16)."""

    def __init__(self, dim=192, depth=4, num_heads=3):
        super().__init__()
        self.x_embedder, self.t_embedder = nn.Linear(16, dim), nn.Linear(1, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, 16)

    def forward(self, x, t):
        x, c = self.x_embedder(x), self.t_embedder(t.to(x.dtype)[:, None] / 1000)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def main():
    torch.manual_seed(0)
    model = Model()
    untouched, exact = copy.deepcopy(model), copy.deepcopy(model).double()

    print(ditfast.accelerate(model))  # the line

    x, t = torch.randn(4, 64, 16), torch.tensor([1, 250, 500, 999])
    outputs = []
    for each in (model, untouched, exact):
        out = each(x.to(each.x_embedder.weight.dtype), t)
        out.square().mean().backward()
        outputs.append([out.detach(), *(parameter.grad for parameter in each.parameters())])
    verdicts = [judge("model", *values, torch.float32) for values in zip(*outputs, strict=True)]
    print(f"accelerated: {verdicts[0].error:.1e} from fp64; untouched: {verdicts[0].yardstick:.1e}")
    agree = all(verdict.ok for verdict in verdicts)
    print(f"agreement: output and {len(verdicts) - 1} gradients {'ok' if agree else 'FAILED'}")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
