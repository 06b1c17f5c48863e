"""Models of the official shape: in inference their accelerated blocks and final layer share launches.

The first layer that a forward calls computes all modulations; others take theirs if they get the same tensor c, not
written since. A block's last gate and the next layer's norm are one launch: the next one takes its norm if it gets the
block's output itself, not written since.
Not under torch.compile or torch.jit.trace, in inference mode (which counts no writes), or where a layer has hooks
(which may write weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.blocks import split_modulation
from ..ops.backend import autocast_dtype
from ..ops.block import Ahead
from ..ops.modulations import modulations_together
from ..plain import are_plain_modulations, is_plain, is_plain_norm, parameters_of
from ..reference.transforms import in_trace


class Shared(NamedTuple):
    """What a layer is given by its model's call.

    Attributes:
        parts: of its modulation, (B, D) each.
        ahead: what the block before has computed of its input for it.
        following: shift, scale and eps of the norm of the layer after it.
    """

    parts: tuple[Tensor, ...]
    ahead: Ahead | None
    following: tuple[Tensor, Tensor, float] | None


@dataclass
class _Call:
    """A call of a model.

    Attributes:
        layers: of the model, in order.
        places: of the layers, by their id.
        condition, state: of the first layer that was called.
        modulations: of the layers, in order, or none.
        left: for which layer a block has left something, what it returned, its version then, and what it left.
    """

    layers: list[Any]
    places: dict[int, int]
    condition: Tensor | None = None
    state: tuple[Any, ...] = ()
    modulations: list[tuple[Tensor, ...]] = field(default_factory=list)
    left: tuple[Any, Tensor, int, Ahead] | None = None


# of the model that is being called
_call: ContextVar[_Call | None] = ContextVar("ditfast_call", default=None)


class SharesModulations(nn.Module):
    """Mixin of a layer that takes part in its model's launches.

    Attributes:
        modulations: the parts of its modulation, each as wide as the model.
        first_norm: the name of the norm that it begins with.
    """

    modulations: int
    first_norm: str

    def shared_with_model(self, x: Tensor, c: Tensor) -> Shared | None:
        """For an input x and a condition c; None where it runs its own Linear."""
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
        left, call.left = call.left, None
        known = left is not None and left[0] is self and left[1] is x and left[2] == x._version
        following = None
        if index + 1 < len(call.layers):
            norm = call.layers[index + 1]._modules[call.layers[index + 1].first_norm]
            shift, scale = call.modulations[index + 1][:2]
            following = (shift, scale, norm.eps) if is_plain_norm(norm) else None
        return Shared(call.modulations[index], left[3] if known and left is not None else None, following)

    def leave_for_next(self, out: Tensor, ahead: Ahead | None) -> None:
        """Leaves the next layer, if that is called with this layer's output, what was computed with it."""
        call = _call.get()
        if call is not None and ahead is not None:
            call.left = call.layers[call.places[id(self)] + 1], out, out._version, ahead


def _modulations_of(layers: Sequence[Any], c: Tensor) -> list[tuple[Tensor, ...]]:
    """The parts of each layer's modulation in one launch; none where each runs its own Linear."""
    modulations = [layer._modules["adaLN_modulation"] for layer in layers if is_plain(layer, type(layer))]
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
