"""Another forward for an instance: its class becomes a subclass, which copies and pickles as what it is.

Hooks, parameters, state-dict keys, isinstance and compilation survive a change of class; a forward bound to the
instance would be lost with pickling, a replaced child would lose its hooks.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _class(mixin: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of (mixin, original), one for each pair in a process; holds no state."""
    if (mixin, original) in _CLASSES:
        return _CLASSES[mixin, original]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # the class is made here, so that neither pickle nor copy can find it by its name
        return _make, (mixin, original), object.__reduce_ex__(self, 2)[2]

    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_ditfast": (mixin, original),
    }
    # two threads may both make one: the first that is kept counts
    return _CLASSES.setdefault((mixin, original), type(original.__name__, (mixin, original), body))


def _make(mixin: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    cls = _class(mixin, original)
    return cls.__new__(cls)


def accelerated_by(module: nn.Module | type) -> tuple[type[nn.Module], type[nn.Module]] | None:
    """(mixin, original class) of an accelerated module or its class, or None."""
    kind = module if isinstance(module, type) else type(module)
    return kind.__dict__.get("_ditfast")


def swap(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Gives a module the mixin's forward."""
    module.__class__ = _class(mixin, type(module))


def unswap(module: nn.Module) -> bool:
    """Gives an accelerated module its own class back; False where it is none."""
    found = accelerated_by(module)
    if found is None:
        return False
    if hasattr(found[0], "unswapped"):
        found[0].unswapped(module)  # what the mixin keeps beside the module
    module.__class__ = found[1]
    return True
