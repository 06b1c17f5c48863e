"""The tables of ``ditfast bench`` for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ...console import line, plain_table
from ..records.compare import Comparison, timed
from ..records.files import Results
from ..records.machine import device_label
from ..records.metrics import is_tie
from ..records.rows import ModelRow, OpRow, OwnRow, SampleRow
from ..records.text import STATUS, digits, model_name, size


def results_table(results: Results, ascii_only: bool | None = None) -> RenderableType:
    """The rows that ran or failed; below them the limits, the noise, and the absent providers with reasons."""
    shown = [row for row in results.rows if row.status != "unavailable"]
    kinds = list(dict.fromkeys((row.mode, row.dtype) for row in shown))
    parts: list[RenderableType] = []
    for mode, dtype in kinds:
        parts.append(line(f"ditfast bench: {mode}, {dtype}, {device_label(results)}", "bold"))
        parts.append(model_table([row for row in shown if (row.mode, row.dtype) == (mode, dtype)], ascii_only))
    if not parts:
        parts.append(line(f"ditfast bench, {device_label(results)}: no rows", "bold"))
    return Group(*parts, *map(line, [*_notes(results), *closing_notes(results)]))


def model_table(rows: Sequence[ModelRow], ascii_only: bool | None = None) -> Table:
    """Model rows of one mode and dtype."""
    if ascii_only is None:
        ascii_only = Console().options.ascii_only
    table = plain_table()
    for header in ("model", "batch", "provider"):
        table.add_column(header, justify="right" if header == "batch" else "left", no_wrap=True)
    headers = ("images/s", "ms", "TFLOP/s", "of limit", "memory", "first call", "error", "parity", "speed-up")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1].case != row.case
        first = index == 0 or rows[index - 1].case != row.case
        names = (model_name(row), str(row.batch)) if first else ("", "")
        table.add_row(*names, escape(row.provider), *_cells(row, ascii_only), end_section=last)
    return table


def comparison_table(comparison: Comparison, old_name: str) -> RenderableType:
    """The changes against an older run."""
    table = plain_table()
    for header in ("case", "batch", "provider"):
        table.add_column(header, no_wrap=True)
    for header in ("then, ms", "now, ms", "change", ""):
        table.add_column(header, justify="right", no_wrap=True)
    styles = {"faster": "green", "slower": "red", "tie": "dim"}
    for change in comparison.changes:
        verdict = f"[{styles[change.verdict]}]{change.verdict}[/]"
        numbers = (digits(change.old_ms), digits(change.new_ms), f"{change.speedup:.2f}x")
        row = timed(change.row)
        table.add_row(case_label(row), str(row.batch), escape(row.provider), *numbers, verdict)
    lines = ["A change within the noise of either run, or with overlapping quartiles, is a tie."]
    if comparison.only_old or comparison.only_new:
        lines.append(f"Not compared: {comparison.only_old} rows only then, {comparison.only_new} rows only now.")
    lines += [f"Conditions differ: {condition}." for condition in comparison.conditions]
    return Group(line(f"against {old_name}", "bold"), table, *map(line, lines))


def _cells(row: ModelRow, ascii_only: bool) -> Sequence[str]:
    """The cells after the provider."""
    if row.ms is None:
        return (f"[red]{STATUS[row.status]}[/]", *("",) * 8)
    spread = (row.ms.p75 - row.ms.p25) / 2
    share = "-" if row.ceiling_share is None else f"{row.ceiling_share:.0%}"
    return (
        digits(row.images_per_s),
        f"{digits(row.ms.median)} {'+-' if ascii_only else '±'} {digits(spread)}",
        digits(row.tflops),
        f"{share} mem" if row.ceiling == "copy" else share,
        "-" if row.peak_bytes is None else size(row.peak_bytes),
        "-" if row.first_call_ms is None else f"{digits(row.first_call_ms / 1e3)} s",
        "-" if row.error is None else f"{row.error:.1e}",
        tick(row.parity, ascii_only),
        speedup(row),
    )


def tick(parity: bool | None, ascii_only: bool) -> str:
    """The parity cell."""
    if parity is None:
        return "-"
    if parity:
        return f"[green]{'yes' if ascii_only else '✓'}[/]"
    return f"[red]{'NO' if ascii_only else '✗'}[/]"


def speedup(row: ModelRow | OpRow | OwnRow | SampleRow) -> str:
    """The speed-up cell; a tie is marked."""
    if row.speedup is None:
        return ""
    if is_tie(row.speedup, row.noise or 0.0):
        return f"[dim]{row.speedup:.2f}x, tie[/]"
    return f"[bold]{row.speedup:.2f}x[/]"


def _notes(results: Results) -> list[str]:
    lines = []
    lines.append("ms: median and half the interquartile range. parity: error against fp64 within the bound.")
    lines.append("first call: with compilation, as far as PyTorch's disk caches lack it, and capture; no part of ms.")
    lines.append("speed-up: over the fastest rival of the same model and batch in this run; only with parity.")
    noises = [row.noise for row in results.rows if row.noise is not None]
    if noises:
        lines.append(f"Noise: up to {max(noises):.1%}, by the reference timed twice; less than that is a tie.")
    for row in results.rows:
        if row.note and row.status != "unavailable":
            lines.append(f"{case_label(row)}, batch {row.batch}, {row.provider}: {row.note}")
    absent = {row.provider: row.note for row in results.rows if row.status == "unavailable"}
    in_part = {row.provider for row in results.rows if row.status != "unavailable"} & absent.keys()
    for name, reason in {**results.settings.get("providers_left_out", {}), **absent}.items():
        cases = [f"{model_name(row)} batch {row.batch}" for row in results.rows if _is_absent(row, name)]
        detail = f" ({', '.join(cases)})" if name in in_part else ""
        lines.append(f"Not measured: {name}{detail}: {reason}")
    return lines + _largest_batches(results)


def closing_notes(results: Results) -> list[str]:
    """The lines below the tables of every measured suite: limits, clocks, parts, interruption."""
    lines = []
    if results.ceilings is not None:
        matmul = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in results.ceilings.matmul_tflops.items())
        lines.append(
            f"Limits measured in this run: matmul {matmul}; copy {results.ceilings.copy_gb_per_s:.3g} GB/s (mem)."
        )
    for name, unit in (("sm_clock_mhz", "MHz"), ("power_draw_w", "W"), ("temperature_c", "C"), ("load_1m", "")):
        values = [f"{reading.get('when')} {reading[name]:g}" for reading in results.readings if reading.get(name)]
        if values:
            quantity = name.rpartition("_")[0].replace("_", " ")
            lines.append(f"{quantity}{f', {unit}' if unit else ' of the host'}: {', '.join(values)}")
    if results.parts > 1:
        lines.append(f"Measured in {results.parts} parts, one after another.")
    whys = Counter(item.why for item in results.older)
    lines += [f"Kept in the file and not measured again: {count} rows, {why}." for why, count in whys.items()]
    if not results.complete:
        lines.append("Interrupted or out of time: these are the rows so far.")
    return lines


def _largest_batches(results: Results) -> list[str]:
    """The largest batch that fits, for cases with one that did not."""
    lines = []
    short = dict.fromkeys((row.series, model_name(row), row.provider) for row in results.rows if row.status == "oom")
    for series, label, provider in short:
        fitting = [row.batch for row in results.rows if row.ms and (row.series, row.provider) == (series, provider)]
        largest = f"the largest measured batch that fits is {max(fitting)}" if fitting else "no measured batch fits"
        lines.append(f"{label}, {series[-1]}, {provider}: {largest}")
    return lines


def _is_absent(row: ModelRow, provider: str) -> bool:
    return row.provider == provider and row.status == "unavailable"


def case_label(row: ModelRow | OpRow) -> str:
    """What was measured, without batch and provider."""
    if isinstance(row, OpRow):
        return f"{row.operator}, {row.direction}, T={row.tokens} D={row.width}, {row.dtype}"
    return f"{model_name(row)}, {row.mode}, {row.dtype}"
