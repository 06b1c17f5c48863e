"""``ditfast bench memory``: what each provider needs, what training keeps for the backward, the largest batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from rich.table import Table

    from ..cases.case import Case, Mode
    from ..cases.providers import Provider
    from ..records.files import Results
    from ..records.rows import MemoryRow
    from ..suites.suite import Recorder

_FAILED = 1
_SEED = 0
_MAX_BATCH = 4096
_PROVIDERS = ("reference", "reference-compile", "diffusers", "ditfast")


class _OutOfTime(Exception):
    """The budget ended in the middle of a search."""


@dataclass(frozen=True)
class _Plan:
    """What the options ask for; ``limit`` is the largest batch to try, None where none is searched."""

    cases: list[Case]
    providers: list[Provider]
    device: torch.device
    plugins: tuple[str, ...]
    limit: int | None
    settings: dict[str, Any]


def memory(
    model: options.Models = None,
    batch: options.Batches = None,
    mode: options.Modes = None,
    dtype: options.Dtypes = None,
    image_size: options.ImageSizes = None,
    conditioning: options.Design = "adaln_zero",
    providers: options.Providers = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:N, or meta: nothing runs, and what the forward of a training step would keep on a "
            "GPU is traced. By default cuda where there is one.",
            show_default=False,
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", help="The largest batch to try, 4096 by default.", metavar="LIMIT"),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="Look for the largest batch that fits, on a GPU.")
    ] = True,
    json: options.Json = None,
    resume: options.Continue = False,
    budget: options.Budget = None,
    plugin: options.Plugins = None,
) -> None:
    """What each provider needs at its peak, what training keeps for the backward, and the largest batch that fits.

    The four /2 models at batch 32 on a GPU or on meta tensors, DiT-S/8 at batch 2 on a CPU; forward and train.
    """
    from ...files import check_target
    from ..suites.suite import run_suite

    check_target(json)
    options.check_continue(resume, json)
    plan = _make_plan(
        model or (), batch or (), mode or (), dtype or (), image_size or ("256",), conditioning, providers, device,
        max_batch, search, tuple(plugin or ()),
    )  # fmt: skip
    results = run_suite(
        "memory",
        plan.device,
        plan.settings,
        lambda recorder: _measure(plan, recorder),
        lambda results: [memory_table(results)],
        path=json,
        steps=len(plan.cases) * len(plan.providers) * (1 if plan.limit is None else 2),
        resume=resume,
        budget=options.parse_budget(budget),
    )
    ours = [row for row in results.rows if row.is_ours]
    if any(row.status == "error" or (row.status == "ok" and not (row.peak_bytes or row.saved_bytes)) for row in ours):
        raise typer.Exit(_FAILED)


def _make_plan(
    models: Sequence[str],
    batches: Sequence[int],
    modes: Sequence[str],
    dtypes: Sequence[str],
    image_sizes: Sequence[str],
    conditioning: str,
    provider_names: str | None,
    device_name: str | None,
    max_batch: int | None,
    search: bool,
    plugins: tuple[str, ...],
) -> _Plan:
    """The options checked and completed by the device's defaults; a ValueError says what is wrong."""
    import torch

    from ditfast.config import MODELS

    from ...environment import parse_device
    from ..cases.case import dtype_name, make_cases, parse_dtype, parse_mode
    from ..cases.providers import load_plugins
    from ..suites.memory import TRACED

    load_plugins(plugins)
    traced = device_name == "meta"
    device = torch.device("meta") if traced else parse_device(device_name)
    cpu = device.type == "cpu"
    names = models or (["DiT-S/8"] if cpu else [name for name in MODELS if name.endswith("/2")])
    default_modes: list[Mode] = ["train"] if traced else ["forward", "train"]
    chosen_modes = [parse_mode(name) for name in modes] or default_modes
    cases = make_cases(
        options.named_configs(names, image_sizes, conditioning),
        batches or [2 if cpu else 32],
        [parse_dtype(name) for name in dtypes] or [torch.float32 if cpu else torch.bfloat16],
        chosen_modes,
    )
    largest = max(case.batch for case in cases)
    limit = _MAX_BATCH if max_batch is None else max_batch
    if limit < largest:
        raise ValueError(f"--max-batch must be at least the largest --batch, {largest}, got {limit}")
    searches = search and device.type == "cuda"
    if max_batch is not None and not searches:
        raise ValueError(f"--max-batch is for the search, which takes a GPU and no --no-search, got {max_batch}")
    if traced:
        for name in (provider_names or "").split(","):
            if name.strip() not in ("", *TRACED):
                raise ValueError(f"--providers must be of {', '.join(TRACED)} with --device meta, got {name.strip()!r}")
        for mode in chosen_modes:
            if not mode.startswith("train"):
                raise ValueError(f"--mode must be train or train-checkpoint with --device meta, got {mode!r}")
    chosen = options.chosen_providers(provider_names, TRACED if traced else _PROVIDERS, cases, device)
    settings: dict[str, Any] = {
        "device": str(device),
        "models": list(names),
        "batches": sorted({case.batch for case in cases}),
        "dtypes": list(dict.fromkeys(dtype_name(case.dtype) for case in cases)),
        "modes": chosen_modes,
        "image_sizes": list(image_sizes),
        "conditioning": conditioning,
        "providers": [provider.name for provider in chosen],
        "search": search,
        "max_batch": limit if searches else None,
        "seed": _SEED,
        "plugins": list(plugins),
    }
    return _Plan(cases, chosen, device, plugins, settings["max_batch"], settings)


