"""All adaLN Linears of a foreign model as one GEMM: its blocks and final layer hand their condition to each other.

Within a :func:`sharing` block the first layer that asks computes the modulations of all, and those called with the
same condition take theirs. A layer keeps to its own Linear where anything is not as it was found then: another
condition, one written in place, autocast switched, gradients wanted. What cannot be seen is a condition written in
place between blocks under ``torch.inference_mode``, whose tensors count no versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._model_blocks import is_plain_modulation
from .._model_cache import ModulationCache
from ..ops._backend import autocast_dtype

# beside the models, not in them: copies, pickles and restored models carry nothing
_caches: WeakKeyDictionary[nn.Module, ModulationCache] = WeakKeyDictionary()


class _Shared:
    """The layers that share, and the modulations of the first condition that one of them asked for."""

    def __init__(self, cache: ModulationCache, layers: list[nn.Module]) -> None:
        self.cache = cache
        self.layers = layers
        self.members = frozenset(map(id, layers))
        self.c: Tensor | None = None
        self.made_from: tuple[Any, ...] = ()
        self.found: dict[int, Tensor] = {}

    def modulation(self, layer: nn.Module, c: Tensor) -> Tensor | None:
        if id(layer) not in self.members:
            return None  # accelerated too, but elsewhere in the model, perhaps of another width
        if self.c is None:
            self.c, self.made_from, self.found = c, _state(c), self._all(c)
        if c is not self.c or _state(c) != self.made_from:
            return None
        found = self.found.get(id(layer))
        return None if found is None or _wants_gradient(layer, c) else found

    def _all(self, c: Tensor) -> dict[int, Tensor]:
        modulations: list[Any] = [layer.adaLN_modulation for layer in self.layers]
        if not all(map(is_plain_modulation, modulations)):
            return {}
        linears = [modulation[1] for modulation in modulations]
        # an own Linear would raise on another dtype
        if any(_wants_gradient(layer, c) for layer in self.layers) or not _multiplies(c, linears[0].weight):
            return {}
        found = self.cache.modulations(linears, F.silu(c))
        return dict(zip(map(id, self.layers), found, strict=True)) if found else {}


_current: ContextVar[_Shared | None] = ContextVar("ditfast_shared_modulation", default=None)


def modulation(layer: nn.Module, c: Tensor) -> Tensor | None:
    """``layer.adaLN_modulation(c)`` (B, N) where it was computed with the others', else None."""
    shared = None if torch.compiler.is_compiling() else _current.get()
    return None if shared is None else shared.modulation(layer, c)


@contextmanager
def sharing(model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """The layers share their modulations within the block."""
    cache = _caches.get(model)
    if cache is None:
        cache = _caches[model] = ModulationCache()
    token = _current.set(_Shared(cache, layers))
    try:
        yield
    finally:
        _current.reset(token)


def forget(model: nn.Module) -> None:
    """Drops the concatenated weights."""
    _caches.pop(model, None)


def _state(c: Tensor) -> tuple[Any, ...]:
    return None if c.is_inference() else c._version, autocast_dtype(c.device.type)


def _multiplies(c: Tensor, weight: Tensor) -> bool:
    return c.dtype == weight.dtype or autocast_dtype(c.device.type) is not None


def _wants_gradient(layer: nn.Module, c: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    linear: Any = layer.adaLN_modulation[-1]  # type: ignore[index]
    return c.requires_grad or any(parameter.requires_grad for parameter in linear.parameters())
