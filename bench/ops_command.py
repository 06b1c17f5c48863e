"""``ditfast bench ops``: the options of the operator benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def ops(
    operator: Annotated[
        list[str] | None, typer.Option(help="An operator; may be repeated, all by default.", show_default=False)
    ] = None,
    direction: Annotated[
        Literal["forward", "backward"] | None, typer.Option(help="Both by default.", show_default=False)
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="May be repeated.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(help="T.")] = 256,
    width: Annotated[list[int] | None, typer.Option(help="D; may be repeated.", show_default=False)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; bf16 by default on a GPU, else fp32.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. By default cuda where there is one.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each provider of a row.")] = 0.5,
    json: Annotated[
        Path | None, typer.Option(help="Write the results here, after every row.", show_default=False, metavar="FILE")
    ] = None,
) -> None:
    """Every operator beside eager PyTorch and torch.compile, as a share of the measured limits."""
    from . import ops_bench
    from .cases import parse_dtype
    from .ceilings import measure_ceilings
    from .environment import collect, parse_device
    from .files import check_target, write_json
    from .operators import Shape
    from .render import print_tables

    check_target(json)
    for option, values in (("--batch", batch or ()), ("--width", width or ()), ("--tokens", (tokens,))):
        for value in values:
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
    if not seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {seconds}")
    where = parse_device(device)
    gpu = where.type == "cuda"
    label = dtype or ("bf16" if gpu else "fp32")
    chosen = parse_dtype(label)
    for name in operator or ():
        if name not in ops_bench.MEASURED:
            raise ValueError(f"--operator must be one of {', '.join(ops_bench.MEASURED)}, got {name!r}")
    shapes = [
        Shape(batch_size, tokens, size, num_heads=heads(size))
        for size in width or ([384, 768, 1024, 1152] if gpu else [384])
        for batch_size in batch or ([8, 64, 256] if gpu else [4])
    ]
    ceilings = measure_ceilings(where, [label])
    environment = collect()
    rows: list[ops_bench.OpRow] = []
    directions: list[ops_bench.Direction] = [direction] if direction else ["forward", "backward"]
    try:
        for found in ops_bench.run_all(
            list(operator or ops_bench.MEASURED), directions, shapes, chosen, where, ceilings, seconds
        ):
            rows += found
            typer.echo(f"{found[0].operator}, {found[0].direction}, B={found[0].batch} D={found[0].width}", err=True)
            if json is not None:
                write_json(ops_bench.to_json(rows, ceilings, environment), json)
    except KeyboardInterrupt:
        print_tables(ops_bench.render(rows, ceilings))
        raise typer.Exit(130) from None
    print_tables(ops_bench.render(rows, ceilings))
    if any(row.provider == "ditfast" and (row.parity is not True or row.ms is None) for row in rows):
        raise typer.Exit(1)


def heads(width: int) -> int:
    """The heads of the named models: a head dim of 72 at width 1152, else 64 where it divides."""
    if width == 1152:
        return 16
    return width // 64 if width % 64 == 0 else 1
