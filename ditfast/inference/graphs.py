"""CUDA graphs of a function of static shapes: captured once, replayed with new values in its inputs' buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from ..ops.backend import autocast_dtype, current_backend
from ..plain import has_hooks, is_as_built
from ..reference.transforms import makes_plain_tensors
from .agreement import agree, is_whole, rounding
from .capturable import Refused, capturable, refusal
from .snapshot import Snapshot

_DEVICE = "cuda"
_WARM_UP = 2  # calls on the capture's stream before it: libraries choose and allocate in their first ones
_TRIES = 3  # calls of a key that may change the model's state, as one that fills a cache does, before it is refused
_MOST_REFUSED = 1024
CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Any  # a tensor, or tensors in a pytree
    replays: int = 0


class Graphs:
    """The captured calls of a model, one for each key and shapes, the least recently used dropped beyond ``limit``.

    A replay reads the weights in place, so it sees writes to them (``load_state_dict``). Where weights have moved, or a
    layer was replaced or has another setting, everything is captured anew. What else changes from call to call, such as
    a schedule table's rows, is an input, whose values are copied into the graph's own buffers.

    The first call of a key is a plain one, whose result is returned. Then the function is captured and replayed, and
    the results compared. A key that cannot be captured is refused, and runs plainly until the model changes.

    Args:
        model: what the captured functions call.
        limit: of captures.
        foreign: whether layers of other codebases are captured too, which may go by Python values out of sight.
    """

    def __init__(self, model: nn.Module, limit: int = 4, foreign: bool = False) -> None:
        self._model = model
        self._limit = limit
        self._foreign = foreign
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._refused: dict[Hashable, str] = {}
        self._unsettled: dict[Hashable, int] = {}
        self._restless: str | None = None  # why none of its calls is captured any more
        self._snapshot: Snapshot | None = None
        self.reason: str | None = None
        self.wasted = 0  # captures that were dropped beyond the limit before they were replayed

    def __len__(self) -> int:
        return len(self._captured)

    def clear(self) -> None:
        """Drops every capture, and forgets what was refused."""
        self._drop()
        self._unsettled.clear()
        self._restless = self._snapshot = None

    def _drop(self) -> None:
        self._captured.clear()
        self._refused.clear()

    def look(self) -> bool:
        """Drops captures that no longer fit the model, before calls; returns whether calls can be captured.

        Where they cannot, ``reason`` says why.
        """
        self.reason = self._restless
        if self.reason is not None:
            return False
        current = self._snapshot is not None and self._snapshot.is_current()
        if not current:
            self.reason = self._impossible()
            if self.reason is not None:
                self._drop()
                self._snapshot = None
                return False
        self.reason = self._elsewhere()
        if self.reason is not None:
            return False  # captures are compared with the model before their next replay
        if not current:
            snapshot = Snapshot(self._model)
            if self._snapshot is None or self._snapshot.difference(snapshot) is not None:
                self._drop()
            self._snapshot = snapshot
        return True

    def unavailable(self) -> str | None:
        """Why calls run without graphs here, or None."""
        return self._impossible() or self._elsewhere() or self._restless

    def _impossible(self) -> str | None:
        """What stands against it in the model."""
        tensors = (*self._model.parameters(), *self._model.buffers())
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1 or {device.type for device in devices} != {_DEVICE}:
            return f"the model is on {', '.join(sorted(map(str, devices))) or 'no device'}"
        kinds = {type(tensor).__name__ for tensor in tensors if type(tensor) not in (Tensor, nn.Parameter)}
        if kinds:
            return f"weights are of the class {', '.join(sorted(kinds))}, which does not tell where they lie"
        if any(isinstance(module, torch.jit.ScriptModule) for module in self._model.modules()):
            return "TorchScript does not tell where its weights lie"
        if _has_any_global_hook() or any(map(has_hooks, self._model.modules())):
            return "the model has hooks, which a replay would not call"
        if not self._foreign and not is_as_built(self._model):
            return "layers of other codebases may go by Python values, which a replay would not read anew"
        return None

    def _elsewhere(self) -> str | None:
        """What stands against it around a call."""
        if not makes_plain_tensors(torch.device(_DEVICE)):
            return "what a transform, another capture or fake tensors are in the middle of is no other call's"
        if autocast_dtype(_DEVICE) is not None:
            return "autocast keeps casts of the weights, which a replay would not make anew"
        return "modules have global hooks, which a replay would not call" if _has_any_global_hook() else None

    def run(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """``function(*inputs)`` by the graph of ``key`` and the inputs' shapes, as new tensors; after :meth:`look`.

        Where it ran plainly because it cannot be captured, ``reason`` says why.
        """
        shapes = tuple((value.shape, value.dtype, value.device) for value in inputs)
        # a replay on another stream could write the buffers that the last one still reads
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        full = (key, shapes, current_backend(), stream, _switches())
        if full not in self._captured:
            self.reason = self._refused.get(full)
            return function(*inputs) if self.reason is not None else self._first(full, function, inputs)
        self._captured.move_to_end(full)
        captured = self._captured[full]
        captured.replays += 1
        return tree_map_only(Tensor, Tensor.clone, _replayed(captured, inputs))  # the next replay writes them

    def _first(self, key: Hashable, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        """A plain call and what it returned; then a capture, if the call left all as it was."""
        assert self._snapshot is not None, "look comes before run"
        with torch.inference_mode(False), torch.no_grad():
            copies = tuple(value.clone() for value in inputs)
        draws, writes = _draws(self.device), _writes(self._snapshot.tensors)
        result = function(*inputs)
        changed = self._changed()
        if not all(map(torch.equal, _draws(self.device), draws)):
            self.reason = "its forward draws random numbers, which would not be those of a plain call"
        elif changed is None and _writes(self._snapshot.tensors) != writes:
            self.reason = "its forward writes to its weights or buffers, as a capture would once more"
        elif not agree(inputs, copies):
            self.reason = "its forward writes to its inputs, of which a graph has its own"
        elif changed is not None:
            self._unsettled[key] = self._unsettled.get(key, 0) + 1
            if self._unsettled[key] >= _TRIES:  # what was set in one call may have been set for all
                self.reason = self._restless = _restless(changed)
            return result
        else:
            try:
                self._capture(key, function, inputs, result)
            except Refused as refused:
                self.reason = str(refused)
        if self.reason is not None:
            if len(self._refused) >= _MOST_REFUSED:
                self._refused.clear()
            self._refused[key] = self.reason
        return result

    def _changed(self) -> str | None:
        """What of the model's state has changed since the last look."""
        if self._snapshot is None or self._snapshot.is_current():
            return None
        return self._snapshot.difference(Snapshot(self._model))

    def _capture(
        self, key: Hashable, function: Callable[..., Any], inputs: tuple[Tensor, ...], result: Any
    ) -> None:
        """Captures a function whose plain result is known.

        Raises:
            Refused: it cannot be captured, or its replay differs.
        """
        leaves = tree_leaves(result)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for leaf in leaves:
            if not is_plain_tensor(leaf) and not isinstance(leaf, CONSTANTS):
                raise Refused(f"its forward returns a {type(leaf).__name__}, in which tensors are not found")
        with torch.inference_mode(False), torch.no_grad():  # else later runs could not write its buffers
            captured_function = capturable(function, inputs, self.device)
            while len(self._captured) >= self._limit:
                self.wasted += self._captured.popitem(last=False)[1].replays == 0
            captured = _capture(captured_function, inputs, self.device)
            output = _replayed(captured, inputs)
        if (changed := self._changed()) is not None:
            self._restless = _restless(changed)
            raise Refused(self._restless)
        if not agree(output, result, rounding((*self._model.parameters(), *tensors))):
            raise Refused("its replay gives other results than its forward")
        self._captured[key] = captured
        self._unsettled.pop(key, None)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(chain(self._model.parameters(), self._model.buffers())).device


