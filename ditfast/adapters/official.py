"""Blocks and final layers in the official release's style: DiT, fast-DiT, SiT, REPA and their forks.

Whatever its class is called, a block has ``norm1``, ``attn``, ``norm2``, ``mlp`` and ``adaLN_modulation`` in the roles
of the paper (section 3.2, "adaLN-Zero block"); its attention and MLP are called as modules, and fused further where
they are accelerated themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._model_blocks import AdaLNForward, Pending, add_and_norm, promoted
from ._adapter import Adapter, is_plain_norm, is_quiet, plain_norm, tokens, unknown_parts
from ._shared_modulation import modulation

_BLOCK = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
_FINAL = ("norm_final", "linear", "adaLN_modulation")


class FastBlock(AdaLNForward):
    """The adaLN-Zero block; with further arguments, a live drop path or changed norms the module's own forward."""

    modulations = 6

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # the module's own names may be others; what is left at None says nothing
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if not _are_tokens_and_condition(*given) or not self._applies():
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        x, c = given
        x, branch, gate, _, _ = self.fused(x, None, None, None, c, False, modulation(self, c))
        assert branch is not None and gate is not None
        return ops.gated_residual(*promoted(x, branch, gate))

    def _applies(self) -> bool:
        return is_plain_norm(self.norm1) and is_plain_norm(self.norm2) and is_quiet(self, *_BLOCK)


class OfficialBlock(Adapter):
    """A block of the official release or in its style."""

    name = "official block"
    mixin = FastBlock

    def recognises(self, module: nn.Module) -> bool:
        return all(isinstance(module._modules.get(name), nn.Module) for name in _BLOCK)

    def refuses(self, module: nn.Module) -> str | None:
        reason = plain_norm("norm1", module.norm1) or plain_norm("norm2", module.norm2)
        return reason or modulation_reason(module, _width(module.norm1), 6) or unknown_parts(module, *_BLOCK)

    def inputs(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        x = tokens(_width(module.norm1), generator)
        return x, torch.randn(len(x), modulation_linear(module).in_features, generator=generator)


class FastFinalLayer(nn.Module):
    """linear(LN(x) * (1 + scale) + shift)."""

    norm_final: nn.LayerNorm
    linear: nn.Module
    adaLN_modulation: nn.Sequential

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = (*args, *kwargs.values())
        if not (_are_tokens_and_condition(*given) and is_plain_norm(self.norm_final) and is_quiet(self, *_FINAL)):
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        x, c = given
        both = modulation(self, c)
        shift, scale = (self.adaLN_modulation(c) if both is None else both).chunk(2, dim=-1)
        _, h = add_and_norm(x, Pending(), shift, scale, self.norm_final.eps)
        out: Tensor = self.linear(h)
        return out


class OfficialFinalLayer(Adapter):
    """The final layer of the official release or in its style."""

    name = "official final layer"
    mixin = FastFinalLayer

    def recognises(self, module: nn.Module) -> bool:
        return all(isinstance(module._modules.get(name), nn.Module) for name in _FINAL)

    def refuses(self, module: nn.Module) -> str | None:
        reason = plain_norm("norm_final", module.norm_final)
        return reason or modulation_reason(module, _width(module.norm_final), 2) or unknown_parts(module, *_FINAL)

    def inputs(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        x = tokens(_width(module.norm_final), generator)
        return x, torch.randn(len(x), modulation_linear(module).in_features, generator=generator)


def _are_tokens_and_condition(*given: Any) -> bool:
    """Whether a call is with x (B, T, D) and c (B, D) alone: a condition for all samples is broadcast elsewhere."""
    if len(given) != 2 or not all(isinstance(value, Tensor) for value in given):
        return False
    x, c = given
    # not len(), which torch.export takes for a constant
    return bool(x.ndim == 3 and c.ndim == 2 and x.shape[0] == c.shape[0])


def modulation_reason(module: nn.Module, width: int, parts: int) -> str | None:
    """Why adaLN_modulation does not end in a Linear of ``parts`` * width features, or None."""
    layers: Any = module.adaLN_modulation
    if not isinstance(layers, nn.Sequential) or not len(layers) or not hasattr(layers[-1], "out_features"):
        return f"adaLN_modulation must be a Sequential that ends in a Linear, got {type(layers).__name__}"
    found = layers[-1].out_features
    return None if found == parts * width else f"adaLN_modulation must give {parts} x {width} features, got {found}"


def modulation_linear(module: nn.Module) -> Any:
    """The Linear that gives a block its modulation."""
    layers: Any = module.adaLN_modulation
    return layers[-1]


def _width(norm: Any) -> int:
    return int(norm.normalized_shape[0])
