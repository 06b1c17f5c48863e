"""The loop over cases: in each, every provider is built and judged, then all of them are timed side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ..cases.case import Case
from ..cases.providers import Provider
from ..cases.workload import Workload
from ..records.metrics import images_per_second, tflops, with_speedups
from ..records.rows import ModelRow, Spread, is_ours
from .flops import flops_per_image
from .isolation import Isolate, ProviderFailed, Remote, Worker, wants_isolation
from .judging import Judge
from .preparing import UNJUDGED, Prepared, blank_row, clear, empty_cache, failed, make_work, prepare
from .timing import AGAIN, Clock, Sampler, measure, noise, with_repeat

#: Called with what is being done, after each of the :func:`steps` of a run.
Report = Callable[[str], None]

_TIGHT = 0.8  # share of the device's memory from which on the providers of a case hand theirs back between samples
_ALONE = "timed alone: beside the others memory did not suffice"


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        seconds: time for each variant.
        seed: of weights and inputs.
        isolate: which providers run in processes of their own: "auto", "all" or "none".
        plugins: what such a process loads to know its provider.
        clock: for tests, in place of the device's.
    """

    seconds: float = 1.0
    seed: int = 0
    isolate: Isolate = "auto"
    plugins: tuple[str, ...] = ()
    clock: Clock | None = None


@dataclass
class _Workers:
    """The processes of a run, one a provider, kept from case to case; a dead one is replaced when asked for."""

    device: torch.device
    settings: Settings
    running: dict[str, Worker] = field(default_factory=dict)

    def get(self, provider: str) -> Worker:
        worker = self.running.get(provider)
        if worker is None or not worker.alive:
            worker = Worker(provider, self.device, self.settings.seed, self.settings.plugins)
            self.running[provider] = worker
        return worker

    def stop(self, provider: str) -> None:
        worker = self.running.pop(provider, None)
        if worker is not None:
            worker.close()

    def close(self) -> None:
        for worker in self.running.values():
            worker.end()  # all of them first, so that they end side by side
        for provider in list(self.running):
            self.stop(provider)


def steps(cases: Sequence[Case], providers: Sequence[Provider]) -> int:
    """How often :meth:`Runner.rows` reports: once a provider and once for the timing, in each case."""
    return len(cases) * (len(providers) + 1)


class Runner:
    """Measures cases one after another; a context manager, at whose end the workers' processes end.

    Args:
        device: a CPU or CUDA device.
        settings: how to measure.
    """

    def __init__(self, device: torch.device, settings: Settings | None = None) -> None:
        self._device, self._settings = device, settings or Settings()
        self._workers = _Workers(device, self._settings)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()

    def rows(
        self,
        case: Case,
        providers: Sequence[Provider],
        report: Report = lambda step: None,
        out_of_time: Callable[[], bool] = lambda: False,
        save: Callable[[list[ModelRow]], None] | None = None,
    ) -> list[ModelRow]:
        """Measures every provider on a case, ours first.

        Args:
            case, providers: what to measure; the order of the rows.
            report: told what was done, for a progress bar.
            out_of_time: asked before each provider but the first; from then on those that are ready are timed.
            save: handed the rows so far whenever another provider is ready: all that are have then been timed side by
                side, ours at first without a rival. Without it they are timed once, in the end.

        Returns:
            a row for each that was begun, without shares of the ceilings (see metrics.with_shares). A provider that
            runs out of memory, fails or cannot run here has a row that says so.
        """
        run = _Run(case, providers, self._device, self._settings, self._workers, report, out_of_time, save)
        return run.rows()

    def warm_up(self, cases: Sequence[Case], providers: Sequence[Provider], report: Report) -> list[str]:
        """Has each provider make its first steps in each case, in a process of its own beside the others'.

        Nothing is judged or timed; what compiles fills its caches. Returns what failed, as sentences.
        """
        failures = []
        for case in cases:
            able = [provider.name for provider in providers if provider.unavailable(case, self._device) is None]
            workers = {name: self._workers.get(name) for name in able}
            for worker in workers.values():
                worker.begin_trial(case)
            for name, worker in workers.items():
                try:
                    worker.finish_trial()
                except ProviderFailed as error:
                    failures.append(f"{case.label}: {name}: {error.note}")
                    self._workers.stop(name)
                report(f"{case.label}: {name}")
        return failures


