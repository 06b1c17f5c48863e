"""What an adapter is: how a kind of module is recognised, when it is refused, and the forward it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import is_plain


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
        """Whether it is of this kind by its structure: it will stand in the report, accelerated or with a reason."""

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
    """Has ``ditfast.accelerate`` ask this adapter too, before those registered earlier.

    Raises:
        TypeError: not an Adapter, or its mixin is no subclass of torch.nn.Module.
        ValueError: its name is taken, or it has a ``level`` other than "block", which there no longer is.
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


def is_silent(module: nn.Module, training: bool) -> bool:
    """Whether a module passes its input on unchanged, and nobody listens: identities, dropouts that do nothing."""
    if has_hooks(module) or "forward" in module.__dict__:
        return False
    if type(module) is nn.Identity:
        return True
    probability = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "drop_prob", None)
    if isinstance(probability, (int, float)) and not list(module.parameters()) and not list(module.children()):
        return not training or probability == 0
    return False


def may_be_silent(module: nn.Module) -> bool:
    """Whether it is of a kind that :func:`is_silent` knows."""
    return is_silent(module, training=False)


def others(module: nn.Module, *roles: str) -> dict[str, nn.Module]:
    """The children besides those in ``roles``."""
    return {name: child for name, child in module._modules.items() if name not in roles and child is not None}


def is_quiet(module: nn.Module, *roles: str) -> bool:
    """Whether all children besides those in ``roles`` pass their input on unchanged as things stand, and unheard."""
    silent = others(module, *roles).values()
    return all(is_silent(child, child.training) and is_plain(child, type(child)) for child in silent)


def unknown_parts(module: nn.Module, *roles: str) -> str | None:
    """What a forward written for ``roles`` would leave out: parameters, buffers or children of its own, or None."""
    own = [name for kind in (module._parameters, module._buffers) for name, x in kind.items() if x is not None]
    if own:
        return f"it has {own[0]}, which the fused forward does not know"
    for name, child in others(module, *roles).items():
        if has_hooks(child):
            return f"{name} has hooks, which the fused forward would skip"
        if not may_be_silent(child):
            return f"it has {name} ({type(child).__name__}), which the fused forward does not know"
        if has_hooks(child):
            return f"{name} has hooks, which the fused forward would skip"
    return None


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain_norm(name: str, norm: Any) -> str | None:
    """Why a norm is not a LayerNorm without parameters over the last axis that nobody listens to, or None."""
    if type(norm) is not nn.LayerNorm or "forward" in norm.__dict__:
        return f"{name} is {type(norm).__name__}, not torch's LayerNorm"
    if norm.elementwise_affine:
        return f"{name} has parameters, the modulated norm has none"
    if len(norm.normalized_shape) != 1:
        return f"{name} must run over one axis, got {tuple(norm.normalized_shape)}"
    return f"{name} has hooks, which the fused forward would skip" if has_hooks(norm) else None


def is_plain_norm(norm: nn.Module) -> bool:
    return plain_norm("norm", norm) is None and is_plain(norm, nn.LayerNorm)


def tokens(width: int, generator: torch.Generator, length: int = 9) -> Tensor:
    """(3, length, width) random tokens."""
    return torch.randn(3, length, width, generator=generator)
