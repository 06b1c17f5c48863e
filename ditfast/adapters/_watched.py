"""Whole models that keep something made from their parameters: who may be about to write to those is noticed.

Writes through ``parameter.data`` leave no trace in a parameter. But who comes to a parameter comes by the model: walks
over its modules, or asks it for the part that the parameter is in. What is missed are references taken earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import nn

# the models whose forward runs here, which ask themselves for their parts
_running: ContextVar[tuple[int, ...]] = ContextVar("ditfast_running", default=())


class Watched(nn.Module):
    """Mixin of such a model."""

    _forget: ClassVar[Callable[[nn.Module], None]]  # drops what was made
    _parts: ClassVar[tuple[str, ...]]  # the children with the parameters that it was made from

    def __getattr__(self, name: str) -> Any:
        if name in type(self)._parts and not torch.compiler.is_compiling() and id(self) not in _running.get():
            type(self)._forget(self)
        return super().__getattr__(name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        # so begins every walk over the parameters, also from outside the model
        type(self)._forget(self)
        yield from super().named_modules(*args, **kwargs)

    def unswapped(self) -> None:
        type(self)._forget(self)

    def train(self, mode: bool = True) -> Any:
        type(self)._forget(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        type(self)._forget(self)  # which holds the storages
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Within a model's own forward, where nobody writes to its parameters."""
    token = _running.set((*_running.get(), id(model)))
    try:
        yield
    finally:
        _running.reset(token)