def _measure(plan: _Plan, recorder: Recorder) -> None:
    """Every case and provider of the plan, as far as no earlier part has it; then the searches, which take longer."""
    from ..records.text import STATUS
    from ..suites.memory import blank_row, measure

    pairs = [(case, provider) for case in plan.cases for provider in plan.providers]
    for case, provider in pairs:
        blank, outcome = blank_row(case, provider, plan.device), "measured before"
        if not recorder.has([blank.key]):
            if recorder.out_of_time():
                return
            row = measure(case, provider, plan.device, _SEED, plan.plugins)
            recorder.add([row])
            outcome = STATUS[row.status]
        recorder.report(f"{case.label}: {provider.name}: {outcome}")
    for case, provider in pairs if plan.limit is not None else ():
        key = blank_row(case, provider, plan.device).key
        row = next(row for row in recorder.results.rows if row.key == key)
        # what failed or got no tick has no largest batch
        if row.max_batch is None and (row.status == "oom" or row.peak_bytes is not None):
            try:
                recorder.add([_with_largest(plan, case, provider, row, recorder)])
            except _OutOfTime:
                return
        recorder.report(f"{case.label}: {provider.name}: largest batch")


def _with_largest(plan: _Plan, case: Case, provider: Provider, row: MemoryRow, recorder: Recorder) -> MemoryRow:
    """The row with the largest batch: the one found with another batch of the same case, or else searched."""
    from ..suites.memory import BESIDE_NOTE, search, trial

    same = [other for other in recorder.results.rows if replace(other, batch=row.batch).key == row.key]
    result = next(((other.max_batch, "") for other in same if other.max_batch is not None), None)
    if result is None:
        run = trial(case, provider, plan.device, _SEED, plan.plugins)

        def timed(batch: int) -> int:
            if recorder.out_of_time():
                raise _OutOfTime
            return run(batch)

        peaks = {other.batch: other.peak_bytes for other in same if other.peak_bytes is not None}
        assert plan.limit is not None and row.device_bytes is not None
        result = search(timed, peaks, row.device_bytes, plan.limit, start=max(1, row.batch // 4))
    largest, note = result
    notes = [row.note, note, BESIDE_NOTE if row.status == "oom" and largest >= row.batch else ""]
    return replace(row, max_batch=largest, note="; ".join(filter(None, notes)))


def memory_table(results: Results) -> RenderableType:
    """The table of ``ditfast bench memory``: a section a case, shares of the reference, and what is missing and why."""
    from rich.console import Group

    from ...console import line
    from ..records.machine import device_label
    from ..records.text import model_name
    from ..report.terminal import closing_notes
    from ..suites.memory import TRACED_NOTE

    rows = [row for row in results.rows if row.status != "unavailable"]
    traced = results.settings.get("device") == "meta"
    where = TRACED_NOTE if traced else device_label(results)
    title = line(f"ditfast bench memory, {where}" + ("" if rows else ": no rows"), "bold")
    lines = _captions(results, traced)
    for row in rows:
        if row.note and row.note != TRACED_NOTE:
            lines.append(f"{model_name(row)}, batch {row.batch}, {row.mode}, {row.dtype}, {row.provider}: {row.note}")
    absent = {row.provider: row.note for row in results.rows if row.status == "unavailable"}
    lines += [f"Not measured: {name}: {reason}" for name, reason in absent.items()]
    return Group(title, *([_table(rows, results)] if rows else []), *map(line, [*lines, *closing_notes(results)]))


def _table(rows: list[MemoryRow], results: Results) -> Table:
    from rich.markup import escape

    from ...console import plain_table
    from ..records.text import STATUS, model_name, size

    table = plain_table()
    for header in ("model", "batch", "mode", "dtype", "provider"):
        table.add_column(header, justify="right" if header == "batch" else "left", no_wrap=True)
    for header in ("peak", "of reference", "saved for backward", "of reference", "largest batch"):
        table.add_column(header, justify="right", no_wrap=True)

    def case(row: MemoryRow) -> tuple[object, ...]:
        return row.key[:-1]

    bases = {case(row): row for row in rows if row.provider == "reference"}
    for index, row in enumerate(rows):
        names = (model_name(row), str(row.batch), row.mode, row.dtype)
        first = index == 0 or case(rows[index - 1]) != case(row)
        last = index + 1 == len(rows) or case(rows[index + 1]) != case(row)
        base, cells = bases.get(case(row)), []
        for name in ("peak_bytes", "saved_bytes"):
            value, of = getattr(row, name), getattr(base, name, None)
            cells += ["-" if value is None else size(value), f"{value / of:.0%}" if value and of else "-"]
        if row.status != "ok":
            cells[0] = f"[red]{STATUS[row.status]}[/]"
        cells.append(_largest(row, results.settings.get("max_batch")))
        table.add_row(*(names if first else [""] * 4), escape(row.provider), *cells, end_section=last)
    return table


def _largest(row: MemoryRow, limit: object) -> str:
    if row.max_batch is None:
        return "-"
    if row.max_batch == 0:
        return "none"
    return f"{row.max_batch:,}" + (" or more" if row.max_batch == limit else "")


def _captions(results: Results, traced: bool) -> list[str]:
    saved = "saved for backward: what the forward of the loss keeps; whole storages, without parameters and inputs."
    if traced:
        return [
            saved,
            "Nothing ran and nothing was judged: everyone eager, attention one kernel, ditfast with its kernels.",
        ]
    lines = ["peak: of the provider on its own, weights included.", saved]
    lines.append("Without a parity tick ditfast shows no bytes; rivals do, with the note.")
    device = str(results.settings.get("device"))
    if device == "cpu":
        lines.append("On a CPU ditfast runs its formulas; --device meta traces what its kernels keep on a GPU.")
        lines.append("largest batch: searched on a GPU only; a CPU's machine would swap before it says no.")
    elif results.settings.get("max_batch") is None:
        lines.append("largest batch: not searched (--no-search).")
    else:
        lines.append("largest batch: really run, each try in a fresh process, to the next sixteenth.")
    return lines

