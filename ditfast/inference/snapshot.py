"""What a forward may read besides its inputs, as it was: classes, layers, settings, and where the tensors lie."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Collection, Sequence
from enum import Enum
from itertools import chain
from operator import attrgetter, is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_COLLECTIONS = (list, tuple, dict, set, frozenset, deque)
# known by identity: what is within them is not followed
_CLOSED = (
    *_PLAIN, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, functools.partial, Enum, logging.Logger,
)  # fmt: skip
_DEPTH = 2  # objects within objects: module.config.attention is followed, what it refers to is not
_dtype = attrgetter("dtype")


class Snapshot:
    """The state of a model, to compare with: see :meth:`is_current`, which is for every call, and :meth:`difference`.

    Followed are the attributes of all modules, and in them collections, tensors, modules, and other objects two deep.
    What functions, closures, classes and global names hold is not. Tensors count by where they lie: writes in place are
    no change. Whatever is replaced in the model is kept alive until the snapshot goes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self._model = model
        self._tensor_paths: list[str] = []
        self._paths: list[str] = []
        self._values: list[object] = []
        self._owners: list[Any] = []
        self._filled: list[Collection[Any]] = []  # live: they change with the model
        self._empty: list[Collection[Any]] = []
        self._seen: dict[int, Any] = {}  # kept alive: an id is not given again
        self._follow("", model, 0)
        self._types = list(map(type, self._owners))
        self._lengths = list(map(len, self._filled))
        self._held = list(chain.from_iterable(self._filled))
        self._places = _places(self.tensors)

    def is_current(self) -> bool:
        """Whether the model is as it was: every attribute the same object, every tensor in its place."""
        return (
            not any(self._empty)
            and list(map(len, self._filled)) == self._lengths
            and all(map(is_, chain.from_iterable(self._filled), self._held))
            and list(map(type, self._owners)) == self._types
            and _places(self.tensors) == self._places
        )

    def difference(self, other: Snapshot) -> str | None:
        """Where the states differ, by value: the first attribute's path, or None."""
        mine, theirs = self._state(), other._state()
        for (path, value), pair in zip(mine, theirs, strict=False):
            if (path, value) != pair:
                return path
        shorter, longer = sorted((mine, theirs), key=len)
        return longer[len(shorter)][0] if len(longer) > len(shorter) else None

    def _state(self) -> list[tuple[str, object]]:
        places = zip(*self._places, strict=True)
        return [*zip(self._paths, self._values, strict=True), *zip(self._tensor_paths, places, strict=True)]

    def _follow(self, path: str, value: Any, depth: int) -> None:
        kind = type(value)
        self._paths.append(path)
        if kind in _PLAIN:
            self._values.append((kind, value))
        elif id(value) in self._seen or isinstance(value, _CLOSED):
            self._values.append(id(value))
            self._seen[id(value)] = value
        else:
            self._seen[id(value)] = value
            self._values.append(kind)
            if kind in (Tensor, nn.Parameter) and value.layout == torch.strided:
                self.tensors.append(value)
                self._tensor_paths.append(path)
            elif isinstance(value, _COLLECTIONS):
                self._follow_collection(path, value, depth)
            elif isinstance(value, nn.Module):
                self._follow_attributes(path, value, depth)
            elif hasattr(value, "__dict__") and depth < _DEPTH:
                self._follow_attributes(path, value, depth + 1)
            else:
                self._values[-1] = id(value)

    def _follow_collection(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            self._watch(value)
            if value:
                self._watch(value.values())
            for key, item in list(value.items()):
                name = key if isinstance(key, str) else repr(key)
                self._follow(_joined(path, name), item, depth)
            return
        if not isinstance(value, (tuple, frozenset)):
            self._watch(value)
        for index, item in enumerate(value):
            self._follow(_joined(path, str(index)), item, depth)

    def _follow_attributes(self, path: str, owner: Any, depth: int) -> None:
        self._owners.append(owner)
        self._watch(vars(owner).values())
        for name, value in list(vars(owner).items()):
            self._follow(_joined(path, name), value, depth)

    def _watch(self, values: Collection[Any]) -> None:
        (self._filled if len(values) else self._empty).append(values)


def _joined(path: str, name: str) -> str:
    """As one writes it: without the dictionaries of nn.Module."""
    if name in ("_parameters", "_buffers", "_modules"):
        return path
    return f"{path}.{name}" if path else name


def _places(tensors: Sequence[Tensor]) -> list[list[object]]:
    # a tensor of another dtype or layout may have an old one's address
    readers: tuple[Any, ...] = (torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride, _dtype)
    return [list(map(read, tensors)) for read in readers]
