"""What a module's code keeps outside of the module: on its classes, in globals and closures, in caches of functions.

A check calls forwards with made-up tensors, fake ones among them. None of these may be left there.
"""

from __future__ import annotations

import functools
import pickle
import random
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

_LIBRARIES = {"torch", "ditfast", "numpy", "builtins", *sys.stdlib_module_names}
_MOST_FUNCTIONS = 500  # that are looked into
_MISSING = object()
_CONTAINERS = (dict, list, set, OrderedDict, defaultdict)
_CACHED = type(functools.cache(lambda: None))


class Outside:
    """The state around a module: what its methods, and the functions that these name, can read and write."""

    def __init__(self, module: nn.Module) -> None:
        self._names: list[tuple[str, Any, str, Any]] = []  # (a label, a class, globals or a cell; name, value)
        self._containers: dict[int, tuple[str, Any, Any]] = {}
        self._caches: dict[int, tuple[Any, int]] = {}
        self._generators: dict[int, tuple[Any, Any]] = {}
        kinds = {kind for child in module.modules() for kind in type(child).__mro__ if _is_foreign(kind.__module__)}
        self._kinds = {kind: frozenset(vars(kind)) for kind in kinds}
        functions: list[FunctionType] = []
        for kind in kinds:
            for name, value in vars(kind).items():
                if function := _function_of(value):
                    functions.append(function)
                elif not name.startswith("__"):
                    self._keep(f"{kind.__name__}.{name}", kind, name, value)
        ids = {id(function) for function in functions}
        for function in functions:
            for called in self._read_by(function):
                if id(called) not in ids and len(ids) < _MOST_FUNCTIONS and _is_foreign(called.__module__):
                    ids.add(id(called))
                    functions.append(called)

    def _read_by(self, function: FunctionType) -> Iterator[FunctionType]:
        """Keeps the values that a function names; yields the functions among them."""
        names = function.__code__.co_names
        named: list[tuple[str, Any, Any]] = [
            (name, function.__globals__, function.__globals__.get(name, _MISSING)) for name in names
        ]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        named += [(name, cell, _content(cell)) for name, cell in cells]
        for name, owner, value in named:
            if isinstance(value, ModuleType):
                if _is_foreign(value.__name__):
                    yield from filter(None, (_function_of(vars(value).get(inner)) for inner in names))
            elif inner := _function_of(value):
                self._keep_object(name, value)
                yield inner
            elif not isinstance(value, type):
                self._keep(name, owner, name, value)

    def _keep(self, label: str, owner: Any, name: str, value: Any) -> None:
        self._names.append((label, owner, name, value))
        self._keep_object(label, value)

    def _keep_object(self, label: str, value: Any, depth: int = 2) -> None:
        if type(value) in _CONTAINERS:  # a subclass may do anything when it is copied
            self._containers.setdefault(id(value), (label, value, value.copy()))
            for inner in value.values() if isinstance(value, dict) else value:
                if depth and type(inner) in _CONTAINERS:
                    self._keep_object(label, inner, depth - 1)
        elif isinstance(value, _CACHED):
            self._caches[id(value)] = value, value.cache_info().currsize
        elif state := state_of(value):
            self._generators[id(value)] = value, state

    def values(self) -> tuple[Any, ...]:
        """All plain values; of other objects their ids."""
        values: list[tuple[Any, ...]] = [(label, _value_of(value)) for label, _, _, value in self._names]
        for label, _, before in self._containers.values():
            items = before.items() if isinstance(before, dict) else enumerate(before)
            values += [(label, key, _value_of(value)) for key, value in items]
        return tuple(values)

    def changes(self) -> set[str]:
        """What is another object by now, holds other objects, or draws other random numbers."""
        changed = {label for label, owner, name, value in self._names if _now(owner, name) is not value}
        changed |= {f"{kind.__name__}.{name}" for kind, name in self._new()}
        changed |= {label for label, now, before in self._containers.values() if not _same(now, before)}
        drawn = [value for value, state in self._generators.values() if state_of(value) != state]
        return changed | {type(value).__name__ for value in drawn}

    def _new(self) -> list[tuple[type, str]]:
        """The attributes that classes have gained."""
        return [(kind, name) for kind, names in self._kinds.items() for name in vars(kind).keys() - names]

    def put_back(self) -> None:
        """Undoes all changes; caches of functions that were filled are emptied."""
        for _, owner, name, value in self._names:
            if _now(owner, name) is not value:
                _set(owner, name, value)
        for kind, name in self._new():
            delattr(kind, name)
        for _, now, before in self._containers.values():
            if not _same(now, before):
                now.clear()
                now.extend(before) if isinstance(now, list) else now.update(before)
        for cache, size in self._caches.values():
            if cache.cache_info().currsize != size:
                cache.cache_clear()
        for value, state in self._generators.values():
            if state_of(value) != state:
                _set_state(value, state)


def state_of(value: Any) -> bytes:
    """What a generator of random numbers draws next, of Python's, NumPy's or torch's kinds; else nothing."""
    if isinstance(value, random.Random):
        return pickle.dumps(value.getstate())
    if isinstance(value, torch.Generator):
        return pickle.dumps(value.get_state().tolist())
    if type(value).__module__.startswith("numpy.random") and (bits := _bits(value)) is not None:
        return pickle.dumps(bits.state)
    return b""


def _set_state(value: Any, state: bytes) -> None:
    loaded = pickle.loads(state)
    if isinstance(value, random.Random):
        value.setstate(loaded)
    elif isinstance(value, torch.Generator):
        value.set_state(torch.tensor(loaded, dtype=torch.uint8))
    else:
        _bits(value).state = loaded


def _bits(value: Any) -> Any:
    bits = getattr(value, "bit_generator", None) or getattr(value, "_bit_generator", value)
    return bits if hasattr(bits, "state") else None


def _value_of(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else id(value)


def _is_foreign(module: str | None) -> bool:
    return bool(module) and str(module).partition(".")[0] not in _LIBRARIES


def _function_of(value: Any) -> FunctionType | None:
    """The function behind a method, a property or a cache."""
    value = getattr(value, "fget", None) or value
    while hasattr(value, "__wrapped__") and not isinstance(value, FunctionType):
        value = value.__wrapped__
    value = getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _MISSING


def _now(owner: Any, name: str) -> Any:
    if isinstance(owner, CellType):
        return _content(owner)
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, _MISSING)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, CellType):
        owner.cell_contents = value
    elif isinstance(owner, dict):
        owner.pop(name, None) if value is _MISSING else owner.update({name: value})
    else:
        setattr(owner, name, value)


def _same(now: Any, before: Any) -> bool:
    """Whether a container holds the very objects that it held."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(now.get(key, _MISSING) is value for key, value in before.items())
    return all(x is y for x, y in zip(now, before, strict=True)) if isinstance(now, list) else now == before
