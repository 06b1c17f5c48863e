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
from ..model.blocks import AdaLNForward, Pending, add_and_norm, promoted
from ..ops.inference import infer_block
from ..plain import is_plain_norm, norm_reason, others_are_identities, unknown_part
from ..reference.transforms import in_trace
from .adapter import Adapter, tokens
from .shared import SharesModulations

_BLOCK = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
_FINAL = ("norm_final", "linear", "adaLN_modulation")


class FastBlock(SharesModulations, AdaLNForward):
    """The adaLN-Zero block; with further arguments, a live drop path or changed norms the module's own forward."""

    modulations = 6
    _ditfast_takes: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = _tokens_and_condition(self._ditfast_takes, args, kwargs)
        if arguments is None or not self._applies():
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        x, c = arguments
        modulation = self.shared_modulation(c)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or in_trace()):
            modulation = self.adaLN_modulation(c).chunk(6, dim=1) if modulation is None else modulation
            settings = self.block_settings()
            out = None if settings is None else infer_block(x, modulation, settings)
            if out is not None:
                return out
        x, branch, gate, _, _ = self.fused(x, None, None, None, c if modulation is None else None, False, modulation)
        assert branch is not None and gate is not None
        return ops.gated_residual(*promoted(x, branch, gate))

    def _applies(self) -> bool:
        return is_plain_norm(self.norm1) and is_plain_norm(self.norm2) and others_are_identities(self, *_BLOCK)


class OfficialBlock(Adapter):
    """A block of the official release or in its style."""

    name = "official block"
    mixin = FastBlock

    def recognises(self, module: nn.Module) -> bool:
        return all(isinstance(module._modules.get(name), nn.Module) for name in _BLOCK)

    def refuses(self, module: nn.Module) -> str | None:
        reason = norm_reason("norm1", module.norm1) or norm_reason("norm2", module.norm2)
        return reason or modulation_reason(module, _width(module.norm1), 6) or unknown_part(module, *_BLOCK)

    def inputs(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        x = tokens(_width(module.norm1), generator)
        return x, torch.randn(len(x), modulation_linear(module).in_features, generator=generator)


class FastFinalLayer(SharesModulations):
    """linear(LN(x) * (1 + scale) + shift)."""

    modulations = 2
    norm_final: nn.LayerNorm
    linear: nn.Module
    adaLN_modulation: nn.Sequential
    _ditfast_takes: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = _tokens_and_condition(self._ditfast_takes, args, kwargs)
        if arguments is None or not (is_plain_norm(self.norm_final) and others_are_identities(self, *_FINAL)):
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        x, c = arguments
        modulation = self.shared_modulation(c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1) if modulation is None else modulation
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
        reason = norm_reason("norm_final", module.norm_final)
        return reason or modulation_reason(module, _width(module.norm_final), 2) or unknown_part(module, *_FINAL)

    def inputs(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        x = tokens(_width(module.norm_final), generator)
        return x, torch.randn(len(x), modulation_linear(module).in_features, generator=generator)


def _tokens_and_condition(
    takes: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """x (B, T, D) and c (B, D) of a call with those alone, else None, also for one condition of all samples.

    They are the first two arguments that the module's own forward ``takes``; others that are None do not count.
    """
    if len(args) == 2 and not kwargs:
        x, c = args
    else:
        names = takes[len(args) : 2]
        values = [*args[:2], *(kwargs.get(name) for name in names)]
        further = [*args[2:], *(value for name, value in kwargs.items() if name not in names)]
        if len(values) != 2 or any(value is not None for value in further):
            return None
        x, c = values
    if not isinstance(x, Tensor) or not isinstance(c, Tensor):
        return None
    # not len(), which torch.export takes for a constant
    return (x, c) if x.ndim == 3 and c.ndim == 2 and x.shape[0] == c.shape[0] else None


def modulation_reason(module: nn.Module, width: int, parts: int) -> str | None:
    """Why adaLN_modulation does not end in a Linear of ``parts`` * width features, or None."""
    layers: Any = module.adaLN_modulation
    if not isinstance(layers, nn.Sequential) or not len(layers) or not hasattr(layers[-1], "out_features"):
        return f"adaLN_modulation must be a Sequential that ends in a Linear, got {type(layers).__name__}"
    features = layers[-1].out_features
    if features == parts * width:
        return None
    return f"adaLN_modulation must give {parts} x {width} features, got {features}"


def modulation_linear(module: nn.Module) -> Any:
    """The Linear that gives a block its modulation."""
    layers: Any = module.adaLN_modulation
    return layers[-1]


def _width(norm: Any) -> int:
    return int(norm.normalized_shape[0])
