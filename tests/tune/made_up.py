"""An operator with made-up candidates, and a GPU that is not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ditfast import DiTConfig
from ditfast.bench.tune import plan
from ditfast.bench.tune.family import Family, Results, Target
from ditfast.bench.tune.measure import Task
from ditfast.bench.tune.table import Table
from ditfast.kernels import launch
from ditfast.kernels.configs import tables
from ditfast.ops import attention_implementations as attention_choice
from ditfast.testing.operators import Inputs, Shape

CPU = torch.device("cpu")
GPU = Target("NVIDIA H200", 9, 132)
BRIEF = (1e-4, 1e-4)


class Choice(NamedTuple):
    """A candidate that doubles: how long it takes, and what is wrong with it."""

    warps: int
    seconds: float = 0.0
    factor: float = 2.0
    error: str = ""
    writes: bool = True


HEURISTIC = Choice(1, seconds=4e-3)
FAST = Choice(2)


@dataclass(frozen=True)
class Doubling(Family[Choice]):
    """Stands for an operator, with candidates as a test wants them; ``hook`` is called before each draw."""

    choices: tuple[Choice, ...] = (HEURISTIC, FAST)
    hook: Callable[[Shape], None] = lambda shape: None
    operator: str = "adaln_bwd"

    def shapes(self, config: DiTConfig, batch: int) -> list[Shape]:
        return [Shape(batch, config.num_tokens * batch, 4)]

    def key(self, shape: Shape, dtype: torch.dtype) -> str:
        return tables.table_key(self.operator, dtype, (shape.width,), (shape.tokens,))

    def heuristic(self, shape: Shape, dtype: torch.dtype, target: Target) -> Choice:
        return self.choices[0]

    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> tuple[Choice, ...]:
        return self.choices

    def fields(self, config: Choice) -> dict[str, Any]:
        return {"num_warps": config.warps}

    def label(self, config: Choice) -> str:
        return f"{config.warps} warps"

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        if seed == 0:
            self.hook(shape)
        return {"x": torch.randn(shape.tokens, shape.width, generator=torch.Generator().manual_seed(seed)).to(dtype)}

    def call(self, config: Choice, inputs: Inputs) -> Tensor:
        time.sleep(config.seconds)
        if config.error:
            raise RuntimeError(config.error)
        y = torch.empty_like(inputs["x"])
        return torch.mul(inputs["x"], config.factor, out=y) if config.writes else y

    def results(self, config: Choice, inputs: Inputs) -> Results:
        return {"y": self.call(config, inputs)}

    def formula(self, judged: Inputs) -> Results:
        return {"y": judged["x"] * 2}


def task(*choices: Choice, tokens: int = 8, **fields: Any) -> Task:
    family = Doubling(choices, **fields) if choices else Doubling(**fields)
    return Task(family, Shape(1, tokens, 4), torch.float32, "DiT")


def new_table(path: Path) -> Table:
    return Table.open(path, GPU.name, {"gpu": {"name": GPU.name}})


def run(tasks: list[Task], table: Table, **options: Any) -> tuple[tuple[int, int], list[str]]:
    lines: list[str] = []
    return plan.run(tasks, GPU, CPU, table, lines.append, seconds=BRIEF, **options), lines


def pretend(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Look-ups find an H200, whose table is in the folder."""
    patch.setattr(tables, "CONFIGS", folder)
    h200 = launch.Gpu(GPU.name, (GPU.major, 0), GPU.multiprocessors)
    for module in (launch, plan):
        patch.setattr(module, "gpu", lambda index: h200)
    patch.setattr(attention_choice, "machine_reason", lambda backend, gpu: None)
