"""Forwards whose differences random inputs do not show: refused by what they compute, with the operation named."""

import copy
import functools
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ditfast
from ditfast.adapters import Adapter, adapter, register_adapter, trace
from tests.adapters.foreign_models import Attention, Block, DropPath, FinalLayer, Mlp
from tests.adapters.hidden_parts import (
    ATTENTIONS,
    BLOCKS,
    GENERATOR,
    WINDOWS,
    AutocastClamp,
    CachedWindow,
    Counting,
    FirstWindow,
    GlobalDrop,
    GlobalWindow,
    HalfClamp,
    LayerDrop,
    LongSoftcap,
    NumpysDrop,
    SharedWindow,
    heads,
    window,
)


def entries_of(*modules):
    """The report's entry for each module, beside a part that is always accelerated."""
    report = ditfast.accelerate(nn.ModuleList([*modules, Mlp(48, 96)]))
    return [next(entry for entry in report.entries if entry.module == str(i)) for i in range(len(modules))]


@pytest.mark.parametrize(
    ("kind", "reason"), [*ATTENTIONS.items(), *BLOCKS.items(), (AutocastClamp, "computes clamp")]
)
def test_differences_that_random_inputs_do_not_show(kind, reason):
    module = kind(48, 96) if issubclass(kind, Mlp) else kind(48, 2)
    (entry,) = entries_of(module)
    assert entry.status == "skipped" and entry.reason.startswith(f"its own forward {reason}"), entry.reason
    assert type(module) is kind


def test_the_reason_names_line_dtype_and_mode():
    clamped, drawn = entries_of(HalfClamp(48, 2), LayerDrop(48, 2))
    line = HalfClamp.forward.__code__.co_firstlineno + 2
    reason = f"its own forward computes clamp (hidden_parts.py:{line}) in float16, which the fused one does not"
    assert clamped.reason == reason and "in training" in drawn.reason


def half_clamped(kind):
    def forward(self, *args, **kwargs):
        out = kind.forward(self, *args, **kwargs)
        return out.clamp(-65504, 65504) if out.dtype == torch.float16 else out

    return type("Clamped", (kind,), {"forward": functools.wraps(kind.forward)(forward)})


def test_every_adapter_is_asked_for_its_fused_forward():
    """A fused forward that fell back to the module's own for fake tensors would contain all of its operations."""
    (final,) = entries_of(half_clamped(FinalLayer)(48, 8))
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1, "num_embeds_ada_norm": 10}
    (block,) = diffusers.DiTTransformer2DModel(**sizes, sample_size=8, in_channels=4).transformer_blocks
    block.__class__, block.ff.__class__ = half_clamped(type(block)), half_clamped(type(block.ff))
    report = ditfast.accelerate(nn.ModuleList([block, FinalLayer(48, 8)]))
    reasons = [entry.reason for entry in (final, *report.skipped)]
    assert len(reasons) == 3 and all(
        reason.startswith("its own forward computes clamp (") for reason in reasons
    )


class ByHand(Attention):
    """Its softmax in other operations, its logits scaled on both sides."""

    def forward(self, x):
        q, k, v = heads(self, x)
        logits = torch.einsum("bhie,bhje->bhij", q * self.scale**0.5, k * self.scale**0.5)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        return self.proj(torch.einsum("bhij,bhje->bihe", weights, v).flatten(2))


class Upcast(Block):
    """In fp32 between its branches, its modulation cut in another way."""

    def forward(self, x, c):
        parts = self.adaLN_modulation(c).unflatten(1, (6, -1)).float()
        shift1, scale1, gate1, shift2, scale2, gate2 = (parts[:, i, None] for i in range(6))
        stream = x.float()
        branch = self.attn((self.norm1(stream) * (1 + scale1) + shift1).to(x.dtype)).float()
        stream = torch.add(stream, gate1 * branch)
        h = self.norm2(stream) * (1 + scale2) + shift2
        return (stream + gate2 * self.mlp(h.to(x.dtype))).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
def test_equivalent_operations_stay_accelerated(dtype):
    slow = [ByHand(48, 2), Upcast(48, 2), Attention(48, 2, fused_attn=False), Block(48, 2), FinalLayer(48, 8)]
    slow += [Block(48, 2, drop_path=DropPath(0.1)), Attention(48, 2, attn_drop=0.1)]
    fast = [copy.deepcopy(module).to(dtype) for module in slow]
    for entry in entries_of(*fast):
        assert (entry.status, entry.note) == ("accelerated", "")


