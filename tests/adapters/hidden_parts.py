"""Attention and blocks whose differences random inputs do not show, and the reasons reported for them."""

import functools
import math
import random
from types import SimpleNamespace

import numpy
import torch

from tests.adapters.foreign_models import Attention, Block, Mlp


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
    """A window wider than any input of the numerical check."""

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
    """A mask on the class, made anew if it is too small."""

    mask = None

    def forward(self, x):
        q, k, v = heads(self, x)
        tokens = x.shape[1]
        if SharedWindow.mask is None or len(SharedWindow.mask) < tokens:
            SharedWindow.mask = window.__wrapped__(tokens, 4096)
        return attended(self, (q @ k.mT) * self.scale + SharedWindow.mask[:tokens, :tokens].to(q.dtype), v)


class FirstWindow(Attention):
    """A mask on the class from the first call on."""

    def forward(self, x):
        q, k, v = heads(self, x)
        if not hasattr(type(self), "first"):
            type(self).first = torch.zeros(())
        return attended(self, (q @ k.mT) * self.scale + type(self).first.to(q.dtype), v)


class KeptWindow(Attention):
    """A tensor in a dict instead of a buffer."""

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
    """Computes something else in the early steps of a run."""

    steps = 10**6

    def forward(self, x, c):
        type(self).steps += 1
        out = super().forward(x, c)
        return out / 2 if type(self).steps < 1000 else out


class HalfFactor(Block):
    def forward(self, x, c):
        return super().forward(x, c) * (0.5 if x.dtype == torch.float16 else 1)


class Routed(Block):
    """Drops tokens in training; the share that stays is 1 now."""

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


@torch.library.custom_op("ditfast_tests::plain_linear", mutates_args=())
def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, bias)


@plain_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


class AnothersLinear(torch.nn.Linear):
    """A custom operator, as quantised Linears use."""

    def forward(self, x):
        return plain_linear(x, self.weight, self.bias)


class BehindAnother(Block):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.attn.qkv = AnothersLinear(dim, 3 * dim)

    def forward(self, x, c):
        return super().forward(x, c).clamp(-1e6, 1e6)


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
    """Its gradients are clamped."""

    def forward(self, x, c):
        out = super().forward(x, c)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient.clamp(-1e3, 1e3))
        return out


def scaled(scale):
    """A block whose branches are scaled by a value that a scheduler changes; it is 1 now."""

    class Scaled(Block):
        shared = {"alpha": 1.0}

        def __init__(self, dim, num_heads):
            super().__init__(dim, num_heads)
            self.whole, self.alpha, self.settings, self.config = (
                1,
                1.0,
                {"alpha": 1.0},
                SimpleNamespace(alpha=1.0),
            )

        def forward(self, x, c):
            return scale(self, x, super().forward(x, c))

    return Scaled


SCHEDULE = {"alpha": 1.0}
FOLLOWED = "a number that it reads in each call, which the fused one does not"
ATTENTIONS = {
    Window: "computes arange",
    CachedWindow: "reads a size as a number",
    GlobalWindow: "reads a size as a number",
    SharedWindow: "computes arange",
    FirstWindow: "computes zeros",
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
    BehindAnother: "computes clamp",
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
    scaled(lambda self, x, y: y if self.shared["alpha"] == 1 else y / 2): f"goes by shared.alpha, {FOLLOWED}",
    scaled(lambda self, x, y: x + (y - x) * SCHEDULE["alpha"]): "multiplies by 1.0",
    scaled(lambda self, x, y: torch.lerp(x, y, self.config.alpha)): "interpolates by 1.0",
    scaled(
        lambda self, x, y: y if self.config.alpha == 1 else y * self.config.alpha
    ): f"goes by config.alpha, {FOLLOWED}",
}
