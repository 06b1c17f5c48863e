"""Tunes one shape: judges every candidate against fp64, times the right ones side by side, and names the best."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast.kernels.configs.tables import Fields

from ...parity import judge
from ...testing.operators import Inputs, Shape
from ..cases.transforms import captured
from ..measure.preparing import computes, explain
from ..measure.timing import AGAIN, Sampler, measure, noise, sampler, with_repeat
from ..records.rows import Spread
from .family import Family, Results, Target

_GROUP = 4  # candidates timed together at first: each one's graph holds outputs of its own
_FINALISTS = 4
_POOL_BYTES, _POOL_BYTES_CPU = 256 << 20, 1 << 20  # rotated inputs, on a GPU past any L2
_MAX_POOL = 192


@dataclass(frozen=True)
class Task:
    """One key to fill: an operator at one shape; ``model`` is the first in the plan that needs it."""

    family: Family[Any]
    shape: Shape
    dtype: torch.dtype
    model: str

    @property
    def key(self) -> str:
        return self.family.key(self.shape, self.dtype)


@dataclass(frozen=True)
class Outcome:
    """The measurement of a task.

    Attributes:
        winner, heuristic: labels.
        heuristic_ms: None if the heuristic's choice does not run, or is wrong.
        noise: of the heuristic's choice timed twice; of the fastest, if that one does not run.
        tried: candidates, the heuristic's included.
        out: label of a candidate that does not run or is wrong -> why.
    """

    winner: str
    fields: Fields
    ms: float
    heuristic: str
    heuristic_ms: float | None
    noise: float | None
    tried: int
    out: dict[str, str]

    @property
    def line(self) -> str:
        """For people."""
        if self.winner == self.heuristic:
            text = f"the heuristic's {self.winner}: {self.ms:.4g} ms"
        else:
            against = "which does not run" if self.heuristic_ms is None else f"{self.heuristic_ms:.4g} ms"
            text = f"{self.winner}: {self.ms:.4g} ms against the heuristic's {against}"
        if self.noise is not None:
            text += f", noise {self.noise:.1%}"
        return f"{text}; {_listed(self.out, self.tried)}" if self.out else text


class OutOfTime(Exception):
    """The deadline passed within a task, which stays unmeasured."""


class GpuLost(RuntimeError):
    """A candidate left the GPU in an error from which this process cannot go on."""


def measure_task(
    task: Task, target: Target, device: torch.device, seconds: tuple[float, float], deadline: float | None = None
) -> Outcome:
    """The best of a task's candidates.

    Args:
        seconds: for each candidate, in a first round and among the best.
        deadline: on the clock of time.monotonic.

    Raises:
        OutOfTime: at the deadline.
        GpuLost: a candidate broke the GPU's context.
        RuntimeError: no candidate runs and is right.
    """
    with torch.no_grad(), task.family.conditions(task.dtype):
        contest = _Contest(task, target, device, deadline)
        passing = contest.right()
        quick: dict[str, Spread] = {}
        for first in range(0, len(passing), _GROUP):
            quick |= contest.timed(passing[first : first + _GROUP], seconds[0])
        best = sorted(quick, key=lambda name: quick[name].median)[:_FINALISTS]
        heuristic = next(iter(contest.configs))
        base = heuristic if heuristic in quick or not best else best[0]
        times = contest.timed(list(dict.fromkeys([base, *best])), seconds[1], twice=base) if best else {}
    second = times.pop(base + AGAIN, None)
    if not times:
        raise RuntimeError(f"no candidate is right and runs; {_listed(contest.out, len(contest.configs))}")
    share = noise(times[base], second) if base in times and second is not None else None
    winner = choose(times, base, share)
    return Outcome(
        winner=winner,
        fields=task.family.fields(contest.configs[winner]),
        ms=times[winner].median,
        heuristic=heuristic,
        heuristic_ms=times[heuristic].median if heuristic in times else None,
        noise=share,
        tried=len(contest.configs),
        out=contest.out,
    )


def choose(times: dict[str, Spread], base: str, share: float | None) -> str:
    """The fastest, if it is faster than ``base`` by more than the noise (a share); else ``base``."""
    fastest = min(times, key=lambda name: times[name].median)
    if base not in times:
        return fastest
    return fastest if times[fastest].median * (1 + (share or 0.0)) < times[base].median else base


class _Contest:
    """The candidates of a task by their labels, the inputs, and ``out``: rejected candidates with reasons."""

    def __init__(self, task: Task, target: Target, device: torch.device, deadline: float | None) -> None:
        self.task, self.family, self.device, self.deadline = task, task.family, device, deadline
        self._check_time()
        self.configs = self.family.candidates(task.shape, task.dtype, target)
        self.pool = self._pool()
        self.out: dict[str, str] = {}

    def right(self) -> list[str]:
        """The candidates that run and give right results."""
        judged = self.family.judged(self.pool[0])
        yardstick = self.family.formula(judged)
        oracle = self.family.formula({name: value.double() for name, value in judged.items()})
        for name, config in self.configs.items():
            self._check_time()
            try:
                with _Poisoned():
                    results = self.family.results(config, self.pool[0])
                reason = self._wrong(results, yardstick, oracle)
                if reason:
                    self.out[name] = reason
            except Exception as error:  # such as too much shared memory: only this candidate fails
                self._reject(name, error)
        return [name for name in self.configs if name not in self.out]

    def timed(self, names: Sequence[str], seconds: float, twice: str | None = None) -> dict[str, Spread]:
        """Interleaved times of the candidates that do not fail; ``twice`` is timed twice, for the noise."""
        samplers: dict[str, Sampler] = {}
        for name in names:
            self._check_time()
            try:
                samplers[name] = self._sampler(self.configs[name])
            except Exception as error:  # whatever a capture forbids
                self._reject(name, error)
        self._check_time()
        if twice is not None and twice in samplers:
            samplers = with_repeat(samplers, twice)
        measured = measure(samplers, self.device, seconds)
        for name, failure in measured.failures.items():
            self._reject(name.removesuffix(AGAIN), failure)
        return {name: spread for name, spread in measured.times.items() if name.removesuffix(AGAIN) not in self.out}

    def _pool(self) -> list[Inputs]:
        """Random inputs, rotated so that each has left the cache before it comes round again."""
        task = self.task
        first = self.family.draw(task.shape, task.dtype, self.device, 0)
        limit = _POOL_BYTES if self.device.type == "cuda" else _POOL_BYTES_CPU
        count = min(max(2, math.ceil(limit / sum(value.nbytes for value in first.values()))), _MAX_POOL)
        return [first, *(self.family.draw(task.shape, task.dtype, self.device, seed) for seed in range(1, count))]

    def _wrong(self, results: Results, yardstick: Results, oracle: Results) -> str:
        """The violation of the numerics rule as a sentence, or ""."""
        if results.keys() != oracle.keys():
            return f"wrong: results must be {', '.join(oracle)}, got {', '.join(results)}"
        for name, value in results.items():
            verdict = judge("operator", value, yardstick[name], oracle[name], self.task.dtype)
            if not verdict.ok:
                return f"wrong: {name}: error {verdict.error:.1e} is above the bound {verdict.bound:.1e}"
        return ""

    def _sampler(self, config: Any) -> Sampler:
        """On a GPU it replays rounds over all inputs from a graph, so that the host's launches do not count."""
        count = len(self.pool)

        def call(number: int) -> object:
            return self.family.call(config, self.pool[number % count])

        if self.device.type != "cuda":
            return sampler(call, self.device)
        replay = captured(call, count)
        rounds = sampler(lambda number: replay(), self.device)

        def sample(calls: int) -> float:
            repeats = max(1, round(calls / count))
            return rounds(repeats) / (repeats * count) * calls

        return sample

    def _reject(self, name: str, error: BaseException) -> None:
        """Rejects a candidate; raises if every launch after it would fail as well."""
        self.out[name] = explain(error)[1]
        if not computes(self.device):
            raise GpuLost(f"{self.task.key}: {name} left the GPU in an error: {self.out[name]}") from None

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime


def _listed(out: dict[str, str], tried: int) -> str:
    label, reason = next(iter(out.items()), ("none", "no candidates"))
    return f"{len(out)} of {tried} out, the first {label}: {reason}"


class _Poisoned(TorchDispatchMode):
    """Fills fresh memory with NaN: an output left unwritten must not show the results of the candidate before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.startswith(("aten::empty", "aten::new_empty")) and result.is_floating_point():
            result.fill_(torch.nan)
        return result
