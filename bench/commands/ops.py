"""``ditfast bench ops``: every operator over the models' shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .. import options

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from ...testing.operators import Shape
    from ...testing.units import Direction
    from ..records.files import Results
    from ..records.rows import OpRow


def ops(
    operator: Annotated[
        list[str] | None, typer.Option(help="An operator; may be repeated, all by default.", show_default=False)
    ] = None,
    direction: Annotated[
        Literal["forward", "backward"] | None, typer.Option(help="Both by default.", show_default=False)
    ] = None,
    model: options.Models = None,
    batch: options.Batches = None,
    tokens: Annotated[
        int | None, typer.Option(help="T, in place of the models'.", show_default=False, metavar="T")
    ] = None,
    width: Annotated[
        list[int] | None,
        typer.Option(help="D, in place of the models'; may be repeated.", show_default=False, metavar="D"),
    ] = None,
    dtype: options.Dtypes = None,
    providers: options.Providers = None,
    device: options.Device = None,
    seconds: options.Seconds = None,
    json: options.Json = None,
    resume: options.Continue = False,
    budget: options.Budget = None,
) -> None:
    """Every operator beside eager PyTorch and torch.compile, as a share of the limits measured in the same run.

    The shapes are those of the named models (by default all that end in /2), of self_attention on a GPU head dims 72
    and 64 at 256, 1024 and 4096 tokens, 16,384 a batch, where it is set beside every other implementation there is. On
    a GPU whole rounds are replayed from a CUDA graph, without launch overhead.
    """
    import torch

    from ...environment import parse_device
    from ...files import check_target
    from ...testing.operators import OPERATORS
    from ..cases import attention
    from ..cases.case import dtype_name, parse_dtype, unknown
    from ..measure.preparing import computes
    from ..suites import ops as ops_bench
    from ..suites.suite import Recorder, run_suite

    check_target(json)
    options.check_continue(resume, json)
    for option, values in (("--batch", batch or ()), ("--width", width or ()), ("--tokens", (tokens,))):
        for value in values:
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
    torch_device = parse_device(device)
    gpu = torch_device.type == "cuda"
    dtypes = [parse_dtype(name) for name in dtype or ()] or [torch.bfloat16 if gpu else torch.float32]
    for name in operator or ():
        if name not in ops_bench.MEASURED:
            raise ValueError(unknown("--operator", name, ops_bench.MEASURED))
    names = list(operator or ops_bench.MEASURED)
    chosen = options.listed(providers or None, ops_bench.PROVIDERS)
    for name in chosen:
        if name not in ops_bench.PROVIDERS:
            raise ValueError(unknown("--providers", name, ops_bench.PROVIDERS))
    directions: list[Direction] = [direction] if direction else ["forward", "backward"]
    shapes = _shapes(model, width, tokens, batch or ([8, 256] if gpu else [4]), gpu)
    named_shapes = shapes if model or width or tokens or batch or not gpu else None
    cases: list[tuple[str, Direction, Shape, torch.dtype]] = [
        (name, way, shape, precision)
        for shape in dict.fromkeys([*shapes, *attention.SHAPES])
        for name in names
        if shape in ops_bench.shapes_of(name, named_shapes, shapes)
        for precision in dtypes
        for way in directions
    ]
    duration = options.positive("--seconds", seconds, 0.5)
    if not any(item in chosen for name, way, _, _ in cases for item in ops_bench.providers(name, way, torch_device)):
        raise ValueError(f"none of the providers {', '.join(chosen)} runs one of these operators on {torch_device}")

    def measure(recorder: Recorder) -> None:
        def save(rows: list[OpRow]) -> None:
            recorder.add(rows, ops_bench.with_op_shares, so_far=True)

        failed = {row.case for row in recorder.results.rows if row.status == "error"}
        # what has failed comes last: it may have taken the GPU's context with it
        for name, direction, shape, dtype in sorted(cases, key=lambda item: _case_of(*item) in failed):
            label = f"{name}, {direction}, B={shape.batch} T={shape.tokens} D={shape.width}, {dtype_name(dtype)}"
            competing = [item for item in ops_bench.providers(name, direction, torch_device) if item in chosen]
            keys = [ops_bench.blank_row(name, direction, shape, dtype, provider).key for provider in competing]
            if recorder.has(keys):
                recorder.report(f"{label}: measured before")
                continue
            if recorder.out_of_time():
                return
            recorder.set_aside(keys)
            saving = save if recorder.path else None
            rows = ops_bench.run_operator(
                OPERATORS[name], direction, shape, dtype, torch_device, duration, chosen, saving
            )
            lost = any(row.status == "error" for row in rows) and not computes(torch_device)
            recorder.add(rows, ops_bench.with_op_shares, so_far=lost)  # of a lost GPU no limits can be measured
            recorder.report(label)
            if lost:
                typer.echo(f"{label}: left the GPU in an error; another run goes on with the others", err=True)
                recorder.cut = True
                return

    settings = {
        "device": str(torch_device),
        "operators": names,
        "directions": directions,
        "dtypes": list(map(dtype_name, dtypes)),
        "providers": chosen,
        "shapes": [[shape.batch, shape.tokens, shape.width] for shape in dict.fromkeys(case[2] for case in cases)],
        "seconds": duration,
    }
    results = run_suite(
        "ops",
        torch_device,
        settings,
        measure,
        lambda results: [ops_table(results)],
        path=json,
        steps=len(cases),
        precisions=list(map(dtype_name, dtypes)),
        resume=resume,
        budget=options.parse_budget(budget),
    )
    if any(row.is_ours and (row.parity is not True or row.ms is None) for row in results.rows):
        raise typer.Exit(1)


def _case_of(name: str, direction: Direction, shape: Shape, dtype: torch.dtype) -> tuple[object, ...]:
    """What its rows have in common."""
    from ..suites.ops import blank_row

    return blank_row(name, direction, shape, dtype, "ditfast").case


def _shapes(
    models: list[str] | None, widths: list[int] | None, tokens: int | None, batches: list[int], gpu: bool
) -> list[Shape]:
    """The shapes of the models, or of the widths, at every batch."""
    from ditfast.config import MODELS

    from ...testing.operators import Shape

    if widths:
        sizes = [(tokens or 256, width, heads(width), _LAYERS) for width in widths]
    else:
        names = models or ([name for name in MODELS if name.endswith("/2")] if gpu else ["DiT-S/2"])
        configs = options.named_configs(names, ("256",), "adaln_zero")
        sizes = [
            (tokens or config.num_tokens, config.hidden_size, config.num_heads, config.depth + 1) for config in configs
        ]
    return [
        Shape(batch, length, width, num_heads=num_heads, ratio=4, layers=layers)
        for length, width, num_heads, layers in dict.fromkeys(sizes)
        for batch in dict.fromkeys(batches)
    ]


_LAYERS = 29  # of XL/2, for widths without a model


def heads(width: int) -> int:
    """The heads of the named models: a head dim of 72 at width 1152, else 64 where it divides."""
    if width == 1152:
        return 16
    return width // 64 if width % 64 == 0 else 1


def ops_table(results: Results) -> RenderableType:
    """The table of ``ditfast bench ops``, and what could not be measured and why."""
    from rich.console import Console, Group

    from ...console import line, plain_table
    from ..records.machine import device_label
    from ..records.text import digits
    from ..report.terminal import closing_notes, speedup, tick

    ascii_only = Console().options.ascii_only
    table = plain_table()
    for header in ("operator", "direction", "B x T x D", "dtype", "provider"):
        table.add_column(header, no_wrap=True)
    for header in ("ms", "quartiles", "rate", "of limit", "parity", "speed-up"):
        table.add_column(header, justify="right", no_wrap=True)
    rows = [row for row in results.rows if row.status != "unavailable"]
    for index, row in enumerate(rows):
        times = ("-", "-") if row.ms is None else (f"{row.ms.median:.4g}", f"{row.ms.p25:.4g}-{row.ms.p75:.4g}")
        table.add_row(
            row.operator,
            row.direction,
            row.size,
            row.dtype,
            row.provider,
            *times,
            f"[red]{row.status}[/]" if row.rate is None else f"{digits(row.rate)} {row.unit}",
            "-" if row.share is None else f"{row.share:.0%}",
            tick(row.parity, ascii_only),
            speedup(row),
            end_section=index + 1 == len(rows) or rows[index + 1].case != row.case,
        )
    timed = {"graph": "replayed from CUDA graphs", "calls": "with the host's launches"}
    lines = [f"Timed {', '.join(dict.fromkeys(timed[row.timed] for row in rows))}."] if rows else []
    lines.append("of limit: GB/s over the copy bandwidth, TFLOP/s over the matmul rate, both measured in this run.")
    lines.append("speed-up: over the fastest of the others; only with parity.")
    noises = [row.noise for row in rows if row.noise is not None]
    if noises:
        lines.append(f"Noise: up to {max(noises):.1%}, by one of each case timed twice; less than that is a tie.")
    noted = [row for row in results.rows if row.note]
    lines += dict.fromkeys(f"{row.operator}, {row.direction}, {row.provider}: {row.note}" for row in noted)
    title = line(f"ditfast bench ops, {device_label(results)}", "bold")
    return Group(title, table, *map(line, [*lines, *closing_notes(results)]))
