"""How changed parameters are noticed; all adaLN Linears as one, a concatenated copy that is made anew then."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._model_blocks import is_plain
from .ops._backend import autocast_dtype


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


class _Concatenated(NamedTuple):
    """All adaLN Linears as one, and the state of the parameters it was made from."""

    state: ParameterState
    weight: Tensor
    bias: Tensor

    @classmethod
    def build(cls, weights: list[nn.Parameter], biases: list[nn.Parameter], dtype: torch.dtype) -> _Concatenated:
        made = cls(
            ParameterState.of([*weights, *biases]), _concatenate(weights, dtype), _concatenate(biases, dtype)
        )
        if made.weight.is_cuda:
            torch.cuda.current_stream(made.weight.device).synchronize()  # other streams may use it next
        return made

    def is_fresh(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> bool:
        return self.weight.dtype == dtype and self.state.is_fresh(parameters)


class ModulationCache:
    """The concatenated adaLN Linears of a model, made when they are first read and again when they have changed.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self.made: _Concatenated | None = None
        self.resets = 0  # for whoever else keeps what the adaLN weights gave

    def __reduce__(self) -> tuple[type[ModulationCache], tuple[()]]:
        return ModulationCache, ()

    def reset(self) -> None:
        self.made = None
        self.resets += 1

    def modulations(self, linears: list[nn.Linear], c: Tensor) -> tuple[Tensor, ...] | None:
        """:meth:`modulation` in the Linears' parts."""
        whole = self.modulation(linears, c)
        return None if whole is None else whole.split_with_sizes([linear.out_features for linear in linears], dim=1)

    def modulation(self, linears: list[nn.Linear], c: Tensor) -> Tensor | None:
        """Linear(c) of all the Linears side by side by one GEMM, without gradients; c (B, D) -> (B, N).

        None where the copy could not be checked again (inside a compiled or captured graph), or where the Linears
        are not what they were built as, of one dtype and on c's device.
        """
        if torch.compiler.is_compiling() or (c.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        if not all(is_plain(linear) for linear in linears):
            return None
        weights = [cast(nn.Parameter, linear.weight) for linear in linears]
        biases = [linear.bias for linear in linears]
        if any(type(p) is not nn.Parameter or p.is_inference() for p in (*weights, *biases)):
            return None
        if {(p.dtype, p.device) for p in (*weights, *biases)} != {(weights[0].dtype, c.device)}:
            return None
        both = self._fresh(weights, biases, c.device.type)
        c = c.to(both.weight.dtype)
        if c.device.type == "cpu":
            # MKL takes few rows against a tall weight two to four times faster this way round, and two columns
            # three times faster than one, which goes to its matrix-vector product
            columns = (c if len(c) != 1 else torch.cat([c, c])).t()
            product = torch.addmm(both.bias.unsqueeze(1), both.weight, columns)
            return product[:, : len(c)].t().contiguous()
        return F.linear(c, both.weight, both.bias)

    def _fresh(self, weights: list[nn.Parameter], biases: list[nn.Parameter], device_type: str) -> _Concatenated:
        dtype = weights[0].dtype
        if dtype != torch.float64:  # which autocast leaves alone
            dtype = autocast_dtype(device_type) or dtype
        made = self.made
        if made is None or not made.is_fresh([*weights, *biases], dtype):
            made = self.made = None  # frees the old copy before the new one is made
            made = self.made = _Concatenated.build(weights, biases, dtype)
        return made
