"""Result files grouped by the machine they were measured on: different devices never share a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ceilings import Ceilings, highest
from ..compare import COMPARABLE, Comparison, compare
from ..records import Results, Suite
from .text import digits

_PACKAGES = ("torch", "triton", "diffusers", "flash-attn")
_READINGS = (
    ("sm_clock_mhz", "SM {} MHz"),
    ("memory_clock_mhz", "memory {} MHz"),
    ("power_draw_w", "{} W"),
    ("temperature_c", "{} °C"),
)


@dataclass(frozen=True)
class Run:
    """A result file: its name, and what it holds."""

    name: str
    results: Results

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before using it."""
        found = []
        if not self.results.complete:
            found.append(f"{self.name} is not complete: it holds what was measured until it stopped.")
        if self.results.parts > 1:
            found.append(
                f"{self.name} was measured in {self.results.parts} parts by as many processes, one after another."
            )
        return found


@dataclass
class Machine:
    """The runs of one device under the same versions, no row twice."""

    label: str
    runs: list[Run] = field(default_factory=list)

    def of(self, suite: Suite) -> list[Run]:
        return [run for run in self.runs if run.results.suite == suite]

    def rows(self, suite: Suite) -> list[Any]:
        return [row for run in self.of(suite) for row in run.results.rows]

    @property
    def ceilings(self) -> Ceilings | None:
        """The highest of those measured in its runs."""
        best = None
        for run in self.runs:
            if run.results.ceilings is not None:
                best = highest(best, run.results.ceilings)
        return best

    @property
    def environment(self) -> dict[str, Any]:
        return self.runs[0].results.environment

    @property
    def short_conditions(self) -> str:
        """Device and versions in a line, as printed under every plot."""
        gpu, packages = part(self.environment, "gpu"), part(self.environment, "packages")
        facts = [self.label]
        if is_gpu(self.runs[0].results):
            facts += [
                f"{name} {gpu[key]}" for key, name in (("driver", "driver"), ("cuda", "CUDA")) if gpu.get(key)
            ]
        facts += [f"{name} {packages[name]}" for name in ("torch", "triton") if packages.get(name)]
        return ", ".join([*facts, version(self.environment)])


@dataclass(frozen=True)
class Compared:
    """A run beside an older one."""

    old: str
    new: str
    machine: str
    comparison: Comparison


@dataclass(frozen=True)
class Report:
    """What is rendered: the machines that measured, what was computed without one, and the comparisons."""

    machines: list[Machine]
    computed: list[Run]
    compared: list[Compared]

    @property
    def runs(self) -> list[Run]:
        return [run for machine in self.machines for run in machine.runs] + self.computed


