"""``ditfast bench sample``: whole sampling trajectories, with and without the schedule table and CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .. import options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..records.files import Results
    from ..records.rows import SampleRow
    from ..suites.sample import SampleCase
    from ..suites.suite import Recorder

_FAILED = 1
_GPU_BATCHES, _CPU_BATCHES = (1, 8, 64), (1, 8)
_GPU_STEPS, _CPU_STEPS = 250, 10


def sample(
    model: options.Models = None,
    batch: options.Batches = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. bf16 on a GPU, else fp32.", show_default=False)
    ] = None,
    sampler: Annotated[
        Literal["ddpm", "ddim", "dpm++", "euler", "heun"], typer.Option(help="The solver.")
    ] = "ddpm",
    steps: Annotated[
        int | None, typer.Option(help="Of the solver: 250 on a GPU, else 10.", show_default=False)
    ] = None,
    cfg_scale: Annotated[float, typer.Option(help="Of the guidance, above 1.")] = 4.0,
    image_size: options.ImageSizes = None,
    conditioning: options.Design = "adaln_zero",
    providers: options.Providers = None,
    device: options.Device = None,
    seconds: options.Seconds = None,
    json: options.Json = None,
    resume: options.Continue = False,
    budget: options.Budget = None,
) -> None:
    """Whole sampling trajectories, latents only, each with parity of the final latents.

    ditfast with and without schedule table and CUDA graphs, beside the loop around the reference and around
    diffusers' DiT. DiT-XL/2 at batch 1, 8 and 64 on a GPU; DiT-S/8 at 1 and 8 on a CPU, in under two minutes.
    """
    import torch

    from ditfast.inference import Sampler

    from ...environment import parse_device
    from ...files import check_target
    from ..cases.case import parse_dtype, unknown
    from ..suites.sample import PROVIDERS, SampleCase, rows
    from ..suites.suite import run_suite

    check_target(json)
    options.check_continue(resume, json)
    torch_device = parse_device(device)
    gpu = torch_device.type == "cuda"
    if not cfg_scale > 1:
        raise ValueError(f"--cfg-scale must be above 1, got {cfg_scale:g}: without guidance ditfast bench measures it")
    chosen = options.listed(providers or None, PROVIDERS)
    for name in chosen:
        if name not in PROVIDERS:
            raise ValueError(unknown("provider", name, PROVIDERS))
    count = (_GPU_STEPS if gpu else _CPU_STEPS) if steps is None else steps
    Sampler(sampler, count)  # says what is wrong with the steps
    precision = parse_dtype(dtype) if dtype else torch.bfloat16 if gpu else torch.float32
    configs = options.named_configs(model or ["DiT-XL/2" if gpu else "DiT-S/8"], image_size or ("256",), conditioning)
    sizes = sorted(set(batch or (_GPU_BATCHES if gpu else _CPU_BATCHES)))
    cases = [SampleCase(config, size, precision, sampler, count, cfg_scale) for config in configs for size in sizes]
    duration = options.positive("--seconds", seconds, 1.0)

    def run(recorder: Recorder) -> None:
        for case in cases:
            if recorder.has(case.row(name).key for name in chosen):
                recorder.report(f"{case.label}: measured before")
                continue
            if recorder.out_of_time():
                return
            recorder.set_aside(case.row(name).key for name in chosen)
            recorder.add(rows(case, chosen, torch_device, duration))
            recorder.report(case.label)

    settings = {
        "device": str(torch_device),
        "models": [config.name for config in configs],
        "batches": sizes,
        "dtype": str(precision).removeprefix("torch."),
        "sampler": sampler,
        "steps": count,
        "cfg_scale": cfg_scale,
        "providers": chosen,
        "seconds": duration,
    }
    results = run_suite(
        "sample",
        torch_device,
        settings,
        run,
        lambda results: [sample_table(results, cases)],
        path=json,
        steps=len(cases),
        resume=resume,
        budget=options.parse_budget(budget),
    )
    ours = [row for row in results.rows if row.is_ours]
    if any(row.status == "error" or (row.status == "ok" and row.parity is False) for row in ours):
        raise typer.Exit(_FAILED)


def sample_table(results: Results, cases: Sequence[SampleCase] = ()) -> RenderableType:
    """The trajectories, and what the table saves in a step of the first case of each model."""
    from rich.console import Console, Group
    from rich.markup import escape

    from ...console import line, plain_table
    from ..records.machine import device_label
    from ..records.text import STATUS, digits, model_name
    from ..report.terminal import closing_notes, speedup, tick

    ascii_only = Console().options.ascii_only
    table = plain_table()
    for header in ("model", "batch", "provider"):
        table.add_column(header, justify="right" if header == "batch" else "left", no_wrap=True)
    for header in ("s", "images/s", "ms / step", "error", "parity", "speed-up"):
        table.add_column(header, justify="right", no_wrap=True)
    shown: list[SampleRow] = [row for row in results.rows if row.status != "unavailable"]
    for index, row in enumerate(shown):
        first = index == 0 or shown[index - 1].case != row.case
        last = index + 1 == len(shown) or shown[index + 1].case != row.case
        cells: Sequence[str] = (f"[red]{STATUS[row.status]}[/]", *("",) * 5)
        if row.ms is not None:
            seconds, step = row.ms.median / 1e3, row.ms.median / row.steps
            error = "-" if row.error is None else f"{row.error:.1e}"
            rates = (digits(seconds), digits(row.images_per_s), digits(step))
            cells = (*rates, error, tick(row.parity, ascii_only), speedup(row))
        names = (model_name(row), str(row.batch)) if first else ("", "")
        table.add_row(*names, escape(row.provider), *cells, end_section=last)
    how = results.settings
    title = f"ditfast bench sample: {how.get('steps')} steps of {how.get('sampler')}, guidance {how.get('cfg_scale')}"
    lines = ["s: of a trajectory, from noise to latents, its schedule table made in it."]
    lines.append("parity: of final latents and all predictions against the model in fp64; all solve in fp32.")
    lines.append("speed-up: over the fastest rival of the same model and batch; only with parity.")
    noises = [row.noise for row in shown if row.noise is not None]
    if noises:
        lines.append(f"Noise: up to {max(noises):.1%}, by the reference timed twice; less than that is a tie.")
    lines += [f"{model_name(row)}, batch {row.batch}, {row.provider}: {row.note}" for row in shown if row.note]
    absent = {row.provider: row.note for row in results.rows if row.status == "unavailable"}
    lines += [f"Not measured: {name}: {reason}" for name, reason in absent.items()]
    lines += _traced(cases) + closing_notes(results)
    return Group(line(f"{title}, {device_label(results)}", "bold"), table, *map(line, lines))


def _traced(cases: Sequence[SampleCase]) -> list[str]:
    """What a step launches and reads, computed."""
    from ..cost.sampling import step_costs

    lines = []
    for case in {case.config: case for case in cases}.values():
        if not case.config.conditioning.startswith("adaln"):
            continue
        plain, table = step_costs(case.config, case.batch, case.dtype)
        lines.append(
            f"Traced, a step of {case.config.name} at batch {case.batch}: the table reads "
            f"{table.weight_bytes / plain.weight_bytes:.0%} of the weights ({table.weight_bytes / 1e6:.0f} MB) in "
            f"{table.launches} launches, without it {plain.launches}. "
            f"Making it, in every call, is {table.making:.1%} of the FLOPs."
        )
    return lines
