"""``ditfast tune``: measures launch configurations on the GPU at hand and writes its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .. import options

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from .family import Target
    from .measure import Task

_INTERRUPTED, _FAILED = 130, 1
_MODELS = ("DiT-XL/2", "DiT-L/2", "DiT-B/2", "DiT-S/2")
_SHOWN = 2  # candidates of a shape in the plan


def tune(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A named model, e.g. DiT-XL/2; may be repeated. By default XL/2, L/2, B/2 and S/2.", show_default=False
        ),
    ] = None,
    image_size: options.ImageSizes = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="bf16, fp16 or fp32 (as TF32); may be repeated. bf16 by default.", show_default=False),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Images in a batch; may be repeated. 1, 2, 4 ... 256 by default.", show_default=False),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="End after this long, e.g. 90s, 9m, 1h, keeping what is measured.",
            show_default=False,
            metavar="SECONDS",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the table here; by default where it is looked up, kernels/configs/<gpu>.json.",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure too what the table has from these versions.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the plan and exit; needs no GPU.")] = False,
    gpu: Annotated[
        Literal["sm_80", "sm_90"] | None,
        typer.Option(help="Whose plan --dry-run lists; the GPU at hand by default, else sm_90.", show_default=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cuda:N. The first by default.", show_default=False)
    ] = None,
) -> None:
    """Measure launch configurations on this GPU for the models' shapes, forward and training; write its table.

    Every candidate is judged against fp64 before it may win, and beats the heuristic only by more than the noise.
    The table is saved after every shape. Run again, it goes on: what it has from the same versions of torch, triton
    and the kernels is not measured twice. Interrupted or out of time, it keeps what it has.
    """
    try:
        from . import plan as module
    except ImportError as error:
        raise ValueError(f"tune needs the package triton: {error}") from None
    from ...console import print_tables, terminated_as_interrupted
    from ..cases.case import parse_dtype
    from .measure import GpuLost

    seconds = options.parse_budget(budget)
    for value in batch or ():
        if value < 1:
            raise ValueError(f"--batch must be at least 1, got {value}")
    sizes = list(dict.fromkeys(image_size or ("256",)))
    configs = {
        " ".join([config.name, *([size] if len(sizes) > 1 else [])]): config
        for size in sizes
        for config in options.named_configs(model or _MODELS, (size,), "adaln_zero")
    }
    dtypes = [parse_dtype(name) for name in dtype or ("bf16",)]
    tasks = module.plan(configs, dtypes, tuple(dict.fromkeys(batch or module.BATCHES)))
    cuda_device = _gpu(device)
    if dry_run:
        target = module.ARCHITECTURES[gpu or "sm_90"] if gpu or cuda_device is None else module.target_of(cuda_device)
        print_tables(plan_table(tasks, target))
        return
    if gpu is not None:
        raise ValueError("--gpu is for --dry-run: tune measures the GPU at hand")
    if cuda_device is None:
        raise ValueError("tune measures a GPU, and there is none; --dry-run lists the plan")
    try:
        with terminated_as_interrupted():
            failed = _measure(tasks, cuda_device, out, again, seconds)
    except KeyboardInterrupt:
        typer.echo("interrupted; what was measured is kept", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except GpuLost as error:
        typer.echo(f"error: {error}; what was measured before is kept", err=True)
        raise typer.Exit(_FAILED) from None
    if failed:
        raise typer.Exit(_FAILED)


def _gpu(name: str | None) -> torch.device | None:
    """The CUDA device of --device, or None if there is none."""
    from ...environment import parse_device

    device = parse_device(name)
    if name is not None and device.type != "cuda":
        raise ValueError(f"--device must be cuda or cuda:N, got {name!r}")
    return device if device.type == "cuda" else None


def _measure(
    tasks: Sequence[Task], device: torch.device, out: Path | None, again: bool, seconds: float | None
) -> bool:
    """Measures the tasks that the table lacks; returns whether all of them failed."""
    import torch

    from ditfast.kernels.configs.tables import table_path

    from ...environment import collect
    from . import plan as module
    from .table import Table

    if device.type == "cuda":
        torch.cuda.set_device(device)
    target = module.target_of(device)
    table = Table.open(out or table_path(target.name), target.name, collect())
    pending = [task for task in tasks if again or not table.has(task.key)]
    before = len(tasks) - len(pending)
    typer.echo(f"{target.name}: {len(pending)} shapes, {before} measured before; {table.path}", err=True)
    measured, failed = module.run(
        pending, target, device, table, lambda line: typer.echo(line, err=True), budget=seconds
    )
    remaining = len(pending) - measured - failed
    typer.echo(f"{table.path}: {measured} shapes measured, {failed} failed, {remaining} left for another run")
    return failed > 0 and measured == 0


def plan_table(tasks: Sequence[Task], target: Target) -> RenderableType:
    """The plan for a GPU: each key with its shape and its candidates, the heuristic's first."""
    from rich.console import Group

    from ...console import line, plain_table

    table = plain_table()
    for header in ("key", "shape", "model", "candidates", "the first of them"):
        table.add_column(header, justify="right" if header == "candidates" else "left", no_wrap=True)
    total = 0
    for task in tasks:
        labels = list(task.family.candidates(task.shape, task.dtype, target))
        total += len(labels)
        first = "; ".join(labels[:_SHOWN])
        table.add_row(task.key, task.family.describe(task.shape), task.model, str(len(labels)), first)
    title = f"ditfast tune, the plan for {target.name} ({target.multiprocessors} multiprocessors)"
    return Group(line(title, "bold"), table, line(f"{len(tasks)} shapes, {total} candidates, in order of value."))
