"""``ditfast bench``: options, progress, interruption and output. What is heavy is imported when it runs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .ops_command import ops

if TYPE_CHECKING:
    import torch

    from .cases import Case, Mode
    from .providers import Provider
    from .records import Results

app = typer.Typer(help="Measure DiT models: the reference, its rivals and ditfast, each row with a parity tick.")

app.command("ops")(ops)

_FAILED, _INTERRUPTED = 1, 130
# seconds after which the default run on a CPU compiles nothing more: it has to end within two minutes
_COMPILE_UNTIL = 50.0


@dataclass(frozen=True)
class _Plan:
    """What the options ask for."""

    cases: list[Case]
    providers: list[Provider]
    device: torch.device
    seconds: float
    settings: dict[str, Any]


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Annotated[
        list[str] | None, typer.Option(help="A named model, e.g. DiT-XL/2; may be repeated.", show_default=False)
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Images in a batch; may be repeated.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; bf16 by default on a GPU, else fp32.", show_default=False)
    ] = None,
    mode: Annotated[
        Literal["forward", "cfg", "train"],
        typer.Option(help="One forward, one guided forward, or one training step (loss, backward, AdamW)."),
    ] = "forward",
    providers: Annotated[
        str | None, typer.Option(help="Who runs, by commas, e.g. reference,ditfast.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the results here, after every case.", show_default=False, metavar="FILE")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Compare with an older --json file.", show_default=False, metavar="OLD.json")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. By default cuda where there is one.", show_default=False)
    ] = None,
    image_size: Annotated[str, typer.Option(help="Pixels, SIZE or HEIGHTxWIDTH.")] = "256",
    conditioning: Annotated[
        Literal["in_context", "cross_attention", "adaln", "adaln_zero"], typer.Option(help="The block design.")
    ] = "adaln_zero",
    seconds: Annotated[
        float | None, typer.Option(help="Time for each provider in each case. 1 by default.", show_default=False)
    ] = None,
) -> None:
    """Measure DiT models: the reference, its rivals and ditfast, each row with a parity tick.

    Without options: small models on a CPU, in under two minutes; all twelve sizes on a GPU.
    """
    if context.invoked_subcommand is not None:
        return
    results = None
    with _terminated_as_interrupted():
        try:
            from .files import check_target
            from .records import Results

            old = None if compare is None else Results.load(compare)
            check_target(json)
            plan = _plan(model, batch, dtype, mode, providers, device, image_size, conditioning, seconds)
            results = Results(environment={}, settings=plan.settings)
            _measure(plan, results, json)
            results.complete = True
        except KeyboardInterrupt:
            if results is not None and results.rows:
                _finish(results, json)
            else:
                typer.echo("interrupted before the first rows", err=True)
            raise typer.Exit(_INTERRUPTED) from None
    _finish(results, json, old, compare)
    ours = [row for row in results.rows if row.is_ours]
    if any(row.status == "error" or (row.status == "ok" and row.parity is not True) for row in ours):
        raise typer.Exit(_FAILED)


def _plan(
    models: list[str] | None,
    batches: list[int] | None,
    dtype: str | None,
    mode: Mode,
    provider_names: str | None,
    device_name: str | None,
    image_size: str,
    conditioning: str,
    seconds: float | None,
) -> _Plan:
    """The options checked and completed by the device's defaults; a ValueError where they are wrong."""
    from ditfast.config import MODELS, DiTConfig

    from .cases import defaults, make_cases, parse_dtype, parse_image_size, unknown
    from .environment import parse_device
    from .providers import PROVIDERS, get_provider

    device = parse_device(device_name)
    default = defaults(device)
    size = parse_image_size(image_size)
    names = models or default.models
    for name in names:
        if name not in MODELS:
            raise ValueError(unknown("model", name, MODELS))
    named = [DiTConfig.named(name, image_size=size, conditioning=conditioning) for name in names]
    cases = make_cases(named, batches or default.batches, parse_dtype(dtype) if dtype else default.dtype, mode)
    listed = default.providers if provider_names is None else provider_names.split(",")
    provider_list = list(dict.fromkeys(name.strip() for name in listed if name.strip()))
    if not provider_list:
        raise ValueError(f"--providers must name at least one of {', '.join(PROVIDERS)}, got {provider_names!r}")
    chosen = [get_provider(name) for name in provider_list]
    if device.type == "cpu" and not (provider_names or models or batches):
        deadline = time.monotonic() + _COMPILE_UNTIL
        chosen = [_until(provider, deadline) if "compile" in provider.name else provider for provider in chosen]
    reasons = {provider.name: provider.unavailable(cases[0], device) for provider in chosen}
    if all(reasons.values()):
        listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"none of the providers can run {cases[0].label} on {device}: {listing}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {seconds}")
    left_out = {} if provider_names is not None else _left_out(provider_list, cases[0], device)
    settings = {
        "device": str(device),
        "models": [config.name for config in named],
        "batches": sorted({case.batch for case in cases}),
        "dtype": cases[0].dtype_name,
        "mode": mode,
        "image_size": list(size),
        "conditioning": conditioning,
        "providers": provider_list,
        "providers_left_out": left_out,
        "seconds": seconds or default.seconds,
        "seed": 0,
    }
    return _Plan(cases, chosen, device, seconds or default.seconds, settings)


