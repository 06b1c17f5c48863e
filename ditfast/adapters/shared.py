"""Models of the official shape: in inference their accelerated blocks and final layer share one launch.

The first layer that a forward calls computes all; others take theirs if they get the same tensor c, not written since.
Not under torch.compile or torch.jit.trace, in inference mode (which counts no writes), or where a layer has hooks
(which may write weights).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import split_modulation
from ..ops.backend import autocast_dtype
from ..ops.modulations import modulations_together
from ..plain import is_plain, is_plain_modulation, parameters_of
from ..reference.transforms import in_trace

# of the model that is being called: its layers; the first condition, its state, and the layers' modulations of it
_call: ContextVar[tuple[list[Any], list[Any]] | None] = ContextVar("ditfast_call", default=None)


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
        layers, shared = _call.get() or ([], [])
        state = c._version, torch._C._is_any_autocast_enabled() and autocast_dtype(c.device.type)
        if not shared and any(self is layer for layer in layers):
            plain = [x.adaLN_modulation for x in layers if is_plain(x, type(x))]
            linears = [modulation[1] for modulation in plain if is_plain_modulation(modulation)]
            parameters = parameters_of(*linears) if len(linears) == len(layers) else None
            packed = None if parameters is None else modulations_together(nn.functional.silu(c), parameters)
            widths = [x.out_features for x in linears]
            parts = split_modulation(packed, widths, [x.modulations for x in layers]) if packed is not None else ()
            shared += [c, state, dict(zip(map(id, layers), parts, strict=False))]
        return shared[2].get(id(self)) if shared and shared[0] is c and shared[1] == state else None


class FastModel(nn.Module):
    """The model's own forward, within which its layers share; for models with two such layers or more."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Not passed on to the model's own class, which may keep a register of its subclasses."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        token = _call.set((sharing_layers(self), []))
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
