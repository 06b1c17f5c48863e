"""CUDA graphs of a function of static shapes: captured once, replayed with new values in its inputs' buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.backend import autocast_dtype, current_backend
from ..plain import has_hooks, is_as_built
from ..reference.transforms import makes_plain_tensors

_DEVICE = "cuda"
_WARM_UP = 3  # calls before a capture: libraries choose and allocate in their first ones


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class StepGraphs:
    """The captured steps of a model, one for each key and shapes, the least recently used dropped beyond ``limit``.

    A replay reads the weights in place, so it sees writes to them (``load_state_dict``). Where weights have moved, or a
    layer was replaced or has another setting, everything is captured anew. What else changes from step to step, such as
    a schedule table's rows, is an input, whose values are copied into the graph's own buffers.
    """

    def __init__(self, model: nn.Module, limit: int = 4) -> None:
        self._model = model
        self._limit = limit
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._read: tuple[object, ...] = ()

    def __len__(self) -> int:
        return len(self._captured)

    def look(self) -> bool:
        """Drops captures that no longer fit the model, before a run; returns whether the model can be captured."""
        if self.unavailable() is not None:
            self._captured.clear()
            return False
        tensors = (*self._model.parameters(), *self._model.buffers())
        # a tensor of another dtype or layout may have an old one's address
        weights = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
        read = (*weights, *(_settings(module) for module in self._model.modules()))
        if read != self._read:
            self._captured.clear()
            self._read = read
        return True

    def unavailable(self) -> str | None:
        """Why its steps run without graphs, or None."""
        devices = {parameter.device.type for parameter in self._model.parameters()}
        if devices != {_DEVICE}:
            return f"the model is on {', '.join(sorted(devices)) or 'no device'}"
        if not makes_plain_tensors(torch.device(_DEVICE)):
            return "what a transform, another capture or fake tensors are in the middle of is no other call's"
        if autocast_dtype(_DEVICE) is not None:
            return "autocast keeps casts of the weights, which a replay would not make anew"
        if _has_any_global_hook() or any(map(has_hooks, self._model.modules())):
            return "the model has hooks, which a replay would not call"
        if not is_as_built(self._model):
            return "layers of other codebases may go by Python values, which a replay would not read anew"
        return None

    def run(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)`` by the graph of ``key`` and the inputs' shapes, as a new tensor."""
        shapes = tuple((tuple(value.shape), value.dtype, value.device) for value in inputs)
        # a replay on another stream could write the buffers that the last one still reads
        stream = torch.cuda.current_stream(inputs[0].device) if inputs[0].is_cuda else None
        full = (key, shapes, current_backend(), stream, _precision())
        if full not in self._captured:
            while len(self._captured) >= self._limit:
                self._captured.popitem(last=False)
            with torch.inference_mode(False), torch.no_grad():  # else later runs could not write its buffers
                self._captured[full] = _capture(function, inputs)
        self._captured.move_to_end(full)
        graph, buffers, output = self._captured[full]
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer.copy_(value)
        graph.replay()
        return output.clone()  # the next replay writes it


def _capture(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Captured:
    buffers = tuple(value.clone() for value in inputs)
    device = inputs[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function(*buffers)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function(*buffers)
    return _Captured(graph, buffers, output)


def _settings(module: nn.Module) -> tuple[object, ...]:
    """What a layer's forward may read besides tensors and other layers."""
    plain = (bool, int, float, str, tuple, type(None))
    return type(module), *((name, value) for name, value in vars(module).items() if isinstance(value, plain))


def _precision() -> tuple[object, ...]:
    """torch's switches that a captured kernel was chosen by."""
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision
