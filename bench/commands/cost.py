"""``ditfast bench cost``: what the models launch, move and compute, and the bounds that follow; no device needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .. import options
from ..records.text import COST_CAPTION

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..cases.case import Case
    from ..records.files import Results
    from ..records.rows import CostRow, ModelRow

_BATCHES = (1, 256)
_INTERRUPTED = 130


def cost(
    model: options.Models = None,
    batch: options.Batches = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="forward, cfg (guided) or train (loss and backward, no optimiser); may be repeated. "
            "forward by default.",
            show_default=False,
        ),
    ] = None,
    image_size: options.ImageSizes = None,
    conditioning: options.Design = "adaln_zero",
    providers: Annotated[
        str | None,
        typer.Option(help="Who is traced, by commas: reference, diffusers, ditfast (all).", show_default=False),
    ] = None,
    json: options.Json = None,
) -> None:
    """What the models launch, move and compute, and the time that takes at least on A100, H100 and H200.

    Traced without a device; the times are computed bounds. All named models at batch 1 and 256 by default.
    """
    from ...console import print_tables, progress, terminated_as_interrupted
    from ...environment import collect
    from ...files import check_target
    from ..records.files import Results
    from ..suites.cost import run

    check_target(json)
    cases, names, settings = _plan(model, batch, dtype, mode, image_size or ("256",), conditioning, providers)
    results = Results("cost", collect(), settings)
    with terminated_as_interrupted():
        try:
            with progress(len(cases) * len(names)) as report:
                for row in run(cases, names):
                    results.rows.append(row)
                    if json is not None:
                        results.save(json)
                    report(f"{row.model} batch {row.batch}, {row.mode}, {row.provider}")
            results.complete = True
        except KeyboardInterrupt:
            if not results.rows:
                typer.echo("interrupted before the first row", err=True)
                raise typer.Exit(_INTERRUPTED) from None
    if json is not None:
        results.save(json)
    print_tables(tables(results))
    if json is not None:
        typer.echo(f"results: {json}", err=True)
    if not results.complete:
        raise typer.Exit(_INTERRUPTED)


def _plan(
    models: Sequence[str] | None,
    batches: Sequence[int] | None,
    dtype: str,
    modes: Sequence[str] | None,
    image_sizes: Sequence[str],
    conditioning: str,
    provider_names: str | None,
) -> tuple[list[Case], list[str], dict[str, Any]]:
    """(cases, providers that can be traced in some of them, settings); a ValueError where an option is wrong."""
    from ditfast.config import MODELS

    from ..cases.case import Case, parse_dtype, unknown
    from ..cost.roofline import DATASHEETS
    from ..suites.cost import MODES, PROVIDERS, unavailable

    configs = options.named_configs(list(dict.fromkeys(models or MODELS)), image_sizes, conditioning)
    for name in modes or ():
        if name not in MODES:
            raise ValueError(unknown("mode", name, MODES))
    kinds = [kind for kind in MODES if kind in (modes or MODES[:1])]
    sizes, chosen_dtype = sorted(set(batches or _BATCHES)), parse_dtype(dtype)
    cases = [Case(config, size, chosen_dtype, kind) for kind in kinds for config in configs for size in sizes]
    names = options.listed(provider_names, PROVIDERS)
    if not names:
        raise ValueError(f"--providers must name at least one of {', '.join(PROVIDERS)}, got {provider_names!r}")
    reasons = {name: [unavailable(name, case) for case in cases] for name in names}
    left_out = {name: next(filter(None, why)) for name, why in reasons.items() if all(why)}
    traced = [name for name in names if name not in left_out]
    if not traced:
        listing = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"none of the providers can be traced: {listing}")
    settings = {
        "models": [config.name for config in configs],
        "image_sizes": list(image_sizes),
        "conditioning": conditioning,
        "batches": sizes,
        "dtype": cases[0].dtype_name,
        "modes": list(kinds),
        "providers": traced,
        "providers_left_out": left_out,
        "datasheets": {
            name: {"tflops": dict(gpu.tflops), "gb_per_s": gpu.gb_per_s} for name, gpu in DATASHEETS.items()
        },
    }
    return cases, traced, settings


def tables(results: Results) -> RenderableType:
    """The costs of each mode."""
    from rich.console import Group

    from ...console import line

    rows: list[CostRow] = results.rows
    parts: list[RenderableType] = []
    for mode in dict.fromkeys(row.mode for row in rows):
        shown = [row for row in rows if row.mode == mode]
        parts += [line(f"ditfast bench cost: {mode}, {shown[0].dtype}, computed bounds", "bold"), _cost_table(shown)]
        parts += map(line, COST_CAPTION)
        parts.append(line(""))
    parts += [line(f"Not traced: {name}: {why}") for name, why in results.settings["providers_left_out"].items()]
    if not results.complete:
        parts.append(line("Interrupted: these are the rows so far."))
    return Group(*parts)


def _cost_table(rows: Sequence[CostRow]) -> RenderableType:
    from rich.markup import escape

    from ...console import plain_table
    from ..records.metrics import images_per_second
    from ..records.text import digits

    table = plain_table()
    for header in ("model", "batch", "provider"):
        table.add_column(header, justify="right" if header == "batch" else "left", no_wrap=True)
    gpus = list(rows[0].roofline_ms)
    bounds = [header for gpu in gpus for header in (f"{gpu}, ms", "/s")]
    for header in ("launches", "GB", "TFLOP", "FLOP/byte", *bounds):
        table.add_column(header, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        first = index == 0 or rows[index - 1].key[:-1] != row.key[:-1]
        last = index + 1 == len(rows) or rows[index + 1].key[:-1] != row.key[:-1]
        cells = [f"{row.launches:,}", *map(digits, (row.bytes / 1e9, row.flops / 1e12, row.intensity))]
        for gpu in gpus:
            cells += map(digits, (row.roofline_ms[gpu], images_per_second(row.batch, row.roofline_ms[gpu])))
        names = (_label(row), str(row.batch)) if first else ("", "")
        table.add_row(*names, escape(row.provider), *cells, end_section=last)
    return table


def _label(row: CostRow) -> str:
    from ..records.text import model_name

    return model_name(cast("ModelRow", row))  # which reads only what both kinds of row have
