"""The loop of ``ditfast bench``: in each case build and judge every provider, then time all of them side by side."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cases import Case
from .judging import Judge
from .memory import MemoryMeter
from .metrics import flops_per_image, images_per_second, tflops, weight_bytes, with_speedups
from .providers import Provider
from .records import Row
from .timing import Clock, Spread, measure, noise
from .variants import Variant
from .workload import Inputs, Workload, build_model, cast_inputs, make_pool

#: Called with what is being done, after each of the :func:`steps` of a run.
Report = Callable[[str], None]

_AGAIN = " (again)"
_NOTE_LENGTH = 300


@dataclass(frozen=True)
class Settings:
    """How a run measures: seconds a variant, the seed of weights and inputs, and a clock for tests."""

    seconds: float = 1.0
    seed: int = 0
    clock: Clock | None = None


@dataclass
class _Entry:
    """A provider that was built and judged: its row so far, and what to time."""

    row: Row
    variant: Variant
    pool: list[Inputs]


def steps(cases: Sequence[Case], providers: Sequence[Provider]) -> int:
    """How often :func:`run` reports: once a provider and once for the timing, in each case."""
    return len(cases) * (len(providers) + 1)


def run(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    device: torch.device,
    settings: Settings | None = None,
    report: Report = lambda what: None,
) -> Iterator[list[Row]]:
    """Measures every provider on every case.

    Args:
        cases, providers: what to measure; the order of the rows.
        device: a CPU or CUDA device.
        settings: how.
        report: told what was done, for a progress bar.

    Yields:
        the rows of one case, one a provider, without shares of the ceilings (see metrics.with_shares). A provider
        that runs out of memory, fails or cannot run here has a row that says so.
    """
    settings = settings or Settings()
    for case in cases:
        try:
            yield _run_case(case, providers, device, settings, report)
        finally:
            # compiled code counts towards a limit per function, and a later case would hit it
            if "torch._dynamo" in sys.modules:  # importing it takes a second
                torch._dynamo.reset()
            gc.collect()
            _empty_cache(device)


def _run_case(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    settings: Settings,
    report: Report,
) -> list[Row]:
    rows = {p.name: _blank_row(case, p) for p in providers}
    able = []
    for provider in providers:
        reason = provider.unavailable(case, device)
        if reason is None:
            able.append(provider)
        else:
            rows[provider.name] = replace(rows[provider.name], status="unavailable", note=reason)
            report(f"{case.label}: {provider.name}: {reason}")
    if not able:
        report(f"{case.label}: nothing to time")
        return list(rows.values())
    try:
        model = build_model(case.config, device, case.dtype, settings.seed)
        work = Workload(case, device, model, make_pool(case, device, weight_bytes(model), settings.seed))
        judge = Judge(work)
    except Exception as error:  # no provider can run without weights and inputs
        for provider in able:
            rows[provider.name] = _failed(rows[provider.name], error)
            report(f"{case.label}: {provider.name}")
        report(f"{case.label}: nothing to time")
        return list(rows.values())

    entries: dict[str, _Entry] = {}
    for provider in able:
        report_as = f"{case.label}: {provider.name}"
        try:
            entries[provider.name] = _prepare(provider, work, judge, rows[provider.name])
        except Exception as error:  # a provider's failure is its row
            rows[provider.name] = _failed(rows[provider.name], error.with_traceback(None))
        _empty_cache(device)
        report(report_as)

    measured = measure(_timed_calls(entries), device, settings.seconds, settings.clock)
    noise_share = _noise(measured.times)
    for name, entry in entries.items():
        if name in measured.failures:
            rows[name] = _failed(entry.row, measured.failures[name])
        else:
            row = replace(entry.row, status="ok", noise=noise_share)
            rows[name] = _derive(row, case, measured.times[name], weight_bytes(work.model))
    report(f"{case.label}: timed side by side")
    return with_speedups(rows.values())


def _blank_row(case: Case, provider: Provider) -> Row:
    return Row(
        model=case.config.name,
        conditioning=case.config.conditioning,
        latent_size=case.config.latent_hw,
        batch=case.batch,
        dtype=case.dtype_name,
        mode=case.mode,
        provider=provider.name,
        precision=provider.precision or case.dtype_name,
        status="error",
    )


def _prepare(provider: Provider, work: Workload, judge: Judge, row: Row) -> _Entry:
    """Builds a provider, times its first call, judges it warm and measures its memory."""
    judge.standard(provider.constants)  # before the meter, which would count it
    meter = MemoryMeter(work.device)
    variant = provider.build(work)
    pool = work.pool if variant.dtype is None else [cast_inputs(inputs, variant.dtype) for inputs in work.pool]
    training = work.case.mode == "train"
    found: dict[str, Tensor] | None = None

    def first_call() -> None:
        nonlocal found
        found = judge.compared(variant, pool[0]) if training else None
        if found is None:
            variant.step(pool[1])

    first_call_ms = _host_ms(first_call, work.device)
    # others than the judged inputs came first, so that a graph that keeps its first or last ones is found out
    for inputs in pool[1:3]:
        variant.step(inputs)
    if not training:
        found = judge.compared(variant, pool[0])
    judgement = judge.judge(found, provider.constants)
    found = None
    peak_bytes = meter.peak_bytes(lambda: variant.step(pool[0]), variant.shared_bytes)
    verdict = judgement.verdict
    row = replace(
        row,
        note=judgement.note,
        first_call_ms=first_call_ms,
        peak_bytes=peak_bytes,
        error=_finite(verdict.error) if verdict else None,
        yardstick_error=_finite(verdict.yardstick) if verdict else None,
        bound=_finite(verdict.bound) if verdict else None,
        parity=judgement.parity,
        parity_samples=judgement.samples if verdict else None,
    )
    return _Entry(row, variant, pool)


def _timed_calls(entries: dict[str, _Entry]) -> dict[str, Callable[[int], object]]:
    """What to time; the reference (or else the first) twice, for the noise."""

    def call(entry: _Entry) -> Callable[[int], object]:
        return lambda number: entry.variant.step(entry.pool[number % len(entry.pool)])

    calls = {name: call(entry) for name, entry in entries.items()}
    if entries:
        repeated = "reference" if "reference" in entries else next(iter(entries))
        calls[repeated + _AGAIN] = calls[repeated]
    return calls


def _noise(times: dict[str, Spread]) -> float | None:
    for name, spread in times.items():
        if name.endswith(_AGAIN):
            first = times.get(name.removesuffix(_AGAIN))
            return None if first is None else noise(first, spread)
    return None


def _derive(row: Row, case: Case, spread: Spread, weight_bytes: int) -> Row:
    flops = flops_per_image(case.config, case.mode) * case.batch
    return replace(
        row,
        ms=spread,
        images_per_s=images_per_second(case.batch, spread.median),
        tflops=tflops(flops, spread.median),
        weight_bytes=weight_bytes,
    )


def _failed(row: Row, error: Exception) -> Row:
    """The row of a provider that raised. Nothing measured before counts any more."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None and len(chain) < 10:
        chain.append(chain[-1].__cause__)
    oom = any(_is_oom(item) for item in chain)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    note = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:_NOTE_LENGTH]
    unmeasured = ("first_call_ms", "peak_bytes", "error", "yardstick_error", "bound", "parity", "parity_samples")
    blank = dict.fromkeys(unmeasured)
    return replace(row, status="oom" if oom else "error", note=note, **blank)  # type: ignore[arg-type]


def _is_oom(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _host_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call on the host's clock, to its end on the device."""
    begin = time.perf_counter_ns()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - begin) / 1e6


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
