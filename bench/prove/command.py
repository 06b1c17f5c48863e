"""``ditfast verify``: the numerics rule on this machine's device, row by row into a file that can be continued."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from .. import options

if TYPE_CHECKING:
    from ..records.rows import VerifyRow

_FAILED = 1


def verify(
    device: options.Device = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="fp32, bf16 or fp16; may be repeated, all three by default.", show_default=False),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Processes at once. On a GPU one for each dtype and family of operators, up to 8 and the cores; "
            "on a CPU 1, this one.",
            show_default=False,
            metavar="N",
        ),
    ] = None,
    json: options.Json = None,
    resume: Annotated[
        bool, typer.Option("--continue", help="Go on with the --json file: what it has passed is not judged again.")
    ] = False,
) -> None:
    """Check every operator and model design against fp64 on this machine; exit 1 where one fails.

    An exception, a process that dies, or one that hangs is a failed row, and the other checks run all the same.
    """
    # without a GPU the kernels are checked in Triton's interpreter, which must be known before triton is imported
    if device in (None, "cpu") and "triton" not in sys.modules:
        import torch

        if device == "cpu" or not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    from ...console import print_tables, terminated_as_interrupted
    from ...environment import collect, parse_device
    from ...files import check_target
    from ..suites.suite import INTERRUPTED, begin
    from .processes import run_checks
    from .verify import checks, render

    check_target(json)
    options.check_continue(resume, json)
    torch_device = parse_device(device)
    selected = {item.key: item for item in checks(torch_device, dtype)}
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    labels = list(dict.fromkeys(item.group[1] for item in selected.values()))
    settings = {"device": str(torch_device), "dtype": labels, "jobs": jobs}
    results = begin("verify", settings, json, resume)
    results.environment = collect()
    rows: dict[tuple[object, ...], VerifyRow] = {row.key: row for row in results.rows}
    pending = [item for key, item in selected.items() if key not in rows or not rows[key].ok]
    judging = run_checks(pending, torch_device, jobs)
    try:
        with terminated_as_interrupted(), closing(judging):
            for row in judging:
                note = f": {row.note}" if row.note else ""
                typer.echo(f"{'ok  ' if row.ok else 'FAIL'} {row.subject}, {row.backend}, {row.dtype}{note}", err=True)
                rows[row.key] = row
                results.rows = [rows[key] for key in selected if key in rows]
                results.older = [item for item in results.older if item.row.key not in rows]
                if json is not None:
                    results.save(json)
        results.complete = True
    except KeyboardInterrupt:
        if not rows:
            typer.echo("interrupted before the first rows", err=True)
            raise typer.Exit(INTERRUPTED) from None
    results.rows = [rows[key] for key in selected if key in rows]
    if json is not None:
        results.save(json)
    print_tables(render(results.rows))
    if not results.complete:
        raise typer.Exit(INTERRUPTED)
    if not all(row.ok for row in results.rows):
        raise typer.Exit(_FAILED)