class _Run:
    """One case."""

    def __init__(
        self,
        case: Case,
        providers: Sequence[Provider],
        device: torch.device,
        settings: Settings,
        workers: _Workers,
        report: Report,
        out_of_time: Callable[[], bool],
        save: Callable[[list[ModelRow]], None] | None,
    ) -> None:
        self._case, self._providers, self._device, self._out_of_time = case, providers, device, out_of_time
        self._settings, self._workers, self._report, self._save = settings, workers, report, save
        self._rows = {provider.name: blank_row(case, provider) for provider in providers}
        self._work: tuple[Workload, Judge] | None = None
        self._begun: set[str] = set()  # whose rows say what became of them
        self._crowded = False  # whether a provider had neighbours in memory

    def rows(self) -> list[ModelRow]:
        """Measures; the rows in the order of the providers."""
        able = [provider for provider in self._providers if self._is_able(provider)]
        with self._cleared():
            self._measure(able)
        for provider in able if self._crowded else ():
            row = self._rows.get(provider.name)
            if row is None or not (row.status == "oom" or row.note == UNJUDGED) or self._out_of_time():
                continue
            # what its neighbours held may have been what was missing
            with self._cleared():
                self._measure([provider], _ALONE)
            if row.status == "ok" and self._rows[provider.name].parity is None:
                self._rows[provider.name] = row  # timed side by side, at least
        self._say("timed side by side" if able else "nothing to time")
        return self._so_far()

    def _is_able(self, provider: Provider) -> bool:
        reason = provider.unavailable(self._case, self._device)
        if reason is not None:
            self._begun.add(provider.name)
            self._rows[provider.name] = replace(self._rows[provider.name], status="unavailable", note=reason)
            self._say(f"{provider.name}: {reason}")
        return reason is None

    def _measure(self, providers: Sequence[Provider], note: str = "") -> None:
        """Fills the rows of the providers that run; with a note, of those that had failed beside others."""
        prepared: dict[str, Prepared | Remote] = {}
        try:
            for provider in providers:
                if self._isolates(provider):
                    self._workers.get(provider.name)  # they import torch while the first is prepared
            # ours first: a run may be over before the rivals are compiled
            for provider in sorted(providers, key=lambda provider: not is_ours(provider.name)):
                name = provider.name
                if prepared and self._out_of_time():
                    del self._rows[name]  # not measured, and not said to be
                    continue
                self._begun.add(name)
                try:
                    prepared[name] = self._prepare(provider)
                except Exception as error:  # a provider's failure is its row
                    self._fail(name, error)
                empty_cache(self._device)
                if self._save is not None and not note:
                    if name in prepared:
                        self._time(prepared)
                        self._rest(prepared)
                    self._save(self._so_far())
                if not note:
                    self._say(name)
            self._crowded = self._crowded or (bool(prepared) and len(providers) > 1)
            if self._save is None or note:
                self._time(prepared, note)
        except KeyboardInterrupt:
            prepared.clear()  # the workers are ended, which takes less than having them clear up
            raise
        finally:
            for entry in prepared.values():
                entry.close()
            prepared.clear()

    def _time(self, prepared: dict[str, Prepared | Remote], note: str = "") -> None:
        """Times those that are prepared side by side; one that fails is out."""
        self._trim(prepared)
        measured = measure(_samplers(prepared), self._device, self._settings.seconds)
        share = _noise(measured.times)
        for name, entry in list(prepared.items()):
            if name in measured.failures:
                prepared.pop(name).close()
                self._fail(name, measured.failures[name])
                continue
            notes = "; ".join(text for text in (entry.row.note, note) if text)
            row = replace(entry.row, status="ok", noise=share, note=notes)
            self._rows[name] = _derive(row, self._case, measured.times[name])

    def _prepare(self, provider: Provider) -> Prepared | Remote:
        if self._isolates(provider):
            worker = self._workers.get(provider.name)
            return Remote(worker.prepare(self._case), worker)
        if self._work is None:
            self._work = make_work(self._case, self._device, self._settings.seed)
        return prepare(provider, *self._work, self._settings.clock)

    def _isolates(self, provider: Provider) -> bool:
        return wants_isolation(provider, self._device, self._settings.isolate)

    def _fail(self, name: str, error: Exception) -> None:
        timed = self._rows[name].ms
        if isinstance(error, ProviderFailed):
            row = replace(failed(self._rows[name], error), status=error.status, note=error.note, isolated=True)
        else:
            row = failed(self._rows[name], error.with_traceback(None))
        if timed is not None:
            row = replace(row, note=f"{row.note}; timed before at {timed.median:.4g} ms")
        self._rows[name] = row
        self._workers.stop(name)  # a fault may have left its process, or its part of the GPU, useless

    def _trim(self, prepared: dict[str, Prepared | Remote]) -> None:
        """Where memory is tight, has every provider hand its cache back between samples."""
        if self._device.type != "cuda":
            return
        needed = sum(entry.row.peak_bytes or 0 for entry in prepared.values())
        if needed <= _TIGHT * torch.cuda.get_device_properties(self._device).total_memory:
            return
        for name, entry in list(prepared.items()):
            try:
                entry.trim()
            except ProviderFailed as error:  # its process has died since
                self._fail(name, error)
                del prepared[name]

    def _rest(self, prepared: dict[str, Prepared | Remote]) -> None:
        """Has every provider hand its cache back, which the next one may need to be prepared."""
        for name, entry in list(prepared.items()):
            try:
                entry.rest()
            except ProviderFailed as error:
                self._fail(name, error)
                del prepared[name]

    @contextmanager
    def _cleared(self) -> Iterator[None]:
        """Frees weights, inputs and oracles of this process in the end."""
        try:
            yield
        finally:
            self._work = None
            clear(self._device)

    def _so_far(self) -> list[ModelRow]:
        """The rows of those that were begun; one that was timed alone has the case's noise, if there is one."""
        begun = [row for name, row in self._rows.items() if name in self._begun]
        share = max((row.noise for row in begun if row.noise is not None), default=None)
        rows = [row if row.ms is None else replace(row, noise=share) for row in begun]
        beside = with_speedups([row for row in rows if not row.note.endswith(_ALONE)])
        by_provider = {row.provider: row for row in beside}
        apart = [row for row in rows if row.provider not in by_provider and not row.is_ours]
        alone = min((row.ms.median for row in apart if row.ms), default=None)
        # nobody was timed beside a rival that ran alone and was the fastest
        return [_without_speedup(by_provider.get(row.provider, row), alone) for row in rows]

    def _say(self, step: str) -> None:
        self._report(f"{self._case.label}: {step}")