def _restless(changed: str) -> str:
    return f"its forward changes {changed}, as a replay would not"


def is_plain_tensor(value: object) -> bool:
    """Whether it is a dense tensor of torch's own class."""
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided  # type: ignore[attr-defined]


def _capture(function: Callable[..., Any], inputs: tuple[Tensor, ...], device: torch.device) -> _Captured:
    """Raises Refused where torch cannot capture it; what runs out of memory says so itself."""
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function(*inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        # tensors that the forward has never seen, so that what it remembers of others is in no graph, and of other
        # values, so that what escapes the capture and runs at once leaves other results
        buffers = tuple(value.clone() if is_whole(value) else torch.zeros_like(value) for value in inputs)
        first: list[Exception] = []
        try:
            # within another context: torch's own leaves its stream current where a capture fails
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                try:
                    output = function(*buffers)
                except Exception as error:
                    first.append(error)
                    raise
        except Exception as error:
            raise refusal("torch cannot capture its forward", (first or [error])[0]) from None
    return _Captured(graph, buffers, output)


def _replayed(captured: _Captured, inputs: tuple[Tensor, ...]) -> Any:
    """The output in the graph's own memory."""
    for buffer, value in zip(captured.inputs, inputs, strict=True):
        buffer.copy_(value)
    captured.graph.replay()
    return captured.output


def _draws(device: torch.device) -> list[Tensor]:
    """The states of torch's generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _writes(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written in place; torch does not count those made in inference mode."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _switches() -> tuple[object, ...]:
    """torch's switches that a captured kernel was chosen by."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    convolutions: Any = cudnn
    return (
        cuda.matmul.fp32_precision, convolutions.conv.fp32_precision, cudnn.enabled, torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
    )  # fmt: skip

