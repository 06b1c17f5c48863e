"""The codebases of docs/accelerate.md: blocks with their structure, written from the papers, and their reports."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ditfast
from ditfast.adapters import adapter as adapter_module
from tests.adapters.conftest import assert_trained_alike
from tests.adapters.foreign_models import Attention, Block, Mlp, Model, modulated, randomised

UNKNOWN = "which the fused forward does not know"


class BiasedAttention(Attention):
    """MDT's: a learned relative-position bias in every head."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.relative_bias = nn.Parameter(torch.randn(num_heads, 16, 16))

    def forward(self, x, ids_keep=None):
        return super().forward(x, self.relative_bias)


class Mdt(Block):
    """Version 2 has long skips too."""

    def __init__(self, dim, num_heads, skip=False):
        super().__init__(dim, num_heads)
        self.attn = BiasedAttention(dim, num_heads)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, c, skip=None, ids_keep=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, x if skip is None else skip], -1))
        return super().forward(x, c)


class Uvit(nn.Module):
    """Affine norms, qkv without bias, the exact GELU, no modulation: the condition is a token."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, num_heads, qkv_bias=False), Mlp(dim, 4 * dim, nn.GELU())

    def forward(self, x, c):
        x = torch.cat([c[:, None], x], 1)
        x = x + self.attn(self.norm1(x))
        return (x + self.mlp(self.norm2(x)))[:, 1:]


class TimeAttention(BiasedAttention):
    """DiffiT's: the condition has a projection of its own."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.qkv_time = nn.Linear(dim, 3 * dim)

    def forward(self, x, c):
        shifted = x + self.qkv_time(c)[:, None, : x.shape[2]]
        return super().forward(shifted)


class Diffit(Uvit):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.attn, self.mlp = TimeAttention(dim, num_heads), Mlp(dim, 4 * dim)

    def forward(self, x, c):
        x = x + self.attn(self.norm1(x), c)
        return x + self.mlp(self.norm2(x))


class RopeAttention(Attention):
    def forward(self, x, rope=None):
        return super().forward(x if rope is None else x * rope)


