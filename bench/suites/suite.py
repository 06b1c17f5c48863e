"""Common to all measured suites: limits, conditions before and after, saving after every row, continuing later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...console import progress, terminated_as_interrupted
from ..records.files import Older, Results
from ..records.machine import part

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from ..records.files import Ceilings, Suite

INTERRUPTED = 130
_REFRESH_SECONDS = 0.2

# where these differ, two parts are no one run
_SAME = (("gpu", "name"), ("packages", "torch"), ("packages", "triton"))
# where only these do, what was measured is kept, and measured again
_RENEWING = (("", "source"), ("gpu", "driver"), ("cpu", "model"), ("cpu", "torch_threads"))
_UNFINISHED = "of an earlier part, which did not come to the end of the case"
_SAME_SETTINGS = ("device", "seconds", "seed", "model", "dtype", "mode")


@dataclass
class Recorder:
    """Takes the rows of a run and saves them one after another.

    Attributes:
        results: the run so far.
        report: told of every step, for the progress bar.
        deadline: on the clock of time.monotonic, after which no further case should begin; None without one.
        cut: whether something was left out because of it.
    """

    results: Results
    device: torch.device
    path: Path | None
    precisions: list[str]
    report: Callable[[str], None]
    deadline: float | None = None
    cut: bool = False
    _known: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = {row.key: row for row in self.results.rows}

    def has(self, keys: Iterable[tuple[object, ...]]) -> bool:
        """Whether an earlier part has all of these rows; failed rows do not count."""
        rows = [self._known.get(key) for key in keys]
        return all(row is not None and getattr(row, "row", row).status != "error" for row in rows)

    def set_aside(self, keys: Iterable[tuple[object, ...]]) -> None:
        """Turns the rows of a case that begins again into older ones: they were not timed beside its new rows."""
        rows = {key: self._known.pop(key) for key in keys if key in self._known}
        others = [item for item in self.results.older if item.row.key not in rows]
        self.results.older = others + [Older(row, _UNFINISHED) for row in rows.values()]
        self.results.rows = list(self._known.values())

    def out_of_time(self) -> bool:
        """Whether the budget is spent; asked before each case or provider, which must then be left out."""
        self.cut = self.cut or (self.deadline is not None and time.monotonic() > self.deadline)
        return self.cut

    def measure_limits(self, seconds: float = 0.5) -> Ceilings | None:
        """Measures the limits again and keeps the highest: one measured on a busy machine is none."""
        from ..measure.ceilings import measure_ceilings
        from ..records.files import highest

        if self.precisions:
            measured = measure_ceilings(self.device, self.precisions, seconds)
            self.results.ceilings = highest(self.results.ceilings, measured)
        return self.results.ceilings

    def add(
        self,
        rows: Sequence[Any],
        shares: Callable[[list[Any], Ceilings], list[Any]] | None = None,
        so_far: bool = False,
    ) -> None:
        """Adds rows, in place of those that measure the same thing, and saves.

        Args:
            rows: of the suite's type.
            shares: recomputes all rows' shares of the limits, which are measured once more.
            so_far: more of these rows are to come, and the limits with them.
        """
        added = {row.key: row for row in rows}
        places = [place for place, key in enumerate(self._known) if key in added]
        entries = list(self._known.items())
        place = places[0] if places else len(entries)
        after = [item for item in entries[place:] if item[0] not in added]
        self._known = dict([*entries[:place], *added.items(), *after])
        self.results.rows = list(self._known.values())
        self.results.older = [item for item in self.results.older if item.row.key not in self._known]
        if shares is not None:
            ceilings = self.results.ceilings if so_far else self.measure_limits(_REFRESH_SECONDS)
            if ceilings is not None:
                self.results.rows = shares(self.results.rows, ceilings)
                self._known = {row.key: row for row in self.results.rows}
        self.save()

    def save(self) -> None:
        if self.path is not None:
            self.results.save(self.path)


def run_suite(
    suite: Suite,
    device: torch.device,
    settings: dict[str, Any],
    measure: Callable[[Recorder], None],
    tables: Callable[[Results], Sequence[RenderableType]],
    *,
    path: Path | None,
    steps: int,
    precisions: Sequence[str] = (),
    resume: bool = False,
    budget: float | None = None,
) -> Results:
    """Measures a suite from its limits to its table.

    Args:
        suite, device, settings: of the results.
        measure: does the work, adding rows.
        tables: what to print in the end.
        path: the result file, written after every row.
        steps: how often ``measure`` reports.
        precisions: of the matmuls to measure; without any no limits are measured.
        resume: go on with the file where it exists.
        budget: seconds after which no further case begins.

    Raises:
        ValueError: the file to go on with was measured under other conditions.
        typer.Exit: with 130 after an interruption; what was measured is saved and printed.
    """
    import torch

    from ...console import print_tables
    from ...environment import collect, gpu_readings

    if device.type == "cuda":
        torch.cuda.set_device(device)
    results = begin(suite, settings, path, resume)
    load = os.getloadavg()[0]  # other people's: from now on it is ours
    with terminated_as_interrupted():
        measured = len(results.rows)
        try:
            with progress(steps + 1) as report:
                deadline = None if budget is None else time.monotonic() + budget
                recorder = Recorder(results, device, path, list(dict.fromkeys(precisions)), report, deadline)
                recorder.measure_limits()
                results.environment = collect()  # after the limits: with the clocks of a busy device
                results.readings.append({"when": "before", **gpu_readings(), "load_1m": load})
                report("limits")
                measure(recorder)
            results.complete = not recorder.cut
        except KeyboardInterrupt:
            if len(results.rows) == measured:
                typer.echo("interrupted before the first rows", err=True)
                raise typer.Exit(INTERRUPTED) from None
            results.readings.append({"when": "after", **gpu_readings()})
            recorder.save()
            print_tables(*tables(results))
            raise typer.Exit(INTERRUPTED) from None
    results.readings.append({"when": "after", **gpu_readings()})
    recorder.save()
    print_tables(*tables(results))
    if path is not None:
        typer.echo(f"results: {path}", err=True)
    return results


def begin(suite: Suite, settings: dict[str, Any], path: Path | None, resume: bool) -> Results:
    """New results, or those to go on with. After a change of the sources their rows are older ones.

    Raises:
        ValueError: the file was measured under conditions that are not to be mixed with these, or is damaged.
    """
    from ...environment import collect

    if not resume or path is None or not path.exists():
        return Results(suite, collect(), settings)
    results = Results.load(path, suite)
    environment = collect()
    reasons = [differences(results.environment, environment)]
    for name in _SAME_SETTINGS:
        if results.settings.get(name) != settings.get(name):
            reasons.append(f"{name} was {results.settings.get(name)!r} there, is {settings.get(name)!r} here")
    if any(reasons):
        raise ValueError(f"--continue needs the conditions of {path}: {'; '.join(filter(None, reasons))}")
    if changed := renewing(results.environment, environment):
        results.older += [Older(row, changed) for row in results.rows]
        results.rows, results.ceilings = [], None
    results.environment, results.settings = environment, settings
    results.parts += 1
    results.complete = False
    return results


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Which of the conditions that make two parts one run differ between two environments; "" where none does."""
    return _changes(_SAME, then, now)


def renewing(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Which conditions have changed so that everything is to be measured again; "" where none has. One that cannot be
    read, as where nvidia-smi fails, has not."""
    return _changes(_RENEWING, then, now, unknown=(None,))


def _changes(
    names: Sequence[tuple[str, str]], then: dict[str, Any], now: dict[str, Any], unknown: Sequence[Any] = ()
) -> str:
    changes = []
    for group, name in names:
        was, is_now = ((part(where, group) if group else where).get(name) for where in (then, now))
        if was != is_now and was not in unknown and is_now not in unknown:
            changes.append(f"{f'{group} {name}'.strip()} was {was!r} there, is {is_now!r} here")
    return "; ".join(changes)
