"""Whole sampling trajectories, timed side by side: loops as codebases write them beside ditfast's engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ditfast
from ditfast.config import DiTConfig
from ditfast.inference import Engine, Guidance, Sampler

from ...parity import Verdict, judge
from ..cases import diffusers_dit
from ..cases.case import Case
from ..cases.transforms import compile_unavailable
from ..cases.workload import Workload, build_model, copy_model
from ..measure.preparing import clear, explain
from ..measure.timing import AGAIN, measure, noise, sampler, with_repeat
from ..records.metrics import images_per_second, with_speedups
from ..records.rows import SampleRow

PROVIDERS = (
    "reference",
    "reference-compile",
    "diffusers",
    "ditfast-plain",
    "ditfast-table",
    "ditfast-graph",
    "ditfast",
)
_ENGINES = {  # name -> (schedule table, CUDA graphs)
    "ditfast-plain": (False, False),
    "ditfast-table": (True, False),
    "ditfast-graph": (False, True),
    "ditfast": (True, True),
}
_CHANNELS = 3  # guided, as in the official release
_MAX_JUDGED = 2  # images of a trajectory: fp64 is slow
_TABLE_MIB = 4096.0

#: (noise, labels, generators) -> latents
Trajectory = Callable[[Tensor, list[int], list[torch.Generator]], Tensor]
#: final latents (N, C, h, w), and the model's predictions (N, evaluations, C, h, w)
_Results = tuple[Tensor, Tensor]


class _Solver(Sampler):
    """A sampler that can keep the model's predictions: late ones hardly move the final latents, right or wrong."""

    predictions: ClassVar[list[Tensor] | None] = None

    def step(
        self, x: Tensor, output: Tensor, i: int, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        if _Solver.predictions is not None:
            _Solver.predictions.append(output[:, : x.shape[1]].clone())
        return super().step(x, output, i, generators)


@dataclass(frozen=True)
class SampleCase:
    """A trajectory: the model, the batch, and how it is sampled."""

    config: DiTConfig
    batch: int
    dtype: torch.dtype
    sampler: str
    steps: int
    cfg_scale: float

    def solver(self, device: torch.device | str) -> Sampler:
        return _Solver(self.sampler, self.steps, in_channels=self.config.in_channels, device=device)

    @property
    def label(self) -> str:
        return f"{self.config.name}, batch {self.batch}, {self.steps} steps of {self.sampler}"

    def row(self, provider: str) -> SampleRow:
        """One that has not run."""
        how: dict[str, Any] = {"sampler": self.sampler, "steps": self.steps, "cfg_scale": self.cfg_scale}
        columns = Case(self.config, self.batch, self.dtype, "forward").columns | how
        del columns["mode"]
        return SampleRow(**columns, provider=provider, status="error")


def unavailable(provider: str, case: SampleCase, device: torch.device) -> str | None:
    """Why a provider cannot run here, or None."""
    if (reason := diffusers_dit.missing()) is not None:  # everybody's solvers are diffusers'
        return reason
    if provider == "diffusers":
        return diffusers_dit.unavailable(Case(case.config, case.batch, case.dtype, "cfg"), device)
    if provider == "reference-compile":
        return compile_unavailable(device)
    if provider in _ENGINES and _ENGINES[provider][1] and device.type != "cuda":
        return None if provider == "ditfast" else "CUDA graphs need a GPU"
    if provider == "ditfast-table" and device.type != "cuda":
        return "without graphs it is what ditfast runs here"
    return None


def loop(model: Any, case: SampleCase, device: torch.device, step: Callable[..., Tensor] | None = None) -> Trajectory:
    """The loop as codebases write it, with the model's own guidance; ``step`` in place of its ``forward_with_cfg``."""
    solver = case.solver(device)
    evaluate = step or model.forward_with_cfg
    dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def run(start: Tensor, labels: list[int], generators: list[torch.Generator]) -> Tensor:
        x, y = solver.start(start), torch.tensor(labels, device=start.device)
        for i, t in enumerate(solver.timesteps):
            inputs = solver.model_input(x, i).to(dtype)
            output = evaluate(torch.cat([inputs, inputs]), t.expand(2 * len(y)), y, case.cfg_scale, _CHANNELS)
            x = solver.step(x, output[: len(y)].to(x.dtype), i, generators)
        return x

    return run


def build(provider: str, case: SampleCase, model: ditfast.reference.DiT, device: torch.device) -> Trajectory:
    """A provider with the reference's weights."""
    if provider == "reference":
        return loop(model, case, device)
    if provider == "reference-compile":
        step = torch.compile(model.forward_with_cfg, fullgraph=True, dynamic=False)
        return loop(model, case, device, step)
    if provider == "diffusers":
        work = Workload(Case(case.config, case.batch, case.dtype, "cfg"), device, model, [])
        return loop(diffusers_dit.wrap(work), case, device)
    with torch.device("meta"):
        fast = ditfast.DiT(case.config)
    fast.load_state_dict(model.state_dict(), assign=True)
    table, graphs = _ENGINES[provider]
    solver = case.solver(device)
    guidance = Guidance(case.cfg_scale, channels=_CHANNELS, span=solver.span)
    return Engine(fast.eval(), solver, guidance, table_mib=_TABLE_MIB if table else 0, graphs=graphs)


def rows(
    case: SampleCase, providers: Sequence[str], device: torch.device, seconds: float, seed: int = 0
) -> list[SampleRow]:
    """Every provider's trajectory timed beside the others', each with its parity.

    Noise and labels change from trajectory to trajectory.

    Args:
        seconds: for each provider; three trajectories are timed all the same.
    """
    model = build_model(case.config, device, case.dtype, seed)
    _tame(model)
    results = {name: case.row(name) for name in providers}
    judged = _Judge(case, model, device, seed)
    running: dict[str, Callable[[int], float]] = {}
    for name in providers:
        reason = unavailable(name, case, device)
        if reason is not None:
            results[name] = replace(results[name], status="unavailable", note=reason)
            continue
        try:
            run = build(name, case, model, device)
            verdict = judged(run, name)
            results[name] = replace(
                results[name],
                error=verdict.error,
                bound=verdict.bound,
                parity=verdict.ok,
                parity_samples=len(judged.images),
            )
            running[name] = sampler(_call(run, case, device, seed), device)
        except Exception as error:  # a provider's failure is its row
            status, note = explain(error)
            results[name] = replace(case.row(name), status=status, note=note)
    first = next(iter(running), None)
    measured = measure(with_repeat(running, first) if first else running, device, seconds)
    second = measured.times.pop(f"{first}{AGAIN}", None)
    share = noise(measured.times[first], second) if first in measured.times and second else None
    for name, spread in measured.times.items():
        rate = images_per_second(case.batch, spread.median)
        results[name] = replace(results[name], status="ok", ms=spread, images_per_s=rate, noise=share)
    for name, failure in measured.failures.items():
        if name in results:
            status, note = explain(failure)
            results[name] = replace(case.row(name), status=status, note=note)
    clear(device)
    return with_speedups(results.values())


def _call(run: Trajectory, case: SampleCase, device: torch.device, seed: int) -> Callable[[int], object]:
    return lambda number: run(*_inputs(case, device, seed + 1 + number))


def _inputs(case: SampleCase, device: torch.device, seed: int) -> tuple[Tensor, list[int], list[torch.Generator]]:
    """Noise, labels, and a generator an image."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.config.in_channels, *case.config.latent_hw)
    noise = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(0, case.config.num_classes, (case.batch,), generator=generator).tolist()
    return noise, labels, [torch.Generator().manual_seed(seed * case.batch + i) for i in range(case.batch)]


@torch.no_grad()
def _tame(model: nn.Module) -> None:
    """Random predictions of order one would be amplified from step to step until rounding is all there is."""
    model.final_layer.linear.weight.mul_(0.1)  # type: ignore[operator, union-attr]


class _Judge:
    """Some images of the batch by the rule for models: final latents, and the predictions of all steps.

    The oracle is the reference in fp64.
    """

    def __init__(self, case: SampleCase, model: ditfast.reference.DiT, device: torch.device, seed: int) -> None:
        count = min(case.batch, _MAX_JUDGED)
        self.images = [round(i * (case.batch - 1) / max(count - 1, 1)) for i in range(count)]
        self._case, self._model, self._device, self._seed = case, model, device, seed
        self._standards: dict[bool, tuple[_Results, _Results]] = {}

    def __call__(self, run: Trajectory, provider: str) -> Verdict:
        inputs = _inputs(self._case, self._device, self._seed)
        results = [values[self.images] for values in _with_predictions(run, *inputs)]
        own_constants = provider == "diffusers"
        if own_constants not in self._standards:
            dtypes = (self._case.dtype, torch.float64)
            yardstick, exact = (self._standard(dtype, own_constants) for dtype in dtypes)
            self._standards[own_constants] = (yardstick, exact)
        yardstick, exact = self._standards[own_constants]
        latents, predictions = (
            judge("model", *values, self._case.dtype) for values in zip(results, yardstick, exact, strict=True)
        )
        return predictions if latents.ok and not predictions.ok else latents

    def _standard(self, dtype: torch.dtype, own_constants: bool) -> _Results:
        constants: Mapping[str, float] = diffusers_dit.CONSTANTS if own_constants else {}
        model = copy_model(self._model, dtype, **constants)
        start, labels, generators = _inputs(self._case, self._device, self._seed)
        picked = [[values[i] for i in self.images] for values in (labels, generators)]
        # the solver in fp32 for the oracle too: in fp64 an ancestral one would draw other noise
        return _with_predictions(loop(model, self._case, self._device), start[self.images], *picked)


def _with_predictions(run: Trajectory, *inputs: Any) -> _Results:
    _Solver.predictions = []
    try:
        return run(*inputs), torch.stack(_Solver.predictions, dim=1)
    finally:
        _Solver.predictions = None
