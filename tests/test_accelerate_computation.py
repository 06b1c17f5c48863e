"""What random numbers do not show of a forward: refused, and named, by what it computes."""

import copy
import functools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from foreign_models import Attention, Block, DropPath, FinalLayer, Mlp
from torch import nn

import ditfast
from ditfast.adapters import Adapter, _adapter, _trace, register_adapter


def heads(self, x):
    b, t, d = x.shape
    return self.qkv(x).reshape(b, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)


def attended(self, logits, v):
    b, h, t, e = v.shape
    return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(b, t, h * e))


@functools.cache
def window(tokens, width):
    i = torch.arange(tokens)
    return ((i[:, None] - i).abs() >= width) * -1e9


# --- attention


class Window(Attention):
    """Wider than anything that the check looks at in numbers."""

    def forward(self, x):
        q, k, v = heads(self, x)
        i = torch.arange(x.shape[1], device=x.device)
        mask = ((i[:, None] - i).abs() >= 4096) * -1e9
        return attended(self, (q @ k.mT) * self.scale + mask.to(q.dtype), v)


class CachedWindow(Attention):
    def forward(self, x):
        q, k, v = heads(self, x)
        return attended(self, (q @ k.mT) * self.scale + window(int(x.shape[1]), 4096).to(q.dtype), v)


WINDOWS = {}


class GlobalWindow(Attention):
    def forward(self, x):
        q, k, v = heads(self, x)
        tokens = int(x.shape[1])
        if tokens not in WINDOWS:
            WINDOWS[tokens] = window.__wrapped__(tokens, 4096)
        return attended(self, (q @ k.mT) * self.scale + WINDOWS[tokens].to(q.dtype), v)


class SharedWindow(Attention):
    """On the class, and made anew where it is too small."""

    mask = None

    def forward(self, x):
        q, k, v = heads(self, x)
        tokens = x.shape[1]
        if SharedWindow.mask is None or len(SharedWindow.mask) < tokens:
            SharedWindow.mask = window.__wrapped__(tokens, 4096)
        return attended(self, (q @ k.mT) * self.scale + SharedWindow.mask[:tokens, :tokens].to(q.dtype), v)


class KeptWindow(Attention):
    """A buffer by another name: a tensor in a dict."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.masks = {"window": torch.zeros(())}

    def forward(self, x):
        q, k, v = heads(self, x)
        return attended(self, (q @ k.mT) * self.scale + self.masks["window"].to(q.dtype), v)


class Softcap(Attention):
    def forward(self, x):
        q, k, v = heads(self, x)
        return attended(self, 500 * torch.tanh(q @ k.mT * (self.scale / 500)), v)


class LongSoftcap(Attention):
    def forward(self, x):
        q, k, v = heads(self, x)
        logits = (q @ k.mT) * self.scale
        return attended(self, 50 * torch.tanh(logits / 50) if x.shape[1] > 4096 else logits, v)


class LongScale(Attention):
    def forward(self, x):
        q, k, v = heads(self, x)
        return attended(self, (q @ k.mT) * self.scale * max(1.0, math.log(x.shape[1], 4096)), v)


class Temperature(Attention):
    temperature = 1.0

    def forward(self, x):
        q, k, v = heads(self, x)
        return attended(self, (q @ k.mT) * self.scale / self.temperature, v)


class Guarded(Attention):
    def forward(self, x):
        return torch.nan_to_num(super().forward(x))


# --- blocks


class LayerDrop(Block):
    def forward(self, x, c):
        return x if self.training and torch.rand(1).item() < 0.1 else super().forward(x, c)


class PythonsDrop(Block):
    def forward(self, x, c):
        return x if self.training and random.random() < 1e-9 else super().forward(x, c)


class NumpysDrop(Block):
    def forward(self, x, c):
        return x if numpy.random.rand() < 1e-9 else super().forward(x, c)


class OwnDrop(Block):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.generator = numpy.random.default_rng(0)

    def forward(self, x, c):
        return x if self.generator.random() < 1e-9 else super().forward(x, c)


GENERATOR = random.Random(0)


class GlobalDrop(Block):
    def forward(self, x, c):
        return x if GENERATOR.random() < 1e-9 else super().forward(x, c)


class Counting(Block):
    """In early steps of a run it does something else."""

    steps = 10**6

    def forward(self, x, c):
        type(self).steps += 1
        out = super().forward(x, c)
        return out / 2 if type(self).steps < 1000 else out


class HalfFactor(Block):
    def forward(self, x, c):
        return super().forward(x, c) * (0.5 if x.dtype == torch.float16 else 1)


class Routed(Block):
    """Fewer tokens in training, by a share that is all of them now."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.keep = 1.0

    def forward(self, x, c):
        return super().forward(x[:, :1] if self.training and self.keep < 1 else x, c)


