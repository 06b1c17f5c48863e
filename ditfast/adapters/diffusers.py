"""diffusers' ``BasicTransformerBlock`` with ``norm_type="ada_norm_zero"`` (its DiT's block), and its ``FeedForward``.

Recognised by names and roles; diffusers is not imported. The attention is called as a module: its processor, LoRA
layers and hooks are honoured whatever they are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..plain import (
    are_readable,
    has_hooks,
    is_identity,
    is_plain_norm,
    norm_reason,
    other_children,
    others_are_identities,
    unknown_part,
)
from .adapter import Adapter, tokens

_BLOCK = ("norm1", "attn1", "norm3", "ff")
_NORM1 = ("emb", "silu", "linear", "norm")
# what forward takes by position, in this order: gradient checkpointing passes it so
_ARGUMENTS = (
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "timestep",
    "cross_attention_kwargs",
    "class_labels",
    "added_cond_kwargs",
)


class FastFeedForward(nn.Module):
    """net[2](gelu_tanh(net[0].proj(x))); with a live dropout, replaced Linears or hooks the module's own forward."""

    net: nn.ModuleList

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or feed_forward_reason(self, live=True):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        fc1: Any = self.net[0].proj
        fc2: Any = self.net[2]
        return ops.gelu_mlp(hidden_states, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class DiffusersFeedForward(Adapter):
    """diffusers' ``FeedForward`` with the tanh GELU ("gelu-approximate")."""

    name = "diffusers feed-forward"
    mixin = FastFeedForward

    def recognises(self, module: nn.Module) -> bool:
        net = module._modules.get("net")
        if not isinstance(net, nn.ModuleList) or len(net) < 3:
            return False
        return all(hasattr(linear, "out_features") for linear in (net[0]._modules.get("proj"), net[2]))

    def refuses(self, module: nn.Module) -> str | None:
        return feed_forward_reason(module) or unknown_part(module, "net")

    def inputs(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        net: Any = module.net
        return (tokens(net[0].proj.in_features, generator),)


def feed_forward_reason(module: nn.Module, live: bool = False) -> str | None:
    """Why a feed-forward is not two plain Linears around a tanh GELU, or None.

    ``live``: a dropout that is live now, in training, is a reason too.
    """
    net: Any = module._modules["net"]
    activation = net[0]
    approximate = getattr(activation, "approximate", None)
    if type(activation).__name__ != "GELU" or approximate != "tanh":
        actual = f"{type(activation).__name__}(approximate={approximate!r})"
        return f"its activation is {actual}, the fused one GELU(approximate='tanh')"
    for name, linear in (("net.0.proj", activation.proj), ("net.2", net[2])):
        if type(linear) is not nn.Linear:
            return f"{name} is {type(linear).__name__}, the fused forward reads a Linear's weight"
    if not are_readable(activation.proj, net[2]):
        return "its Linears have hooks or another forward, which the fused one would skip"
    if has_hooks(net) or has_hooks(activation) or "forward" in activation.__dict__:
        return "its activation has hooks or another forward, which the fused one would skip"
    if live:
        return None if others_are_identities(net, "0", "2") else "a dropout is live"
    for name, child in other_children(net, "0", "2").items():
        if not is_identity(child):
            return f"net.{name} ({type(child).__name__}) is not a dropout that nobody listens to"
    return unknown_part(activation, "proj")


class FastTransformerBlock(nn.Module):
    """adaLN-Zero in diffusers' style; with arguments or settings that the paper's block lacks, the module's own."""

    norm_type: str
    norm1: Any
    attn1: nn.Module
    norm3: nn.LayerNorm
    ff: nn.Module
    _chunk_size: int | None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        unknown = (attention_mask, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)
        further = args or kwargs or cross_attention_kwargs or any(value is not None for value in unknown)
        if further or hidden_states.ndim != 3 or not self._applies():
            known = (*unknown[:3], timestep, cross_attention_kwargs, class_labels, added_cond_kwargs)
            return super().forward(hidden_states, *known, *args, **kwargs)  # type: ignore[no-any-return]
        norm1, norm3 = self.norm1, self.norm3
        c = norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = norm1.linear(norm1.silu(c)).chunk(6, dim=1)
        h = ops.layer_norm_modulate(hidden_states, shift1, scale1, norm1.norm.eps)
        branch = self.attn1(h, encoder_hidden_states=None, attention_mask=None)
        x, h = ops.gated_residual_layer_norm_modulate(hidden_states, branch, gate1, shift2, scale2, norm3.eps)
        return ops.gated_residual(x, self.ff(h), gate2)

    def _applies(self) -> bool:
        if self.norm_type != "ada_norm_zero" or self._chunk_size is not None:
            return False
        return norm1_reason(self.norm1) is None and is_plain_norm(self.norm3) and others_are_identities(self, *_BLOCK)


class DiffusersBlock(Adapter):
    """A block of diffusers' ``DiTTransformer2DModel``."""

    name = "diffusers block"
    mixin = FastTransformerBlock

    def recognises(self, module: nn.Module) -> bool:
        roles = all(isinstance(module._modules.get(name), nn.Module) for name in _BLOCK)
        return roles and getattr(module, "norm_type", None) == "ada_norm_zero"

    def refuses(self, module: nn.Module) -> str | None:
        parameters = tuple(inspect.signature(type(module).forward).parameters)[1 : len(_ARGUMENTS) + 1]
        if parameters != _ARGUMENTS:
            return f"its forward takes ({', '.join(parameters)}), not ({', '.join(_ARGUMENTS)})"
        norm1: Any = module.norm1
        norm3: Any = module.norm3
        reason = norm1_reason(norm1) or norm_reason("norm3", norm3) or unknown_part(module, *_BLOCK)
        if reason is not None:
            return reason
        width = norm3.normalized_shape[0]
        features = (norm1.norm.normalized_shape[0], getattr(norm1.linear, "out_features", None))
        if features != (width, 6 * width):
            return f"norm1 must have {width} features and give 6 x {width}, got {features[0]} and {features[1]}"
        if not hasattr(module, "_chunk_size"):
            return "it has no _chunk_size, which the fused forward looks at"
        return None

    def inputs(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        norm1: Any = module.norm1
        x = tokens(norm1.norm.normalized_shape[0], generator)
        classes = norm1.emb.class_embedder.embedding_table.num_embeddings
        labels = torch.randint(0, classes, (len(x),), generator=generator)
        return x, {"timestep": torch.tensor([3, 500, 999]), "class_labels": labels}


def norm1_reason(norm1: Any) -> str | None:
    """Why a block's first norm is not diffusers' AdaLayerNormZero without hooks, or None."""
    if type(norm1).__name__ != "AdaLayerNormZero" or "forward" in norm1.__dict__:
        return f"norm1 is {type(norm1).__name__}, not diffusers' AdaLayerNormZero"
    for name in _NORM1:
        if norm1._modules.get(name) is None:
            return f"norm1 has no {name}"
    if unknown := other_children(norm1, *_NORM1):
        return f"norm1 has {next(iter(unknown))}, which the fused forward does not know"
    if has_hooks(norm1):
        return "norm1 has hooks, which the fused forward would skip"
    return norm_reason("norm1.norm", norm1.norm)
