"""How changed parameters are noticed; all adaLN Linears as one, a concatenated copy that is made anew then."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class _OptimizerSteps:
    """Counts the steps of every optimiser in the process: fused ones leave the version counters as they are."""

    def __init__(self) -> None:
        self.count = 0
        self._watching = False

    def watch(self) -> None:
        if not self._watching:
            register_optimizer_step_post_hook(self._stepped)
            self._watching = True

    def _stepped(self, *_: object) -> None:
        self.count += 1


_optimizer_steps = _OptimizerSteps()


def _concatenate(parameters: list[nn.Parameter], dtype: torch.dtype) -> Tensor:
    if parameters[0].is_meta:  # nothing to copy: a trace sees what every later call launches
        rows = sum(parameter.shape[0] for parameter in parameters)
        return parameters[0].new_empty((rows, *parameters[0].shape[1:]), dtype=dtype, requires_grad=False)
    return torch.cat([parameter.detach().to(dtype) for parameter in parameters])


class ParameterState(NamedTuple):
    """What tells that parameters have changed; writes through ``.data`` and collectives leave no trace in it."""

    parameters: list[nn.Parameter]
    sources: list[Tensor]  # aliases that keep the storages alive, so that an address is never reused unnoticed
    versions: list[int]
    optimizer_steps: int

    @classmethod
    def of(cls, parameters: list[nn.Parameter]) -> ParameterState:
        _optimizer_steps.watch()
        sources = [parameter.detach() for parameter in parameters]
        return cls(parameters, sources, [parameter._version for parameter in parameters], _optimizer_steps.count)

    def is_fresh(self, parameters: list[nn.Parameter]) -> bool:
        return (
            self.optimizer_steps == _optimizer_steps.count
            and len(parameters) == len(self.parameters)
            and all(
                parameter is known and parameter.data_ptr() == source.data_ptr() and parameter._version == version
                for parameter, known, source, version in zip(
                    parameters, self.parameters, self.sources, self.versions, strict=True
                )
            )
        )


class ModulationCache(NamedTuple):
    """All adaLN Linears as one, and the state of the parameters it was made from."""

    state: ParameterState
    weight: Tensor
    bias: Tensor

    @classmethod
    def build(cls, weights: list[nn.Parameter], biases: list[nn.Parameter], dtype: torch.dtype) -> ModulationCache:
        cache = cls(
            ParameterState.of([*weights, *biases]), _concatenate(weights, dtype), _concatenate(biases, dtype)
        )
        if cache.weight.is_cuda:
            torch.cuda.current_stream(cache.weight.device).synchronize()  # other streams may use it next
        return cache

    def is_fresh(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> bool:
        return self.weight.dtype == dtype and self.state.is_fresh(parameters)