def part(environment: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within an environment; empty where it is absent or something else."""
    found = environment.get(name)
    return found if isinstance(found, dict) else {}


def is_gpu(results: Results) -> bool:
    on_cpu = str(results.settings.get("device", "")).startswith("cpu")
    return bool(part(results.environment, "gpu").get("name")) and not on_cpu


def device_label(results: Results) -> str:
    """The GPU's name, or the processor and the threads in use."""
    if is_gpu(results):
        return str(part(results.environment, "gpu")["name"])
    cpu = part(results.environment, "cpu")
    return (
        f"{cpu.get('model') or 'unnamed CPU'}, {cpu.get('torch_threads') or 'an unknown number of'} threads"
    )


def version(environment: dict[str, Any]) -> str:
    """Version and commit: ditfast 0.1 (1a2b3c4d5)."""
    commit = environment.get("commit")
    dirty = " with uncommitted changes" if environment.get("dirty") else ""
    where = f" ({str(commit)[:9]}{dirty})" if commit else ""
    return f"ditfast {environment.get('ditfast') or 'of an unknown version'}{where}"


def conditions(machine: Machine) -> list[tuple[str, str]]:
    """(name, value) of everything that was in force; what is unknown is left out."""
    environment = machine.environment
    gpu, cpu, packages = (part(environment, name) for name in ("gpu", "cpu", "packages"))
    found = [("device", machine.label)]
    if is_gpu(machine.runs[0].results):
        memory = gpu.get("memory_bytes")
        found += [
            (name, str(gpu[key])) for key, name in (("driver", "driver"), ("cuda", "CUDA")) if gpu.get(key)
        ]
        if isinstance(memory, (int, float)):
            found.append(("memory", f"{memory / 2**30:.0f} GiB"))
        if gpu.get("power_limit_w"):
            found.append(("power limit", f"{gpu['power_limit_w']:g} W"))
        if cpu.get("model"):
            found.append(("host", f"{cpu['model']}, {cpu.get('torch_threads')} threads"))
    found += [(name, str(packages[name])) for name in _PACKAGES if packages.get(name)]
    found.append(("ditfast", version(environment).removeprefix("ditfast ")))
    found += [
        (name, str(environment[key]))
        for key, name in (("python", "Python"), ("os", "system"))
        if environment.get(key)
    ]
    if (limits := limits_text(machine.ceilings)) is not None:
        found.append(("limits, measured in the same runs", limits))
    for run in machine.runs:
        before, after = (_reading(run.results.readings, when) for when in ("before", "after"))
        if before or after:
            found.append(
                (f"clocks, {run.name}", f"before: {before or 'not read'}; after: {after or 'not read'}")
            )
    return found


def limits_text(ceilings: Ceilings | None) -> str | None:
    if ceilings is None:
        return None
    matmul = "".join(
        f"; matmul {name} {digits(rate)} TFLOP/s" for name, rate in ceilings.matmul_tflops.items()
    )
    return f"copy {digits(ceilings.copy_gb_per_s)} GB/s{matmul}"


def _reading(readings: Sequence[dict[str, Any]], when: str) -> str:
    """The first reading before, or the last one after; empty where there is none."""
    found = [reading for reading in readings if reading.get("when") == when]
    if not found:
        return ""
    chosen = found[0 if when == "before" else -1]
    values = [(text, chosen.get(key)) for key, text in _READINGS]
    return ", ".join(
        text.format(f"{value:,.0f}") for text, value in values if isinstance(value, (int, float))
    )


def gather(runs: Iterable[Run], old: Iterable[Run] = ()) -> Report:
    """Groups the runs by machine and sets them beside the older ones.

    Raises:
        ValueError: no runs, or an older one without a counterpart of the same suite and device.
    """
    machines: dict[tuple[object, ...], list[Machine]] = {}
    computed = []
    for run in runs:
        if run.results.suite == "cost":
            computed.append(run)
            continue
        alike = machines.setdefault(_identity(run.results), [])
        # a row measured twice goes apart rather than in one of two figures
        machine = next((m for m in alike if not _overlap(m, run)), None)
        if machine is None:
            machine = Machine(device_label(run.results))
            alike.append(machine)
        machine.runs.append(run)
    found = [machine for alike in machines.values() for machine in alike]
    if not found and not computed:
        raise ValueError("at least one result file is needed, got none")
    for label in {machine.label for machine in found}:
        same = [machine for machine in found if machine.label == label]
        for number, machine in enumerate(same, 1):
            machine.label = label if len(same) == 1 else f"{label} (set {number} of {len(same)})"
    found.sort(key=lambda machine: not is_gpu(machine.runs[0].results))
    return Report(found, computed, [pair for item in old for pair in _compare(item, found)])


def _identity(results: Results) -> tuple[object, ...]:
    environment = results.environment
    gpu, packages = part(environment, "gpu"), part(environment, "packages")
    versions = (gpu.get("driver"), gpu.get("cuda")) if is_gpu(results) else ()
    names = (
        packages.get("torch"),
        packages.get("triton"),
        environment.get("ditfast"),
        environment.get("commit"),
    )
    return (device_label(results), *map(str, (*versions, *names)))


def _overlap(machine: Machine, run: Run) -> bool:
    keys = {row.key for row in machine.rows(run.results.suite)}
    return any(row.key in keys for row in run.results.rows)


def _compare(old: Run, machines: Sequence[Machine]) -> list[Compared]:
    suite, device = old.results.suite, device_label(old.results)
    if suite not in COMPARABLE:
        raise ValueError(
            f"--compare {old.name}: must be of a suite with times ({', '.join(COMPARABLE)}), got {suite}"
        )
    found = []
    for machine in machines:
        for run in machine.of(suite):
            if device_label(run.results) == device:
                found.append(Compared(old.name, run.name, machine.label, compare(old.results, run.results)))
    if not found:
        raise ValueError(f"--compare {old.name}: none of the results is of the suite {suite} on {device}")
    # with several files of a suite, those that share no row with the old one say nothing
    return [pair for pair in found if pair.comparison.changes or pair.comparison.lost] or found
