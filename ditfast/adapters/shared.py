"""Models of the official shape: in inference their accelerated blocks and final layer share one launch.

The first layer that a forward calls computes all; others take theirs if they get the same tensor c, not written since.
Not under torch.compile or torch.jit.trace, in inference mode (which counts no writes), or where a layer has hooks
(which may write weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import split_modulation
from ..ops.backend import autocast_dtype
from ..ops.modulations import modulations_together
from ..plain import are_plain_modulations, child, is_plain, parameters_of
from ..reference.transforms import in_trace


@dataclass
class _Call:
    """A call of a model.

    Attributes:
        layers: of the model, in order.
        places: of the layers, by their id.
        condition, state: of the first layer that was called.
        modulations: of the layers, in order, or none.
    """

    layers: list[Any]
    places: dict[int, int]
    condition: Tensor | None = None
    state: tuple[Any, ...] = ()
    modulations: list[tuple[Tensor, ...]] = field(default_factory=list)


# of the model that is being called
_call: ContextVar[_Call | None] = ContextVar("ditfast_call", default=None)


class SharesModulations(nn.Module):
    """Mixin of a layer that takes its modulation from its model's launch.

    Attributes:
        modulations: the parts of its modulation, each as wide as the model.
    """

    modulations: int

    def shared_modulation(self, c: Tensor) -> tuple[Tensor, ...] | None:
        """Its parts (B, D), or None: it runs its own Linear."""
        if torch.compiler.is_compiling() or in_trace() or torch.is_grad_enabled() or c.is_inference():
            return None
        call = _call.get()
        if call is None:
            return None
        state = c._version, torch._C._is_any_autocast_enabled() and autocast_dtype(c.device.type)
        index = call.places.get(id(self))
        if call.condition is None and index is not None:
            call.condition, call.state = c, state
            call.modulations = _modulations_of(call.layers, c)
        if index is None or not call.modulations or call.condition is not c or call.state != state:
            return None
        return call.modulations[index]


def _modulations_of(layers: Sequence[Any], c: Tensor) -> list[tuple[Tensor, ...]]:
    """The parts of each layer's modulation in one launch; none where each runs its own Linear."""
    modulations = [child(layer, "adaLN_modulation") for layer in layers if is_plain(layer, type(layer))]
    if len(modulations) < len(layers) or not are_plain_modulations(modulations):
        return []
    linears = [modulation[1] for modulation in modulations]
    parameters = parameters_of(*linears)
    packed = None if parameters is None else modulations_together(nn.functional.silu(c), parameters)
    if packed is None:
        return []
    return split_modulation(packed, [x.out_features for x in linears], [layer.modulations for layer in layers])


class FastModel(nn.Module):
    """The model's own forward, within which its layers share; for models with two such layers or more."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Not passed on to the model's own class, which may keep a register of its subclasses."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        layers = sharing_layers(self)
        token = _call.set(_Call(layers, {id(layer): index for index, layer in enumerate(layers)}))
        try:
            return super().forward(*args, **kwargs)
        finally:
            _call.reset(token)


def sharing_layers(model: nn.Module) -> list[nn.Module]:
    """Those of a model's blocks and final layer, without wrappers that checkpoint activations."""
    blocks, final = model._modules.get("blocks"), model._modules.get("final_layer")
    children = [*blocks, final] if isinstance(blocks, nn.ModuleList) else []
    layers = [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in children]
    return [layer for layer in layers if isinstance(layer, SharesModulations)]
