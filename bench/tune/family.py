"""What ``ditfast tune`` must know of an operator: shapes, inputs, candidates and formula, and its key in a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ditfast.config import DiTConfig
from ditfast.kernels.configs import tables

from ...testing.operators import Inputs, Shape

Results = dict[str, Tensor]
C = TypeVar("C", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Target:
    """A GPU, as far as candidates depend on it: its name, compute capability (major) and multiprocessors."""

    name: str
    major: int
    multiprocessors: int


class Family(ABC, Generic[C]):
    """One operator of ``tables.OPERATORS``; C is its launcher's configuration, a named tuple."""

    operator: str

    @abstractmethod
    def shapes(self, config: DiTConfig, batch: int) -> list[Shape]:
        """What a model runs at a batch."""

    @abstractmethod
    def key(self, shape: Shape, dtype: torch.dtype) -> str:
        """The key by which the launcher looks the shape up."""

    def describe(self, shape: Shape) -> str:
        """The sizes that are measured."""
        return f"B={shape.batch} T={shape.tokens} D={shape.width}"

    @abstractmethod
    def heuristic(self, shape: Shape, dtype: torch.dtype, target: Target) -> C:
        """The choice where no table has one."""

    @abstractmethod
    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterable[C]:
        """What else to try, most promising first."""

    def candidates(self, shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, C]:
        """Label -> configuration, the heuristic's first."""
        configs = dict.fromkeys([self.heuristic(shape, dtype, target), *self.space(shape, dtype, target)])
        return {self.label(config): config for config in configs}

    @abstractmethod
    def fields(self, config: C) -> tables.Fields:
        """What a table says of a configuration."""

    @abstractmethod
    def label(self, config: C) -> str:
        """A configuration in a few words, the same only where the launch is."""

    @abstractmethod
    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """Random inputs."""

    @abstractmethod
    def call(self, config: C, inputs: Inputs) -> Any:
        """What is timed: one call of the operator as ``config`` says, whatever a table says."""

    @abstractmethod
    def results(self, config: C, inputs: Inputs) -> Results:
        """The outputs of :meth:`call`, of the rows that are judged."""

    def judged(self, inputs: Inputs) -> Inputs:
        """What :meth:`formula` takes for the rows that are judged: all of them, where an fp64 oracle fits."""
        return inputs

    @abstractmethod
    def formula(self, judged: Inputs) -> Results:
        """The same results by plain PyTorch, in the dtype of the inputs."""

    def conditions(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Switches of torch under which a table's entries in ``dtype`` are looked up."""
        return nullcontext()


def normal(size: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Standard normal values with the dtype and device of ``like``; other ones than draw_inputs' of the same seed."""
    generator = torch.Generator(like.device).manual_seed(seed + 1_000_000)
    return torch.randn(size, generator=generator, device=like.device).to(like.dtype)
