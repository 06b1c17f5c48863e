"""Result files grouped by the machine they were measured on: different devices never share a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..records.compare import COMPARABLE, Comparison, compare
from ..records.files import Ceilings, Results, Suite, highest
from ..records.machine import device_label, is_gpu, is_traced, part
from .conditions import short_conditions


@dataclass(frozen=True)
class Run:
    """A result file: its name and its content."""

    name: str
    results: Results

    @property
    def remarks(self) -> list[str]:
        """Sentences that a reader must know before using the run."""
        remarks = []
        if not self.results.complete:
            remarks.append(f"{self.name} is not complete: it holds what was measured until it stopped.")
        if self.results.parts > 1:
            remarks.append(
                f"{self.name} was measured in {self.results.parts} parts by as many processes, one after another."
            )
        return remarks


@dataclass
class Machine:
    """The runs of one device under the same versions, no row twice; or runs that were computed without a device.

    Attributes:
        label: the device, and what tells it from another machine of the same device; unique in a report.
        identity: what the runs have in common; equal if a case was measured again.
        number: counts the machines of a report from 1.
    """

    label: str
    runs: list[Run] = field(default_factory=list)
    identity: tuple[object, ...] = ()
    number: int = 1

    def of(self, suite: Suite) -> list[Run]:
        return [run for run in self.runs if run.results.suite == suite]

    def rows(self, suite: Suite) -> list[Any]:
        return [row for run in self.of(suite) for row in run.results.rows]

    @property
    def ceilings(self) -> Ceilings | None:
        """The highest limits measured in its runs."""
        best = None
        for run in self.runs:
            if run.results.ceilings is not None:
                best = highest(best, run.results.ceilings)
        return best

    @property
    def environment(self) -> dict[str, Any]:
        return self.runs[0].results.environment

    @property
    def is_gpu(self) -> bool:
        return is_gpu(self.runs[0].results)

    @property
    def is_traced(self) -> bool:
        """Whether its runs were computed, not measured."""
        return is_traced(self.runs[0].results)

    @property
    def where(self) -> str:
        """Ends a title: "on Test GPU", or "traced, not measured"."""
        return "traced, not measured" if self.is_traced else f"on {self.label}"

    @property
    def short_conditions(self) -> str:
        return short_conditions(self)

    @property
    def remarks(self) -> list[str]:
        return [remark for run in self.runs for remark in run.remarks]


@dataclass(frozen=True)
class Compared:
    """A run beside an older one."""

    old: str
    new: str
    machine: str
    comparison: Comparison


@dataclass(frozen=True)
class Report:
    """The content of a report: the machines that measured, the computed runs, and the comparisons."""

    machines: list[Machine]
    computed: list[Machine]
    compared: list[Compared]

    @property
    def runs(self) -> list[Run]:
        return [run for machine in [*self.machines, *self.computed] for run in machine.runs]


def gather(runs: Iterable[Run], old: Iterable[Run] = ()) -> Report:
    """Groups the runs by machine and sets them beside the older ones.

    Raises:
        ValueError: no runs, or an older one without a counterpart of the same suite and device.
    """
    runs = list(runs)
    if not runs:
        raise ValueError("at least one result file is needed, got none")
    measured = _grouped([run for run in runs if not is_traced(run.results)], "measured")
    computed = _grouped([run for run in runs if is_traced(run.results)], "computed")
    measured.sort(key=lambda machine: not machine.is_gpu)
    for number, machine in enumerate([*measured, *computed], 1):
        machine.number = number
    return Report(measured, computed, [pair for item in old for pair in _compare(item, measured)])


def _grouped(runs: Iterable[Run], verb: str) -> list[Machine]:
    """The runs of one device and the same versions together, each with a label of its own."""
    machines: dict[tuple[object, ...], list[Machine]] = {}
    for run in runs:
        identity = _identity(run.results)
        alike = machines.setdefault(identity, [])
        # a row measured twice goes apart rather than in one of two figures
        machine = next((m for m in alike if not _overlap(m, run)), None)
        if machine is None:
            machine = Machine(device_label(run.results), identity=identity)
            alike.append(machine)
        machine.runs.append(run)
    labels: dict[str, list[list[Machine]]] = {}
    for alike in machines.values():
        labels.setdefault(alike[0].label, []).append(alike)
    for same in labels.values():
        for number, alike in enumerate(same, 1):
            for turn, machine in enumerate(alike):
                why = [f"versions {number} of {len(same)}"] if len(same) > 1 else []
                why += [f"{verb} again" + (f", {turn}" if turn > 1 else "")] if turn else []
                machine.label += f" ({'; '.join(why)})" if why else ""
    return [machine for alike in machines.values() for machine in alike]


def _identity(results: Results) -> tuple[object, ...]:
    environment = results.environment
    gpu, packages = part(environment, "gpu"), part(environment, "packages")
    parts = [device_label(results)]
    parts += [str(gpu.get(name)) for name in ("driver", "cuda")] if is_gpu(results) else []
    parts += [str(packages.get(name)) for name in ("torch", "triton", "diffusers")]
    parts += [str(environment.get(name)) for name in ("ditfast", "commit", "source")]
    return (*parts, bool(environment.get("dirty")))


def _overlap(machine: Machine, run: Run) -> bool:
    keys = {row.key for row in machine.rows(run.results.suite)}
    return any(row.key in keys for row in run.results.rows)


def _compare(old: Run, machines: Sequence[Machine]) -> list[Compared]:
    suite, device = old.results.suite, device_label(old.results)
    if suite not in COMPARABLE:
        raise ValueError(
            f"--compare {old.name}: must be of a suite with times ({', '.join(COMPARABLE)}), got {suite}"
        )
    pairs = []
    for machine in machines:
        for run in machine.of(suite):
            if device_label(run.results) == device:
                pairs.append(Compared(old.name, run.name, machine.label, compare(old.results, run.results)))
    if not pairs:
        raise ValueError(f"--compare {old.name}: none of the results is of the suite {suite} on {device}")
    # with several files of a suite, those that share no row with the old one say nothing
    return [pair for pair in pairs if pair.comparison.changes or pair.comparison.lost] or pairs
