"""``ditfast tune``: the plan in order of value, and its run, which saves the winner of each shape at once.

A run may be interrupted at any time and continued later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from ditfast.config import DiTConfig
from ditfast.kernels.launch import gpu

from ..measure.preparing import clear, explain
from .adaln import AdaLNBackward, AdaLNForward
from .attention import AttentionBackward, AttentionChoice, AttentionForward
from .family import Family, Target
from .linear import LinearGatedResidual, LinearGelu, LinearGeluBackward, Modulations
from .measure import GpuLost, OutOfTime, Task, measure_task
from .table import Table

#: In order of value: the operators of ditfast.DiT, then those that only callers of ditfast.ops use.
FAMILIES: tuple[tuple[Family[Any], ...], ...] = (
    (
        LinearGelu(),
        LinearGelu("linear_gelu_save", save=True),
        LinearGeluBackward(),
        AdaLNForward(),
        AdaLNBackward(),
        AttentionForward(),
        AttentionBackward(),
        AttentionBackward("attention_dkv"),
        AttentionChoice(),
        AttentionChoice("attention_training"),
        Modulations(),
    ),
    (LinearGatedResidual(), LinearGatedResidual("linear_gated_residual_save", save=True)),
)
#: 1 to 256, those that are benchmarked first.
BATCHES = (256, 128, 1, 32, 64, 8, 16, 2, 4)
#: What a plan without a GPU is for: the numbers of an A100, and of an H100 or H200.
ARCHITECTURES = {"sm_80": Target("sm_80", 8, 108), "sm_90": Target("sm_90", 9, 132)}
#: For each candidate of a shape, in a first round and among the best.
SECONDS = (0.05, 0.3)


def target_of(device: torch.device) -> Target:
    """The GPU behind a CUDA device."""
    properties = gpu(device.index or 0)
    return Target(properties.name, properties.capability[0], properties.multiprocessors)


def plan(
    models: Mapping[str, DiTConfig],
    dtypes: Iterable[torch.dtype],
    batches: Sequence[int] = BATCHES,
    families: Sequence[Sequence[Family[Any]]] | None = None,
) -> list[Task]:
    """The tasks in order of value, each key once.

    By dtype, then groups of families, then models (the widest first), then batches, each in the order given.
    """
    widest_first = sorted(models.items(), key=lambda item: (-item[1].hidden_size, -item[1].num_tokens))
    tasks: dict[str, Task] = {}
    for dtype, group, (name, config), batch in product(dtypes, families or FAMILIES, widest_first, batches):
        for family in group:
            for shape in family.shapes(config, batch):
                task = Task(family, shape, dtype, name)
                tasks.setdefault(task.key, task)
    return list(tasks.values())


def run(
    tasks: Sequence[Task],
    target: Target,
    device: torch.device,
    table: Table,
    report: Callable[[str], None],
    budget: float | None = None,
    seconds: tuple[float, float] | None = None,
) -> tuple[int, int]:
    """Measures the tasks in turn, each winner saved in the table; returns how many were measured and how many failed.

    Args:
        report: called with a line for every task.
        budget: seconds after which the run ends; the shape in hand stays unmeasured.
        seconds: for each candidate, in a first round and among the best; SECONDS by default.

    Raises:
        GpuLost: a candidate broke the GPU's context; what was measured before is saved.
    """
    deadline = None if budget is None else time.monotonic() + budget
    measured = failed = 0
    for number, task in enumerate(tasks, 1):
        shape = task.family.describe(task.shape)
        try:
            outcome = measure_task(task, target, device, seconds or SECONDS, deadline)
        except OutOfTime:
            break
        except GpuLost:
            raise
        except Exception as error:  # such as inputs that do not fit: the next shape may
            failed += 1
            line = f"not measured: {explain(error)[1]}"
        else:
            measured += 1
            line = outcome.line
            times = {"ms": outcome.ms, "heuristic_ms": outcome.heuristic_ms, "noise": outcome.noise}
            table.add(task.key, outcome.fields, times, shape)
        report(f"[{number}/{len(tasks)}] {task.key} ({shape}): {line}")
        clear(device)
    return measured, failed
