"""``ditfast bench scaling``: cost against tokens, batch and width, with fitted exponents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from .. import options

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from ditfast.config import DiTConfig

    from ..cases.case import Case
    from ..records.files import Ceilings, Results
    from ..records.rows import Axis, ScalingRow
    from ..suites.suite import Recorder

_T = TypeVar("_T")

_FAILED = 1
_AXES: tuple[Axis, ...] = ("tokens", "batch", "width")
_PROVIDERS = ("reference", "reference-compile", "ditfast", "ditfast-compile")


@dataclass(frozen=True)
class _Defaults:
    """The model, and the values of each axis; a width's depth keeps a point affordable."""

    model: str
    tokens: tuple[int, ...]
    batch: tuple[int, ...]
    width: tuple[int, ...]
    tokens_batch: int
    width_batch: int


_GPU = _Defaults(
    "DiT-XL/2",
    tokens=(64, 256, 1024, 4096, 16384),
    batch=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    width=(384, 768, 1152, 1536, 2304),
    tokens_batch=1,
    width_batch=32,
)
_CPU = _Defaults("DiT-S/2", (64, 256, 1024), (1, 2, 4), (192, 384, 768), 1, 1)


@dataclass(frozen=True)
class _Point:
    """One point of a curve."""

    axis: Axis
    value: int
    case: Case


def scaling(
    axis: Annotated[
        list[str] | None, typer.Option(help="tokens, batch or width; may be repeated, all by default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model to vary: DiT-XL/2 on a GPU, else DiT-S/2.", show_default=False)
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="T, a square number; may be repeated.", show_default=False)
    ] = None,
    batch: options.Batches = None,
    width: Annotated[
        list[int] | None,
        typer.Option(help="D, a multiple of the head dim; may be repeated.", show_default=False),
    ] = None,
    dtype: options.Dtypes = None,
    mode: options.Modes = None,
    providers: options.Providers = None,
    device: options.Device = None,
    seconds: options.Seconds = None,
    json: options.Json = None,
    resume: options.Continue = False,
    budget: options.Budget = None,
    isolate: options.Isolation = "auto",
    plugin: options.Plugins = None,
) -> None:
    """Cost against tokens, batch and width, ditfast beside its rivals, with the exponents of the curves.

    One axis varies at a time; the others stay those of the model at one image (32 for the width on a GPU).
    """
    import torch

    from ...environment import parse_device
    from ...files import check_target
    from ..cases.case import dtype_name, parse_dtype, parse_mode, unknown
    from ..cases.providers import load_plugins
    from ..measure.runner import Settings, steps
    from ..suites.suite import run_suite

    check_target(json)
    options.check_continue(resume, json)
    load_plugins(plugin or ())
    torch_device = parse_device(device)
    default = _GPU if torch_device.type == "cuda" else _CPU
    for name in axis or ():
        if name not in _AXES:
            raise ValueError(unknown("--axis", name, _AXES))
    if axis is None and (tokens or batch or width):  # naming values chooses their axes
        axis = [name for name, values in zip(_AXES, (tokens, batch, width), strict=True) if values]
    chosen_dtype = _one("--dtype", [parse_dtype(name) for name in dtype or ()]) or (
        torch.bfloat16 if torch_device.type == "cuda" else torch.float32
    )
    chosen_mode = _one("--mode", [parse_mode(name) for name in mode or ()]) or "forward"
    [config] = options.named_configs([model or default.model], ("256",), "adaln_zero")
    values: dict[Axis, Sequence[int]] = {
        "tokens": tokens or default.tokens,
        "batch": batch or default.batch,
        "width": width or default.width,
    }
    fixed = {"tokens": default.tokens_batch, "width": default.width_batch}
    points = [
        _Point(name, value, _case(config, name, value, fixed.get(name, value), chosen_dtype, chosen_mode))
        for name in _AXES
        if not axis or name in axis
        for value in sorted(set(values[name]))
    ]
    chosen = options.chosen_providers(providers, _PROVIDERS, [point.case for point in points], torch_device)
    run = Settings(options.positive("--seconds", seconds, 1.0), isolate=isolate, plugins=tuple(plugin or ()))
    names = [provider.name for provider in chosen]

    def measure(recorder: Recorder) -> None:
        from ..measure.preparing import blank_row
        from ..measure.runner import Runner
        from ..records.rows import ScalingRow

        with Runner(torch_device, run) as runner:
            for point in points:
                blanks = [ScalingRow(point.axis, point.value, blank_row(point.case, item)) for item in chosen]
                if recorder.has(blank.key for blank in blanks):
                    for _ in range(len(chosen) + 1):
                        recorder.report(f"{point.axis} {point.value}: measured before")
                    continue
                if recorder.out_of_time():
                    return
                recorder.set_aside(blank.key for blank in blanks)
                rows = runner.rows(point.case, chosen, recorder.report, recorder.out_of_time)
                recorder.add([ScalingRow(point.axis, point.value, row) for row in rows], with_scaling_shares)

    settings = {
        "device": str(torch_device),
        "model": config.name,
        "axes": list(dict.fromkeys(point.axis for point in points)),
        "dtype": dtype_name(chosen_dtype),
        "mode": chosen_mode,
        "providers": names,
        "seconds": run.seconds,
        "seed": run.seed,
    }
    results = run_suite(
        "scaling",
        torch_device,
        settings,
        measure,
        lambda results: [scaling_table(results)],
        path=json,
        steps=steps([point.case for point in points], chosen),
        precisions=[dtype_name(chosen_dtype)],
        resume=resume,
        budget=options.parse_budget(budget),
    )
    ours = [point.row for point in results.rows if point.row.is_ours]
    if any(row.status == "error" or (row.status == "ok" and row.parity is False) for row in ours):
        raise typer.Exit(_FAILED)


def with_scaling_shares(points: list[ScalingRow], ceilings: Ceilings) -> list[ScalingRow]:
    """The points with their rows' shares of the ceilings."""
    from ..records.metrics import with_shares

    rows = with_shares([point.row for point in points], ceilings)
    return [replace(point, row=row) for point, row in zip(points, rows, strict=True)]


def _one(option: str, values: list[_T]) -> _T | None:
    if len(values) > 1:
        raise ValueError(f"{option} can be given once here, got {len(values)} times")
    return values[0] if values else None


def _case(config: DiTConfig, axis: Axis, value: int, batch: int, dtype: torch.dtype, mode: str) -> Case:
    """The case in which one axis has a value."""
    from ..cases.case import Case

    if value < 1:
        raise ValueError(f"--{axis} must be at least 1, got {value}")
    if axis == "tokens":
        side = round(value**0.5)
        if side * side != value:
            raise ValueError(f"--tokens must be a square number, got {value}")
        config = replace(config, latent_size=side * config.patch_size)
    elif axis == "width":
        if value % config.head_dim:
            raise ValueError(f"--width must be a multiple of the head dim {config.head_dim}, got {value}")
        config = replace(config, hidden_size=value, num_heads=value // config.head_dim)
    return Case(config, batch, dtype, mode)  # type: ignore[arg-type]


def fits(rows: Sequence[ScalingRow]) -> dict[tuple[Axis, str], tuple[float, float, int]]:
    """(axis, provider) -> (exponent, r_squared, points) of time against the axis, from two points on."""
    from ..report.fits import fit_exponent

    curves: dict[tuple[Axis, str], dict[int, float]] = {}
    for point in rows:
        if point.row.ms is not None:
            curves.setdefault((point.axis, point.row.provider), {})[point.value] = point.row.ms.median
    return {
        key: (*fit_exponent(list(curve), list(curve.values())), len(curve))
        for key, curve in curves.items()
        if len(curve) > 1
    }


def scaling_table(results: Results) -> RenderableType:
    """The table of ``ditfast bench scaling``: a line a point and provider, then the exponents."""
    from rich.console import Console, Group

    from ...console import line, plain_table
    from ..records.machine import device_label
    from ..records.text import digits, size
    from ..report.fits import is_power_law
    from ..report.terminal import closing_notes, speedup, tick

    ascii_only = Console().options.ascii_only
    table = plain_table()
    for header in ("axis", "value", "provider"):
        table.add_column(header, justify="right" if header == "value" else "left", no_wrap=True)
    for header in ("ms", "ms / unit", "of limit", "memory", "parity", "speed-up"):
        table.add_column(header, justify="right", no_wrap=True)
    points = [point for point in results.rows if point.row.status != "unavailable"]
    for index, point in enumerate(points):
        row = point.row
        table.add_row(
            point.axis,
            str(point.value),
            row.provider,
            f"[red]{row.status}[/]" if row.ms is None else digits(row.ms.median),
            "-" if row.ms is None else digits(row.ms.median / point.value),
            "-" if row.ceiling_share is None else f"{row.ceiling_share:.0%}",
            "-" if row.peak_bytes is None else size(row.peak_bytes),
            tick(row.parity, ascii_only),
            speedup(row),
            end_section=index + 1 == len(points) or points[index + 1].value != point.value,
        )
    lines = [
        f"{axis}, {provider}: "
        + (f"time grows with the power {exponent:.2f}" if is_power_law(count, r_squared) else "no power law fits")
        + f" (R2 {r_squared:.3f}, {count} points)"
        for (axis, provider), (exponent, r_squared, count) in fits(points).items()
    ]
    lines.append("ms / unit: per token, image or element of the width.")
    lines.append("speed-up: over the fastest rival of the same point; only with parity.")
    noises = [point.row.noise for point in points if point.row.noise is not None]
    if noises:
        lines.append(f"Noise: up to {max(noises):.1%}, by the reference timed twice; less than that is a tie.")
    noted = [point for point in results.rows if point.row.note]
    lines += [f"{point.axis} {point.value}, {point.row.provider}: {point.row.note}" for point in noted]
    conditions = f"{results.settings.get('model')}, {results.settings.get('mode')}, {results.settings.get('dtype')}"
    title = line(f"ditfast bench scaling: {conditions}, {device_label(results)}", "bold")
    return Group(title, table, *map(line, [*lines, *closing_notes(results)]))
