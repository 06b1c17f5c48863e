"""timm's Attention and Mlp, and the many modules written after them: recognised by names and roles."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import GeluMlp, PackedAttention
from ..plain import has_hooks, is_identity, is_plain, others_are_identities, unknown_part
from .adapter import Adapter, tokens

_ATTENTION = ("qkv", "proj")
_MLP = ("fc1", "act", "fc2")
# in the names of arguments that bring rotations of queries and keys
_ROTATIONS = ("rope", "rotary", "freqs")


class FastAttention(PackedAttention):
    """proj(self_attention(qkv(x))); with a mask, a live dropout or normalised queries and keys the module's own."""

    scale: float

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # timm's blocks pass is_causal=False on; the module's own forward may name the others otherwise
        values = [value for name, value in kwargs.items() if name != "is_causal" or value is not False]
        x, *others = (*args, *values, None)
        unknown = any(value is not None for value in others)
        if unknown or not isinstance(x, Tensor) or x.ndim != 3 or not self.fuses():
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        return self.fused(x)

    def fuses(self) -> bool:
        return others_are_identities(self, *_ATTENTION)

    def softmax_scale(self) -> float | None:
        scale = getattr(self, "scale", None)
        return float(scale) if isinstance(scale, (int, float)) else None


class TimmAttention(Adapter):
    """timm's ``Attention``, of old and current versions, and hand-written ones with its names.

    qkv and proj are called as modules, whatever they are: wrapped ones (LoRA) are honoured.
    """

    name = "timm attention"
    mixin = FastAttention

    def recognises(self, module: nn.Module) -> bool:
        return _has_children(module, *_ATTENTION) and hasattr(module, "num_heads")

    def refuses(self, module: nn.Module) -> str | None:
        heads: Any = module.num_heads
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            return f"num_heads must be a positive int, got {heads!r}"
        for name in ("q_norm", "k_norm"):
            norm = module._modules.get(name)
            if norm is not None and has_hooks(norm):
                return f"{name} has hooks, which the fused forward would skip"
            if norm is not None and not is_identity(norm):
                return f"{name} is {type(norm).__name__}: normalised queries and keys are no longer packed"
        packed, width = _features(module.qkv, "out"), _features(module.qkv, "in")
        if packed is None or width is None:
            return f"qkv ({type(module.qkv).__name__}) does not tell its in_features and out_features"
        if packed % (3 * heads):
            return f"qkv must give three equal parts of {heads} heads, got {packed} features"
        for name in inspect.signature(type(module).forward).parameters:
            if any(rotation in name for rotation in _ROTATIONS):
                return f"its forward takes {name}: rotated queries and keys are no longer packed"
        return unknown_part(module, *_ATTENTION)

    def inputs(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        return (tokens(_features(module.qkv, "in") or 0, generator),)


class FastMlp(GeluMlp):
    """fc2(gelu_tanh(fc1(x))); with a live dropout or replaced Linears the module's own forward."""

    act: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = (*args, *kwargs.values())
        out = self.fused(arguments[0]) if len(arguments) == 1 else None
        return super().forward(*args, **kwargs) if out is None else out

    def does_nothing_else(self) -> bool:
        activation = self._modules.get("act")
        plain = is_tanh_gelu(activation) and is_plain(activation, type(activation))  # type: ignore[arg-type]
        return plain and others_are_identities(self, *_MLP)


class TimmMlp(Adapter):
    """timm's ``Mlp`` with the tanh GELU of the official release."""

    name = "timm mlp"
    mixin = FastMlp

    def recognises(self, module: nn.Module) -> bool:
        return _has_children(module, "fc1", "fc2")

    def refuses(self, module: nn.Module) -> str | None:
        activation = module._modules.get("act")
        if activation is not None and has_hooks(activation):
            return "act has hooks, which the fused forward would skip"
        if not is_tanh_gelu(activation):
            actual = "none" if activation is None else " ".join(repr(activation).split())
            return f"its activation is {actual}, the fused one GELU(approximate='tanh')"
        for name in ("fc1", "fc2"):
            if type(module._modules[name]) is not nn.Linear:
                kind = type(module._modules[name])
                return f"{name} is {kind.__module__}.{kind.__name__}, the fused forward reads an nn.Linear's weight"
        outgoing, incoming = _features(module.fc1, "out"), _features(module.fc2, "in")
        if outgoing != incoming:
            return f"fc1 gives {outgoing} features and fc2 takes {incoming}, as in a gated MLP"
        return unknown_part(module, *_MLP)

    def inputs(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        return (tokens(_features(module.fc1, "in") or 0, generator),)


def is_tanh_gelu(module: Any) -> bool:
    """Whether it is torch's tanh GELU or timm's ``GELUTanh``, not a subclass that may do more, and has no hooks."""
    kind = type(module)
    if kind is not nn.GELU:
        return kind.__name__ == "GELUTanh" and kind.__module__.startswith("timm.") and not has_hooks(module)
    return module.approximate == "tanh" and not has_hooks(module)


def _has_children(module: nn.Module, *names: str) -> bool:
    return all(isinstance(module._modules.get(name), nn.Module) for name in names)


def _features(linear: Any, side: str) -> int | None:
    """in_features or out_features of a Linear or what wraps it."""
    value = getattr(linear, f"{side}_features", None)
    return value if isinstance(value, int) else None