class NoAutocast(Block):
    def forward(self, x, c):
        with torch.autocast("cuda", enabled=False):
            return super().forward(x, c)


class HalfClamp(Block):
    def forward(self, x, c):
        out = super().forward(x, c)
        return out.clamp(-65504, 65504) if out.dtype == torch.float16 else out


class AutocastClamp(Mlp):
    def forward(self, x):
        out = super().forward(x)
        return out.clamp(-65504, 65504) if out.dtype == torch.float16 and x.dtype == torch.float32 else out


class LargeInputs(Block):
    def forward(self, x, c):
        return super().forward(x / 2 if x.abs().max() > 1e6 else x, c)


class OneSample(Block):
    def forward(self, x, c):
        return super().forward(x, c.detach() if len(x) == 1 else c)


class Shortened(Block):
    def forward(self, x, c):
        return super().forward(x[:, :2048], c)


class Clipping(Block):
    """Its gradients are."""

    def forward(self, x, c):
        out = super().forward(x, c)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient.clamp(-1e3, 1e3))
        return out


def scaled(read):
    """A block whose branches are scaled by what a scheduler changes; 1 now."""

    class Scaled(Block):
        def __init__(self, dim, num_heads):
            super().__init__(dim, num_heads)
            self.whole, self.alpha, self.settings, self.config = (
                1,
                1.0,
                {"alpha": 1.0},
                SimpleNamespace(alpha=1.0),
            )

        def forward(self, x, c):
            return read(self, x, super().forward(x, c))

    return Scaled


SCHEDULE = {"alpha": 1.0}
FOLLOWED = "a number that it reads in each call, which the fused one does not"
ATTENTIONS = {
    Window: "computes arange",
    CachedWindow: "reads a size as a number",
    GlobalWindow: "reads a size as a number",
    SharedWindow: "reads a size as a number",
    KeptWindow: "reads masks.window, a tensor that is no parameter",
    Softcap: "computes tanh",
    LongSoftcap: "compares a size",
    LongScale: "reads a size as a number",
    Temperature: "divides by 1.0",
    Guarded: "computes nan_to_num",
}
BLOCKS = {
    LayerDrop: "draws random numbers (rand)",
    PythonsDrop: "draws from Python's random numbers in training",
    NumpysDrop: "draws from NumPy's random numbers in inference",
    OwnDrop: "writes generator",
    GlobalDrop: "writes Random",
    Counting: "writes Counting.steps",
    HalfFactor: "multiplies by 1",
    Routed: f"goes by keep, {FOLLOWED}",
    NoAutocast: "keeps autocast out on cuda",
    HalfClamp: "computes clamp",
    LargeInputs: "computes abs",
    OneSample: "reads a size as a number",
    Shortened: "computes slice",
    Clipping: "computes clamp in the backward",
    scaled(lambda self, x, y: x + self.alpha * (y - x)): "multiplies by 1.0",
    scaled(
        lambda self, x, y: y if self.alpha == 1 else x + self.alpha * (y - x)
    ): f"goes by alpha, {FOLLOWED}",
    scaled(
        lambda self, x, y: torch.add(x, y - x, alpha=self.settings["alpha"])
    ): f"goes by settings.alpha, {FOLLOWED}",
    scaled(lambda self, x, y: x + (y - x) * SCHEDULE["alpha"]): "multiplies by 1.0",
    scaled(lambda self, x, y: torch.lerp(x, y, self.config.alpha)): "interpolates by 1.0",
    scaled(
        lambda self, x, y: y if self.config.alpha == 1 else y * self.config.alpha
    ): f"goes by config.alpha, {FOLLOWED}",
}


def entries_of(*modules):
    """What stands in the report of each, beside a part that is always accelerated."""
    report = ditfast.accelerate(nn.ModuleList([*modules, Mlp(48, 96)]))
    return [next(entry for entry in report.entries if entry.module == str(i)) for i in range(len(modules))]