def _without_speedup(row: ModelRow, alone_ms: float | None) -> ModelRow:
    """The row; its speed-up stands only where the rival is at least as fast as the fastest of those timed alone."""
    if row.ms is None or row.speedup is None or alone_ms is None or row.speedup * row.ms.median <= alone_ms:
        return row
    return replace(row, speedup=None, rival=None)


def _samplers(prepared: Mapping[str, Prepared | Remote]) -> dict[str, Sampler]:
    """What to time; the reference (or else the first) twice, for the noise."""
    samplers: dict[str, Sampler] = {name: entry.sample for name, entry in prepared.items()}
    if not samplers:
        return samplers
    return with_repeat(samplers, "reference" if "reference" in samplers else next(iter(samplers)))


def _noise(times: Mapping[str, Spread]) -> float | None:
    for name, spread in times.items():
        if name.endswith(AGAIN):
            first = times.get(name.removesuffix(AGAIN))
            return None if first is None else noise(first, spread)
    return None


def _derive(row: ModelRow, case: Case, spread: Spread) -> ModelRow:
    flops = flops_per_image(case.config, case.mode) * case.batch
    return replace(
        row,
        ms=spread,
        images_per_s=images_per_second(case.batch, spread.median),
        tflops=tflops(flops, spread.median),
    )
