"""An operator as ``ditfast tune`` sees it: shapes, inputs, candidates and formula, and its key in a table."""

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
    """The properties of a GPU that candidates depend on: name, compute capability (major) and multiprocessors."""

    name: str
    major: int
    multiprocessors: int


class Family(ABC, Generic[C]):
    """One operator of ``tables.OPERATORS``; C is its launcher's configuration, a named tuple."""

    operator: str

    @abstractmethod
    def shapes(self, config: DiTConfig, batch: int) -> list[Shape]:
        """The shapes of a model at a batch."""

    @abstractmethod
    def key(self, shape: Shape, dtype: torch.dtype) -> str:
        """The key by which the launcher looks the shape up."""

    def describe(self, shape: Shape) -> str:
        """The sizes that are measured."""
        return f"B={shape.batch} T={shape.tokens} D={shape.width}"

    @abstractmethod
    def heuristic(self, shape: Shape, dtype: torch.dtype, target: Target) -> C:
        """The choice without a table."""

    @abstractmethod
    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterable[C]:
        """The other configurations to try, most promising first."""

    def candidates(self, shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, C]:
        """Label -> configuration, the heuristic's first."""
        configs = dict.fromkeys([self.heuristic(shape, dtype, target), *self.space(shape, dtype, target)])
        return {self.label(config): config for config in configs}

    @abstractmethod
    def fields(self, config: C) -> tables.Fields:
        """A configuration as a table's entry."""

    @abstractmethod
    def label(self, config: C) -> str:
        """A configuration in a few words; equal labels mean equal launches."""

    @abstractmethod
    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """Random inputs."""

    @abstractmethod
    def call(self, config: C, inputs: Inputs) -> Any:
        """The timed call: the operator with ``config``, without regard to tables."""

    @abstractmethod
    def results(self, config: C, inputs: Inputs) -> Results:
        """The outputs of :meth:`call` for the judged rows."""

    def judged(self, inputs: Inputs) -> Inputs:
        """The inputs of :meth:`formula` for the judged rows: all rows, if an fp64 oracle fits in memory."""
        return inputs

    @abstractmethod
    def formula(self, judged: Inputs) -> Results:
        """The results in plain PyTorch, in the dtype of the inputs."""

    def conditions(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Switches of torch under which a table's entries in ``dtype`` are looked up."""
        return nullcontext()


def normal(size: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Standard normal values in ``like``'s dtype and on its device; they differ from draw_inputs' of the same seed."""
    generator = torch.Generator(like.device).manual_seed(seed + 1_000_000)
    return torch.randn(size, generator=generator, device=like.device).to(like.dtype)
