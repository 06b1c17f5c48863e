"""``ditfast.graphed(model)``: the calls of a model replayed from CUDA graphs."""

from __future__ import annotations

import inspect
import operator
import threading
import warnings
from collections.abc import Callable, Hashable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from .graphs import CONSTANTS, Graphs, is_plain_tensor


def graphed(model: nn.Module | Callable[..., Any], *, limit: int = 8) -> Graphed:
    """Inference of a model by CUDA graphs, one for each shape, where the host's launches are what takes the time.

    The result is called as the model is, and returns what it returns, as tensors of the call's own. The first call with
    other shapes, dtypes, Python arguments or on another stream is a plain one and captures a graph; further ones copy
    their tensors into the graph's inputs and replay it. Nothing in the model is changed.

    Before each replay the model is compared with what it was. Weights written in place (an optimizer's step,
    ``load_state_dict``, an average that is copied) are read by the replay. Weights that moved, replaced layers and
    other settings (attributes of modules: numbers, strings, tensors, lists, dictionaries, and objects in them, two
    deep) drop the graphs. Not seen are changes of global names, closures and classes.

    A call that cannot be captured runs plainly, and a UserWarning says why, once for each reason;
    :meth:`Graphed.unavailable` says it too.

    It is for inference: no gradients are recorded, the parameters' neither.

    Args:
        model: a module (``ditfast.DiT``, an accelerated model, any other) or a method of one, such as
            ``model.forward_with_cfg``.
        limit: of graphs; beyond it the least recently used is dropped. Each has its inputs, outputs and what lies
            between them in memory of its own.

    Raises:
        TypeError: model is neither; limit is no whole number.
        ValueError: limit is below 1.
    """
    return Graphed(model, limit)


class Graphed:
    """See :func:`graphed`.

    Attributes:
        model: the module.
    """

    def __init__(self, model: nn.Module | Callable[..., Any], limit: int = 8) -> None:
        module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
        if not isinstance(module, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or a method of one, got {type(model).__name__}")
        try:
            limit = operator.index(limit)
        except TypeError:
            raise TypeError(f"limit must be a whole number, got {limit!r}") from None
        if limit < 1:
            raise ValueError(f"limit must be 1 or more, got {limit}")
        self.model = module
        self._call: Callable[..., Any] = model
        self._graphs = Graphs(module, limit, foreign=True)
        self._reason: str | None = None
        self._warned: set[str] = set()
        self._lock = threading.RLock()  # another thread would write the inputs of a graph before they are read

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's.

        Raises:
            ValueError: the model is in training mode; or an argument requires a gradient where one is recorded.
        """
        if self.model.training:
            raise ValueError("model is in training mode, and graphs are for inference: call model.eval()")
        leaves, spec = tree_flatten((args, kwargs))
        if torch.is_grad_enabled():
            _refuse_gradients(args, kwargs)
        with torch.no_grad():
            with self._lock:
                reason = None if self._graphs.look() else self._graphs.reason
                reason = reason or _unfit(leaves, self._graphs.device)
                if reason is None:
                    return self._run(leaves, spec)
            self._plainly(reason)
            return self._call(*args, **kwargs)

    def _run(self, leaves: list[Any], spec: TreeSpec) -> Any:
        def function(*tensors: Tensor) -> Any:
            given = iter(tensors)
            args, kwargs = tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
            return self._call(*args, **kwargs)

        key = spec, *(_key(leaf) for leaf in leaves)
        result = self._graphs.run(key, function, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        self._plainly(self._graphs.reason)
        if self._graphs.wasted:
            self._warn(
                f"ditfast.graphed drops graphs of {type(self.model).__name__} before they are replayed: more shapes or "
                "Python values than limit take turns; give a larger limit, and as a tensor what changes in every call"
            )
        return result

    def _plainly(self, reason: str | None) -> None:
        self._reason = reason
        if reason is not None:
            self._warn(f"ditfast.graphed runs {type(self.model).__name__} without a graph: {reason}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=_outside())

    def unavailable(self) -> str | None:
        """Why calls run without a graph here, or why the last one did; None where graphs are captured and replayed."""
        return self._graphs.unavailable() or self._reason

    def clear(self) -> None:
        """Drops the graphs with their memory, and forgets what could not be captured."""
        with self._lock:
            self._graphs.clear()
            self._reason = None
            self._warned.clear()

    def __repr__(self) -> str:
        return f"Graphed({type(self.model).__name__}, {len(self._graphs)} graphs)"


def _outside() -> int:
    """The level of the first caller outside of this file, for its caller's warning."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename == __file__:
        frame, level = frame.f_back, level + 1
    return level


def _refuse_gradients(args: Any, kwargs: Any) -> None:
    for path, leaf in tree_flatten_with_path((args, kwargs))[0]:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise ValueError(
                f"argument {keystr(path[1:])} requires a gradient, and graphs are for inference: "
                "call it under torch.no_grad() or torch.inference_mode(), or call the model itself"
            )


def _unfit(leaves: list[Any], device: torch.device) -> str | None:
    """Which argument no graph can be captured for, or None."""
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if not is_plain_tensor(leaf):
                return f"an argument is a {type(leaf).__name__} of layout {leaf.layout}, not a plain tensor"
            if leaf.device != device:
                return f"an argument is on {leaf.device}, the model on {device}"
        elif not isinstance(leaf, (*CONSTANTS, Enum)):
            return f"an argument is a {type(leaf).__name__}, which may hold other values in the next call"
    return None


def _key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return Tensor
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0
    return type(leaf), repr(leaf) if isinstance(leaf, (float, complex)) else leaf
