"""Another forward for an instance: its class becomes a subclass, which copies and pickles as what it is.

Hooks, parameters, state-dict keys, isinstance and compilation survive a change of class; a forward bound to the
instance would be lost with pickling, a replaced child would lose its hooks. A bound forward that something keeps
(offloading, diffusers' hooks, Accelerator.prepare, wrappers) runs the forward of the instance's class at each call.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn

_REGISTER = "diffusers.hooks._helpers"
_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _class(mixin: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of (mixin, original), one for each pair in a process; holds no state."""
    cls = _CLASSES.get((mixin, original)) or _new_class(mixin, original)
    _register_with_diffusers(cls, original)
    return cls


def _new_class(mixin: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        if type(self) is not cls:  # a subclass of it
            return original.__reduce_ex__(self, protocol)
        # the class is made here, so that neither pickle nor copy can find it by its name
        reduced: Any = original.__reduce_ex__(self, 2)
        make, arguments, *rest = reduced
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return _remake, (mixin, original, make, arguments), *rest
        return _make, (mixin, original, *arguments[1:]), *rest

    @functools.wraps(original.forward)  # whose signature torch.export and trainers look at
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # a reference to it may outlive the swap: the instance may have its own class back
        return (mixin if isinstance(self, cls) else type(self)).forward(self, *args, **kwargs)

    vars(forward).pop("_torchdynamo_orig_callable", None)  # by it torch.compile would trace the module's own
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "forward": forward,
        "_ditfast": (mixin, original),
        "_ditfast_takes": _parameters(original),
    }
    # two threads may both make one: the first that is stored counts
    cls = _CLASSES.setdefault((mixin, original), type(original.__name__, (mixin, original), body))
    return cls


def _register_with_diffusers(cls: type[nn.Module], original: type[nn.Module]) -> None:
    """diffusers' caches look a block up by its exact class; one of diffusers' own may come before their import."""
    if original.__module__.startswith("diffusers."):
        with suppress(ImportError):  # an older diffusers
            importlib.import_module(_REGISTER)
    register: Any = getattr(sys.modules.get(_REGISTER), "TransformerBlockRegistry", None)
    if register is None or cls in register._registry:
        return
    # it imports many models to fill itself when first asked: not for a class that cannot be in it
    if original.__module__.startswith("diffusers.") or original in register._registry:
        with suppress(ValueError):  # not registered
            register.register(cls, dataclasses.replace(register.get(original)))


def _parameters(original: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a module's own forward takes by position and by name."""
    parameters = inspect.signature(original.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)[1:]


def _make(mixin: type[nn.Module], original: type[nn.Module], *arguments: Any) -> nn.Module:
    cls: Any = _class(mixin, original)
    return cls.__new__(cls, *arguments)  # type: ignore[no-any-return]


def _remake(mixin: type[nn.Module], original: type[nn.Module], make: Callable[..., Any], arguments: Any) -> Any:
    """A module by a ``__reduce__`` of its own, accelerated as the pickled one was."""
    module = make(*arguments)
    if type(module) is original:
        swap(module, mixin)
    return module


def accelerated_by(module: nn.Module | type) -> tuple[type[nn.Module], type[nn.Module]] | None:
    """(mixin, original class) of an accelerated module or its class, or None."""
    kind = module if isinstance(module, type) else type(module)
    return kind.__dict__.get("_ditfast")


def swap(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Gives a module the mixin's forward."""
    module.__class__ = _class(mixin, type(module))


def unswap(module: nn.Module) -> bool:
    """Gives an accelerated module its own class back; False where it is none."""
    classes = accelerated_by(module)
    if classes is None:
        return False
    forward = module.__dict__.get("forward")
    if getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]  # accelerate and diffusers leave it behind when they remove a hook
    module.__class__ = classes[1]
    return True
