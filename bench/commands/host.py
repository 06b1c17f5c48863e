"""``ditfast bench host``: what a host spends on eager models before and between their launches; no GPU needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options
from ..records.text import HOST_CAPTION, HOST_DIFFERENCES, HOST_PARTS_CAPTION

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..cases.case import Case
    from ..records.files import Results
    from ..records.rows import HostPart, HostRow, Spread
    from ..suites.suite import Recorder

_MODES = ("forward", "train")
_SECONDS = 4.0


@dataclass(frozen=True)
class _Plan:
    cases: list[Case]
    seconds: float
    arch: str
    settings: dict[str, Any]


def host(
    model: options.Models = None,
    batch: options.Batches = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="forward or train (loss and backward, no optimiser); may be repeated. Both by default.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help=f"Time for each model in each mode. {_SECONDS:g} by default.", show_default=False),
    ] = None,
    arch: Annotated[str, typer.Option(help="The GPU that is not there, e.g. sm_90.")] = "sm_90",
    json: options.Json = None,
) -> None:
    """What a host spends on an eager call before and between its launches: ditfast, the reference, accelerate.

    In bf16, on a machine without a GPU; DiT-XL/2 at batch 1 by default. What a driver takes for a launch is not in it.
    """
    import torch

    from ...files import check_target
    from ..suites.suite import run_suite

    check_target(json)
    plan = _make_plan(model or (), batch or (), mode or (), seconds, arch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_suite(
            "host",
            torch.device("cpu"),
            plan.settings,
            lambda recorder: _measure(plan, recorder),
            lambda results: [tables(results)],
            path=json,
            steps=4 * len(plan.cases),
        )
    finally:
        torch.set_num_threads(threads)


def _make_plan(
    models: Sequence[str], batches: Sequence[int], modes: Sequence[str], seconds: float | None, arch: str
) -> _Plan:
    """The options checked and completed; a ValueError says what is wrong, or why nothing can be measured here."""
    import torch

    from ..cases.case import make_cases, parse_mode, unknown

    for name in modes:
        if name not in _MODES:
            raise ValueError(unknown("mode", name, _MODES))
    duration = options.positive("--seconds", seconds, _SECONDS)
    configs = options.named_configs(models or ["DiT-XL/2"], ["256"], "adaln_zero")
    kinds = [parse_mode(kind) for kind in _MODES if kind in (modes or _MODES)]
    cases = make_cases(configs, batches or [1], [torch.bfloat16], kinds)
    try:
        from ditfast.kernels.rehearsal import GPUS, nothing_computed, unavailable
    except ImportError as error:
        raise ValueError(f"bench host needs the package triton: {error}") from None
    if arch not in GPUS:
        raise ValueError(unknown("arch", arch, GPUS))
    if (reason := unavailable()) is not None:
        raise ValueError(f"bench host launches on a GPU that is not there, and cannot here: {reason}")
    try:
        with nothing_computed():
            pass
    except RuntimeError as error:  # of this version of torch
        raise ValueError(f"bench host needs a call without its kernels, and {error}") from None
    settings = {
        "device": "cpu",
        "models": [config.name for config in configs],
        "batches": sorted({case.batch for case in cases}),
        "dtype": "bf16",
        "modes": list(kinds),
        "seconds": duration,
        "arch": arch,
    }
    return _Plan(cases, duration, arch, settings)


def _measure(plan: _Plan, recorder: Recorder) -> None:
    from ..suites.host import measure_case

    for case in plan.cases:
        recorder.add(measure_case(case, plan.seconds, plan.arch, recorder.report))


def tables(results: Results) -> RenderableType:
    """The models of each mode, and the parts of ditfast's."""
    from rich.console import Group

    from ...console import line
    from ..records.machine import device_label
    from ..records.text import model_name
    from ..report.terminal import closing_notes

    rows: list[HostRow] = results.rows
    title = f"ditfast bench host: process time, {results.settings.get('dtype')}, {device_label(results)}"
    parts: list[RenderableType] = [line(title if rows else f"{title}: no rows", "bold")]
    if rows:
        parts += [_table(rows), *map(line, HOST_CAPTION), *map(line, HOST_DIFFERENCES), line("")]
    for row in rows:
        if row.parts:
            heading = f"ditfast's parts, microseconds a call: {model_name(row)} batch {row.batch}, {row.mode}"
            parts += [line(heading, "bold"), _parts_table(row.parts)]
    if any(row.parts for row in rows):
        parts += map(line, HOST_PARTS_CAPTION)
    return Group(*parts, *map(line, closing_notes(results)))


def _table(rows: Sequence[HostRow]) -> Table:
    from rich.markup import escape

    from ...console import plain_table
    from ..records.text import digits, model_name

    table = plain_table()
    for header in ("model", "batch", "mode", "provider"):
        table.add_column(header, justify="right" if header == "batch" else "left", no_wrap=True)
    for header in ("ms", "of reference", "median, ms", "launches", "by Triton"):
        table.add_column(header, justify="right", no_wrap=True)
    bases = {row.key[:-1]: row.least_ms for row in rows if row.provider == "reference"}
    for index, row in enumerate(rows):
        case = row.key[:-1]
        first = index == 0 or rows[index - 1].key[:-1] != case
        last = index + 1 == len(rows) or rows[index + 1].key[:-1] != case
        names = (model_name(row), str(row.batch), row.mode) if first else ("", "", "")
        spread = row.process_ms
        cells = [digits(row.least_ms), f"{row.least_ms / bases[case]:.2f}x" if case in bases else "-"]
        cells.append(f"{digits(spread.median)} +- {digits((spread.p75 - spread.p25) / 2)}")
        cells += ["-" if row.launches is None else f"{row.launches:,}", f"{row.triton_launches:,}"]
        table.add_row(*names, escape(row.provider), *cells, end_section=last)
    return table


def _parts_table(parts: Sequence[HostPart]) -> Table:
    from ...console import plain_table
    from ..records.text import digits

    table = plain_table()
    table.add_column("operator", no_wrap=True)
    table.add_column("direction", no_wrap=True)
    for header in ("uses", "launches", "public", "launcher", "launch"):
        table.add_column(header, justify="right", no_wrap=True)

    def microseconds(spread: Spread | None) -> str:
        return "-" if spread is None else digits(spread.median * 1e3)

    for part in parts:
        levels = map(microseconds, (part.public, part.launcher, part.launch))
        table.add_row(part.operator, part.direction, str(part.uses), str(part.launches), *levels)
    return table