@pytest.mark.parametrize(
    ("kind", "reason"), [*ATTENTIONS.items(), *BLOCKS.items(), (AutocastClamp, "computes clamp")]
)
def test_what_hides_from_numbers_is_named(kind, reason):
    module = kind(48, 96) if issubclass(kind, Mlp) else kind(48, 2)
    (entry,) = entries_of(module)
    assert entry.status == "skipped" and entry.reason.startswith(f"its own forward {reason}"), entry.reason
    assert type(module) is kind


def test_where_and_when_it_does_so():
    clamped, drawn = entries_of(HalfClamp(48, 2), LayerDrop(48, 2))
    line = HalfClamp.forward.__code__.co_firstlineno + 2
    said = f"its own forward computes clamp ({Path(__file__).name}:{line}) in float16, which the fused one does not"
    assert clamped.reason == said and "in training" in drawn.reason


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_by_hand_stays_accelerated(dtype):
    slow = [ByHand(48, 2), Upcast(48, 2), Attention(48, 2, fused_attn=False), Block(48, 2), FinalLayer(48, 8)]
    slow += [Block(48, 2, drop_path=DropPath(0.1)), Attention(48, 2, attn_drop=0.1)]
    fast = [copy.deepcopy(module).to(dtype) for module in slow]
    for entry in entries_of(*fast):
        assert (entry.status, entry.note) == ("accelerated", "")


def test_what_a_trace_cannot_tell_is_said_and_numbers_decide():
    class Printed(Block):
        def forward(self, x, c):
            c.detach().numpy()
            return super().forward(x, c)

    class Another(Printed):
        def forward(self, x, c):
            return 1.01 * super().forward(x, c)

    report = ditfast.accelerate(nn.ModuleList([Printed(48, 2), Another(48, 2)]))
    told, refused = (next(entry for entry in report.entries if entry.module == i) for i in "01")
    assert told.status == "accelerated" and told.note.startswith("not traced with symbolic sizes: ")
    assert refused.reason.startswith("its forward is another function in inference")
    assert told.note in str(report)


GUARD = False


class ByAGlobal(Block):
    def forward(self, x, c):
        out = super().forward(x, c)
        return out.clamp(-1e6, 1e6) if GUARD else out


def test_what_was_found_before_is_looked_at_again(monkeypatch):
    """A process keeps what it found of a class and its settings; a global may have changed since."""
    for guarded in (False, True, False):
        monkeypatch.setitem(globals(), "GUARD", guarded)
        (entry,) = entries_of(ByAGlobal(48, 2))
        assert (entry.status == "skipped") == guarded
    monkeypatch.setattr(_trace, "_differences", None)  # nothing is traced at length any more
    assert entries_of(ByAGlobal(48, 2))[0].status == "accelerated"


def test_nothing_of_it_is_left_behind():
    methods = [torch.SymBool.__bool__, torch.SymInt.__index__, torch.SymInt.__int__, torch.SymFloat.__float__]
    states = random.getstate(), str(numpy.random.get_state())
    window.cache_clear()
    kept = [copy.copy(WINDOWS), SharedWindow.mask, Counting.steps, GENERATOR.getstate()]
    # a size that one compares is free again for the next
    for kind in (
        LongSoftcap,
        CachedWindow,
        GlobalWindow,
        SharedWindow,
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
    assert [WINDOWS, SharedWindow.mask, Counting.steps, GENERATOR.getstate()] == kept
    assert type(window(4099, 4096)) is torch.Tensor


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


class SquaredReluAdapter(Adapter):
    name, mixin = "squared relu", FastSquaredRelu

    def recognises(self, module):
        return isinstance(module, SquaredRelu)

    def refuses(self, module):
        return None

    def inputs(self, module, generator):
        return (torch.randn(2, 3, 8, generator=generator),)


def test_adapters_of_ones_own_are_looked_at_alike(monkeypatch):
    monkeypatch.setattr(_adapter, "_ADAPTERS", list(_adapter._ADAPTERS))
    register_adapter(SquaredReluAdapter())
    same, bounded = entries_of(SquaredRelu(), Bounded())
    assert same.status == "accelerated" and bounded.reason.startswith("its own forward computes clamp (")