class SwiGlu(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(nn.functional.silu(a) * b)


class Lightning(Block):
    """LightningDiT's: RMSNorm, rotary positions, SwiGLU."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.attn, self.mlp = RopeAttention(dim, num_heads), SwiGlu(dim)
        self.rope = None

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated(self.norm1(x), shift1, scale1), rope=self.rope)
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))


class Repa(Block):
    """Its modulation is chunked on the last axis; its queries and keys may be normalised."""

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


# the check has 9 tokens, the bias table is for 16
ONE_LENGTH = "its own forward could not be checked: RuntimeError: The"
PACKED = "queries and keys are no longer packed"


@pytest.mark.parametrize(
    ("block", "accelerated", "skipped"),
    [
        (Repa(48, 2), {"", ".attn", ".mlp"}, {}),
        (Repa(48, 2, qk_norm=True), {"", ".mlp"}, {".attn": f"q_norm is LayerNorm: normalised {PACKED}"}),
        (Mdt(48, 2), {".mlp"}, {"": ONE_LENGTH, ".attn": f"it has relative_bias, {UNKNOWN}"}),
        (
            Mdt(48, 2, skip=True),
            {".mlp"},
            {"": f"it has skip_linear (Linear), {UNKNOWN}", ".attn": f"it has relative_bias, {UNKNOWN}"},
        ),
        (
            Uvit(48, 2),
            {".attn"},
            {".mlp": "its activation is GELU(approximate='none'), the fused one GELU(approximate='tanh')"},
        ),
        (Diffit(48, 2), {".mlp"}, {".attn": f"it has relative_bias, {UNKNOWN}"}),
        (
            Lightning(48, 2),
            set(),
            {"": "norm1 is RMSNorm, not torch's LayerNorm", ".attn": f"its forward takes rope: rotated {PACKED}"},
        ),
    ],
    ids=["REPA", "REPA, qk-norm", "MDT", "MDT v2", "U-ViT", "DiffiT", "LightningDiT"],
)
def test_a_row(block, accelerated, skipped):
    slow = Model(depth=1)
    slow.blocks[0] = block
    randomised(slow)
    fast = copy.deepcopy(slow)
    report = ditfast.accelerate(fast)
    assert not any(entry.note for entry in report.accelerated)
    entries = [entry for entry in report.accelerated if entry.module != "final_layer"]
    assert {entry.module.removeprefix("blocks.0") for entry in entries} == accelerated
    reasons = {entry.module.removeprefix("blocks.0"): entry.reason for entry in report.skipped}
    assert reasons.keys() == skipped.keys()
    assert all(reasons[module].startswith(reason) for module, reason in skipped.items()), reasons
    assert_trained_alike(fast, slow, join=True)


def test_blocks_of_one_length_without_the_check():
    slow = Model(depth=1)
    slow.blocks[0] = Mdt(48, 2)
    randomised(slow)
    fast = copy.deepcopy(slow)
    assert [entry.module for entry in ditfast.accelerate(fast, check=False).skipped] == ["blocks.0.attn"]
    assert_trained_alike(fast, slow, join=True)


# diffusers' other transformers: class -> (small sizes, what is matched)
SIZES = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1}
OTHERS = {
    "PixArtTransformer2DModel": (
        {**SIZES, "sample_size": 8, "cross_attention_dim": 48, "caption_channels": 16},
        ["transformer_blocks.0.ff"],
    ),
    "SD3Transformer2DModel": (
        {**SIZES, "sample_size": 8, "joint_attention_dim": 16, "caption_projection_dim": 48, "num_layers": 2,
         "pooled_projection_dim": 16, "pos_embed_max_size": 8, "in_channels": 4, "out_channels": 4},
        ["transformer_blocks.0.ff", "transformer_blocks.0.ff_context", "transformer_blocks.1.ff"],
    ),
    "FluxTransformer2DModel": (
        {**SIZES, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 16, "in_channels": 4,
         "axes_dims_rope": (8, 8, 8)},
        ["transformer_blocks.0.ff", "transformer_blocks.0.ff_context"],
    ),
    "Lumina2Transformer2DModel": (
        {"sample_size": 8, "hidden_size": 48, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2,
         "num_kv_heads": 1, "cap_feat_dim": 16, "axes_dim_rope": (8, 8, 8), "axes_lens": (10, 10, 10)},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_row_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    sizes, matched = OTHERS[name]
    model = getattr(diffusers, name)(**sizes)
    if matched:
        report = ditfast.accelerate(model, strict=True)
        assert [entry.module for entry in report.entries] == matched
        assert {(entry.adapter, entry.note) for entry in report.entries} == {("diffusers feed-forward", "")}
    else:
        with pytest.raises(ValueError, match="nothing that ditfast can accelerate"):
            ditfast.accelerate(model)


class Rms(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class RmsBlock(Block):
    """LightningDiT's norms."""

    def __init__(self, dim, num_heads, eps=1e-6, more=0):
        super().__init__(dim, num_heads)
        self.norm1, self.norm2, self.more = Rms(dim), Rms(dim, eps), more

    def forward(self, x, c):
        return super().forward(x, c) + self.more if self.more else super().forward(x, c)


def fused_rms_block(x, modulation, w1, w2, attn, mlp):
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, -1)
    x = x + gate1 * attn(F.rms_norm(x, x.shape[-1:], w1, 1e-6) * (1 + scale1) + shift1)
    return x + gate2 * mlp(F.rms_norm(x, x.shape[-1:], w2, 1e-6) * (1 + scale2) + shift2)


def test_the_worked_example_of_an_adapter(monkeypatch):
    """The adapter of CONTRIBUTING.md matches its own blocks and no others."""
    monkeypatch.setattr(adapter_module, "_ADAPTERS", list(adapter_module._ADAPTERS))
    page = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*register_adapter\(RmsBlockAdapter\(\)\)[^`]*)```", page)
    exec(code, {"my_fused_block": fused_rms_block, "__name__": __name__})
    slow = Model(depth=4)
    slow.blocks = nn.ModuleList([RmsBlock(48, 2), RmsBlock(48, 2, eps=0.1), RmsBlock(48, 2, more=1), Block(48, 2)])
    fast = copy.deepcopy(randomised(slow))
    report = ditfast.accelerate(fast)
    entries = {entry.module: (entry.adapter, entry.status) for entry in report.entries if entry.module.count(".") == 1}
    assert entries == {
        "blocks.0": ("rms block", "accelerated"),
        "blocks.1": ("rms block", "skipped"),
        "blocks.2": ("rms block", "skipped"),
        "blocks.3": ("official block", "accelerated"),
    }
    different, further = (entry.reason for entry in report.skipped)
    assert different == "its norms have different eps" and "another function in inference" in further
    assert_trained_alike(fast, slow)
