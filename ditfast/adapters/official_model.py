"""Whole models in the official release's shape: ``blocks`` and a ``final_layer`` that one condition modulates.

Asked for with ``accelerate(model, level="model")``: one GEMM for all adaLN Linears in inference, as in
:class:`ditfast.DiT`, at the price of their weights once more (a third of XL/2's).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._adapter import Adapter
from ._shared_modulation import forget, sharing
from ._watched import Watched, running
from .official import FastBlock, FastFinalLayer, OfficialBlock, OfficialFinalLayer, modulation_linear


class FastModel(Watched):
    """The model's own forward, within which its accelerated blocks and final layer share one GEMM in inference.

    The concatenated copy is remade when an adaLN parameter was replaced, moved or written in place, after any
    optimiser's step, and when anybody has asked the model for its layers, modules or parameters since: writes through
    ``parameter.data`` leave no other trace. Those by references taken earlier need ``train()`` or ``eval()``.
    """

    _forget = forget
    _parts = ("blocks", "final_layer")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        layers: list[nn.Module] = [x for x in _layers(self) if isinstance(x, (FastBlock, FastFinalLayer))]
        if torch.is_grad_enabled():
            forget(self)  # somebody may be about to write through .data
        if len(layers) < 2:
            return super().forward(*args, **kwargs)
        with running(self), sharing(self, layers):
            return super().forward(*args, **kwargs)


class OfficialModel(Adapter):
    """A model of the official release or in its shape."""

    name = "official model"
    mixin = FastModel
    level = "model"

    def recognises(self, module: nn.Module) -> bool:
        blocks, final = module._modules.get("blocks"), module._modules.get("final_layer")
        if not isinstance(blocks, nn.ModuleList) or not len(blocks) or final is None:
            return False
        *found, last = _layers(module)
        return all(map(OfficialBlock().recognises, found)) and OfficialFinalLayer().recognises(last)

    def refuses(self, module: nn.Module) -> str | None:
        *blocks, last = _layers(module)
        reasons = [*map(OfficialBlock().refuses, blocks), OfficialFinalLayer().refuses(last)]
        if reasons.count(None) < 2:
            return "fewer than two of its blocks and final layer are accelerated"
        linears = [modulation_linear(layer) for layer in (*blocks, last)]
        widths = {linear.in_features for linear in linears if hasattr(linear, "in_features")}
        if len(widths) > 1:
            return f"its adaLN Linears take conditions of several widths: {', '.join(map(str, sorted(widths)))}"
        return None

    def inputs(self, module: nn.Module, generator: torch.Generator) -> None:
        return None


def _layers(model: nn.Module) -> list[nn.Module]:
    """The blocks and the final layer, without wrappers that checkpoint activations."""
    blocks: Any = model._modules["blocks"]
    final: Any = model._modules["final_layer"]
    found: list[nn.Module] = [*blocks, final]
    return [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in found]
