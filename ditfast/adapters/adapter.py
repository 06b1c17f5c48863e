"""What an adapter is: how a kind of module is recognised, when it is refused, and the forward it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Adapter(ABC):
    """One kind of foreign module.

    Attributes:
        name: of the adapter, in reports.
        mixin: a class with another ``forward``. A matched module's class becomes a subclass of (mixin, its own class):
            ``super().forward`` is the module's own, to be called where the fused one does not apply.
    """

    name: str
    mixin: type[nn.Module]

    @abstractmethod
    def recognises(self, module: nn.Module) -> bool:
        """Whether its structure is of this kind: the report will list it, accelerated or with a reason."""

    @abstractmethod
    def refuses(self, module: nn.Module) -> str | None:
        """Why the mixin's forward would not be this module's, as far as its structure tells, or None."""

    @abstractmethod
    def inputs(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...] | None:
        """Small random arguments for the module's forward, on the CPU: two samples or more, odd lengths.

        Floating-point tensors are fp32 and get the module's dtype. Keyword arguments come in a dict at the end,
        after one positional argument or more. None where the mixin calls the module's own forward in every case,
        so that there is nothing to compare.
        """


_ADAPTERS: list[Adapter] = []


def register_adapter(adapter: Adapter) -> None:
    """Makes ``ditfast.accelerate`` ask this adapter too, before those registered earlier.

    Raises:
        TypeError: not an Adapter, or its mixin is no subclass of torch.nn.Module.
        ValueError: its name is taken, or it has a ``level`` other than "block": levels were removed.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be a ditfast.adapters.Adapter, got {type(adapter).__name__}")
    if not (isinstance(getattr(adapter, "mixin", None), type) and issubclass(adapter.mixin, nn.Module)):
        raise TypeError(f"adapter.mixin must be a subclass of torch.nn.Module, got {getattr(adapter, 'mixin', None)!r}")
    level = getattr(adapter, "level", "block")
    if level != "block":
        raise ValueError(f"adapter.level is {level!r}: no levels any more, every adapter is asked; leave it out")
    if any(known.name == adapter.name for known in _ADAPTERS):
        raise ValueError(f"an adapter named {adapter.name!r} is registered already")
    _ADAPTERS.insert(0, adapter)


def registered() -> tuple[Adapter, ...]:
    """The adapters in the order in which they are asked."""
    return tuple(_ADAPTERS)


def tokens(width: int, generator: torch.Generator, length: int = 9) -> Tensor:
    """(3, length, width) random tokens."""
    return torch.randn(3, length, width, generator=generator)
