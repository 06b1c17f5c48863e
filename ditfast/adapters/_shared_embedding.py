"""diffusers' DiT embeds timestep and label in every block; here once, where every block's embedder is the same.

Within a :func:`sharing` block the embedders of a model hand each other their result. That is exact, for they are
the same function: the same known modules with the same settings and, value by value, the same parameters. It is
looked at before every forward whether anything may have changed (the parameters' identity, address and version,
optimiser steps, hooks, settings, training), and the values are compared again if so, or if anybody has asked the
model for its modules or parameters since: writes through ``parameter.data`` (as diffusers' EMAModel makes them)
leave no other trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .._model_cache import ParameterState
from ._adapter import has_hooks

# an embedder of other parts is called in every block
_PARTS = ("CombinedTimestepLabelEmbeddings", "Timesteps", "TimestepEmbedding", "LabelEmbedding")
_INTERNAL = frozenset(vars(nn.Module()))


class _Shared:
    """The embedders that share, and their last result with what it was made from."""

    def __init__(self, members: frozenset[int]) -> None:
        self.members = members
        self.made_from: tuple[Any, ...] = ()
        self.result: Tensor | None = None


_current: ContextVar[_Shared | None] = ContextVar("ditfast_shared_embedding", default=None)


def embedding(emb: Any, timestep: Tensor | None, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``emb(timestep, class_labels, hidden_dtype=dtype)`` (B, D), or another embedder's result of the same."""
    shared = None if torch.compiler.is_compiling() else _current.get()
    if shared is None or id(emb) not in shared.members:
        return emb(timestep, class_labels, hidden_dtype=dtype)  # type: ignore[no-any-return]
    made_from = (timestep, class_labels, dtype)
    same = shared.made_from and all(a is b for a, b in zip(made_from, shared.made_from, strict=True))
    if not same or shared.result is None:
        shared.made_from, shared.result = made_from, emb(timestep, class_labels, hidden_dtype=dtype)
    return shared.result


class _Verdict(NamedTuple):
    """Whether a model's embedders are the same function, and what that was found by."""

    embedders: list[nn.Module]
    modules: list[nn.Module]
    looks: list[tuple[Any, ...]]
    state: ParameterState
    same: bool

    def is_fresh(self, embedders: list[nn.Module]) -> bool:
        # a module's look holds its children: those that were walked are those that are there
        return (
            embedders == self.embedders
            and [_look(module) for module in self.modules] == self.looks
            and self.state.is_fresh(_parameters(self.modules))
        )


# beside the models, not in them: copies, pickles and restored models carry nothing
_verdicts: WeakKeyDictionary[nn.Module, _Verdict] = WeakKeyDictionary()


def sharing(model: nn.Module, embedders: list[nn.Module]) -> AbstractContextManager[None]:
    """The embedders share within the block if that is exact: in inference, outside of compiled and captured graphs."""
    if torch.compiler.is_compiling():
        return nullcontext()
    if torch.is_grad_enabled():
        forget(model)  # somebody may be about to write through .data
        return nullcontext()
    if len(embedders) < 2 or _has_any_global_hook():
        return nullcontext()
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return nullcontext()  # replays do not look whether the parameters have changed
    verdict = _verdicts.get(model)
    if verdict is None or not verdict.is_fresh(embedders):
        verdict = _judge(embedders)
        if verdict is None:
            forget(model)
            return nullcontext()
        _verdicts[model] = verdict
    return _scope(frozenset(map(id, embedders))) if verdict.same else nullcontext()


def forget(model: nn.Module) -> None:
    """Has the values be compared again."""
    _verdicts.pop(model, None)


@contextmanager
def _scope(members: frozenset[int]) -> Iterator[None]:
    token = _current.set(_Shared(members))
    try:
        yield
    finally:
        _current.reset(token)


def _judge(embedders: list[nn.Module]) -> _Verdict | None:
    """The verdict, or None where it could not be told when it is stale."""
    groups = [list(embedder.modules()) for embedder in embedders]
    modules = [module for group in groups for module in group]
    parameters = _parameters(modules)
    if not all(map(_is_known, modules)) or not all(map(_is_readable, parameters)):
        return None
    shapes = [[_settings(module) for module in group] for group in groups]
    first, *rest = [_parameters(group) for group in groups]
    same = all(shape == shapes[0] for shape in shapes) and all(
        len(first) == len(other) and all(map(_equal, first, other)) for other in rest
    )
    return _Verdict(embedders, modules, [_look(module) for module in modules], ParameterState.of(parameters), same)


def _is_known(module: nn.Module) -> bool:
    if module.training or has_hooks(module) or "forward" in module.__dict__ or module._buffers:
        return False
    if type(module) is nn.Embedding:
        return module.max_norm is None  # which changes the table as it is read
    if type(module).__name__ not in _PARTS and type(module) not in (nn.Linear, nn.SiLU):
        return False
    return all(value is None or isinstance(value, (bool, int, float, str)) for _, value in _settings(module)[1:])


def _is_readable(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and not parameter.is_meta and not parameter.is_inference()


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _settings(module: nn.Module) -> list[Any]:
    """What a known module's forward depends on besides its parameters and children."""
    return [type(module), *((key, value) for key, value in vars(module).items() if key not in _INTERNAL)]


def _look(module: nn.Module) -> tuple[Any, ...]:
    own = vars(module)
    return own["training"], has_hooks(module), "forward" in own, list(own["_modules"].values()), _settings(module)


def _parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module._parameters.values() if p is not None]