def test_untraceable_forwards_are_noted_and_compared_in_numbers():
    class Printed(Block):
        def forward(self, x, c):
            c.detach().numpy()
            return super().forward(x, c)

    class Another(Printed):
        def forward(self, x, c):
            return 1.01 * super().forward(x, c)

    report = ditfast.accelerate(nn.ModuleList([Printed(48, 2), Another(48, 2)]))
    accepted, refused = (next(entry for entry in report.entries if entry.module == i) for i in "01")
    assert accepted.status == "accelerated" and accepted.note.startswith("not traced with symbolic sizes: ")
    assert refused.reason.startswith("its forward is another function in inference")
    assert accepted.note in str(report)


GUARD = False


class ByAGlobal(Block):
    def forward(self, x, c):
        out = super().forward(x, c)
        return out.clamp(-1e6, 1e6) if GUARD and out.dtype == torch.float16 else out


def test_cached_findings_are_checked_again(monkeypatch):
    """Findings are cached by class and settings; a global may have changed since."""
    for guarded in (False, True, False):
        monkeypatch.setitem(globals(), "GUARD", guarded)
        (entry,) = entries_of(ByAGlobal(48, 2))
        assert (entry.status == "skipped") == guarded
    monkeypatch.setattr(trace, "_differences", None)  # nothing is traced at length any more
    assert entries_of(ByAGlobal(48, 2))[0].status == "accelerated"


def test_the_trace_leaves_no_state_behind():
    methods = [torch.SymBool.__bool__, torch.SymInt.__index__, torch.SymInt.__int__, torch.SymFloat.__float__]
    states = random.getstate(), str(numpy.random.get_state())
    window.cache_clear()
    state = [copy.copy(WINDOWS), SharedWindow.mask, Counting.steps, GENERATOR.getstate()]
    # a size that one trace compares is unconstrained in the next
    for kind in (
        LongSoftcap,
        CachedWindow,
        GlobalWindow,
        SharedWindow,
        FirstWindow,
        Counting,
        GlobalDrop,
        NumpysDrop,
        LongSoftcap,
    ):
        assert entries_of(kind(48, 2))[0].status == "skipped"
    assert entries_of(Block(48, 2))[0].status == "accelerated"
    assert [
        torch.SymBool.__bool__,
        torch.SymInt.__index__,
        torch.SymInt.__int__,
        torch.SymFloat.__float__,
    ] == methods
    assert (random.getstate(), str(numpy.random.get_state())) == states
    assert [WINDOWS, SharedWindow.mask, Counting.steps, GENERATOR.getstate()] == state
    assert type(window(4099, 4096)) is torch.Tensor and not hasattr(FirstWindow, "first")


# --- adapters of one's own


class SquaredRelu(nn.Module):
    """By hand, and with a norm by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight
        return x.relu() ** 2


class FastSquaredRelu(nn.Module):
    def forward(self, x):
        x = F.rms_norm(x, (8,), self.weight, 1e-6)
        return x.relu().square()


class Bounded(SquaredRelu):
    def forward(self, x):
        return super().forward(x).clamp(max=1e6)


class Gained(SquaredRelu):
    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(8))

    def forward(self, x):
        return super().forward(x) * self.gain


class SquaredReluAdapter(Adapter):
    name, mixin = "squared relu", FastSquaredRelu

    def recognises(self, module):
        return isinstance(module, SquaredRelu)

    def refuses(self, module):
        return None

    def inputs(self, module, generator):
        return (torch.randn(2, 3, 8, generator=generator),)


def test_registered_adapters_are_checked_alike(monkeypatch):
    monkeypatch.setattr(adapter, "_ADAPTERS", list(adapter._ADAPTERS))
    register_adapter(SquaredReluAdapter())
    same, bounded, gained = entries_of(SquaredRelu(), Bounded(), Gained())
    assert same.status == "accelerated" and bounded.reason.startswith("its own forward computes clamp (")
    assert gained.reason.startswith("its own forward reads the buffer gain (")