def _until(provider: Provider, deadline: float) -> Provider:
    """The provider, unavailable to cases that begin after the deadline."""

    def unavailable(case: Case, device: torch.device) -> str | None:
        if time.monotonic() > deadline:
            return f"left out so that the default run stays under two minutes; --providers {provider.name} runs it"
        return provider.unavailable(case, device)

    return replace(provider, unavailable=unavailable)


def _left_out(names: list[str], case: Case, device: torch.device) -> dict[str, str]:
    """Why the default leaves out each provider that it does."""
    from .providers import PROVIDERS

    ask = f"left out by default on a {'GPU' if device.type == 'cuda' else 'CPU'}; --providers {{}} runs it"
    rest = [provider for provider in PROVIDERS.values() if provider.name not in names]
    return {provider.name: provider.unavailable(case, device) or ask.format(provider.name) for provider in rest}


def _measure(plan: _Plan, results: Results, path: Path | None) -> None:
    """Fills ``results``, saving after every case."""
    import torch

    from .ceilings import highest, measure_ceilings
    from .environment import collect
    from .metrics import with_shares
    from .runner import Settings, run, steps

    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    precisions = [plan.cases[0].dtype_name, *(p.precision for p in plan.providers if p.precision)]
    with _progress(1 + steps(plan.cases, plan.providers)) as report:
        runnable = [p for p in precisions if p != "tf32" or plan.device.type == "cuda"]
        results.environment = collect()
        results.ceilings = measure_ceilings(plan.device, runnable)
        results.environment = collect()  # again, with the clocks of a busy device
        report("limits")
        settings = Settings(seconds=plan.seconds, seed=plan.settings["seed"])
        for rows in run(plan.cases, plan.providers, plan.device, settings, report):
            # a limit measured while the machine was busy is none
            again = measure_ceilings(plan.device, runnable, seconds=0.2)
            results.ceilings = highest(results.ceilings, again)
            results.rows = with_shares([*results.rows, *rows], results.ceilings)
            if path is not None:
                results.save(path)


def _finish(results: Results, path: Path | None, old: Results | None = None, old_path: Path | None = None) -> None:
    """Saves and prints what there is."""
    from .compare import compare
    from .render import comparison_table, print_tables, results_table

    if path is not None:
        results.save(path)
    tables = [results_table(results)]
    if old is not None:
        tables.append(comparison_table(compare(old, results), str(old_path)))
    print_tables(*tables)
    if path is not None:
        typer.echo(f"results: {path}", err=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, plain lines elsewhere, both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        done = 0

        def line(what: str) -> None:
            nonlocal done
            done += 1
            typer.echo(f"[{done}/{total}] {what}", err=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring the limits", total=total)
        yield lambda what: progress.update(task, advance=1, description=what)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt within the block, as SIGINT does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # handlers belong to the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
