"""The command ``ditfast``. Commands import what they need when they run, so that ``--help`` answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from .. import __version__
from ..bench.command import app as bench_app
from ..bench.prove.command import verify
from ..bench.tune.command import tune
from ..bench.warm.command import warm
from .evaluate import evaluate
from .sample import sample


class _Group(TyperGroup):
    """Reports a user's errors, of any command, as one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            if ctx.params["traceback"] or not _is_users(error):
                raise
            typer.secho(f"error: {_one_line(error)}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from None


def _is_users(error: Exception) -> bool:
    """Whether a user can mend it: not an OSError without a path (a closed pipe), nor a missing module of our own."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "ditfast").partition(".")[0] != "ditfast"
    return not isinstance(error, OSError) or error.filename is not None


def _one_line(error: Exception) -> str:
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


app = typer.Typer(
    name="ditfast",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Any DiT, fast, without changing what it computes.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ditfast {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the Python traceback of an error, for a bug report.")
    ] = False,
) -> None:
    # both are acted on elsewhere: by their callback, and by _Group
    pass


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="Report on this attention: tokens x heads x head dim; may be repeated.",
            show_default=False,
            metavar="TxHxD",
        ),
    ] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of the attention.")] = "bf16",
    cache: Annotated[
        Path | None,
        typer.Option(help="Report on this Triton cache; by default Triton's own.", show_default=False, metavar="DIR"),
    ] = None,
) -> None:
    """Versions, devices, and the operators' backends: which are available, and why the others are not.

    Also which attention backend a shape takes, by the GPU's tuned table or the heuristic, and whether the kernels that
    were compiled ahead are taken from Triton's cache, and if not, why.
    """
    from ..bench.warm import kernel_cache
    from ..environment import cache_folder
    from . import info as module

    facts = module.collect(attention or module.SHAPES, dtype)
    facts["kernel_cache"] = kernel_cache.facts(cache or cache_folder())
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(f"{module.render(facts, reasons=bool(attention))}\n\n{kernel_cache.render(facts['kernel_cache'])}")


@app.command()
def explain(
    factory: Annotated[
        str,
        typer.Argument(
            help="A function that returns a model, in a .py file or a module: model.py:make.", metavar="PATH:FACTORY"
        ),
    ],
    check: Annotated[bool, typer.Option(help="Compare the old and the new forward of each kind.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What ditfast.accelerate does with a model: each module it knows, accelerated or why not."""
    from dataclasses import asdict

    from ..adapters.accelerate import accelerate
    from ..bench.cases.factory import make_model

    report = accelerate(make_model(factory)[0], check=check)
    entries = [asdict(entry) for entry in report.entries]
    typer.echo(json.dumps(entries, indent=2) if as_json else str(report))


@app.command()
def convert(
    src: Annotated[
        Path,
        typer.Argument(help="A .pt or .safetensors file, or a folder of diffusers or accelerate.", metavar="SRC"),
    ],
    dst: Annotated[Path, typer.Argument(help="The file or folder to write.", metavar="DST")],
    to: Annotated[
        Literal["official", "safetensors", "diffusers"] | None,
        typer.Option(help="The format to write; by default what DST's suffix implies.", show_default=False),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(help="Which of several: ema, model, or an entry's name; auto prefers an average.", metavar="NAME"),
    ] = "auto",
    allow_inexact: Annotated[
        bool,
        typer.Option("--allow-inexact", help="Write diffusers even where its model computes something else."),
    ] = False,
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, where the file does not tell them.", show_default=False)
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Change the class count; new classes start random.", show_default=False)
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="Pixels, SIZE or HEIGHTxWIDTH, where the grid is ambiguous.", show_default=False),
    ] = None,
) -> None:
    """Convert a checkpoint between the official, safetensors and diffusers formats."""
    from ..checkpoint import files as checkpoint

    config = checkpoint.convert(
        src,
        dst,
        to=to,
        weights=weights,
        allow_inexact=allow_inexact,
        num_heads=num_heads,
        num_classes=num_classes,
        image_size=None if image_size is None else _parse_size(image_size),
    )
    typer.echo(f"{config.name} ({config.conditioning}): {src} -> {dst}")


def _parse_size(text: str) -> int | tuple[int, int]:
    """``"256"`` -> 256, ``"256x512"`` -> (256, 512)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"image-size must be SIZE or HEIGHTxWIDTH in pixels, got {text!r}")
    sizes = [int(part) for part in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


app.command("sample")(sample)
app.add_typer(bench_app, name="bench")
app.command("tune")(tune)
app.command("verify")(verify)
app.command("warm")(warm)
app.command("evaluate")(evaluate)


@app.command()
def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80 or sm_90; may be repeated, both by default.", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report here.", show_default=False, metavar="FILE")
    ] = None,
) -> None:
    """Compile every kernel for real GPUs, on any machine; exit 1 where one is past its budget."""
    from ..bench.prove import kernels as kernel_report
    from ..console import print_tables
    from ..files import check_target, write_json

    check_target(json_file)
    reports = kernel_report.compile_all(arch or ("sm_80", "sm_90"), report=lambda line: typer.echo(line, err=True))
    data = kernel_report.to_json(reports)
    if json_file is not None:
        write_json(data, json_file)
    print_tables(kernel_report.render(data))
    if any(row["violations"] for row in data["kernels"]):
        raise typer.Exit(1)


@app.command()
def rehearse(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="sm_80, sm_86, sm_89, sm_90 or sm_120; may be repeated, sm_90 and sm_80 by default.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="fp32, bf16 or fp16; may be repeated, bf16 by default.", show_default=False),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Every architecture, dtype, model width and token count, batches up to 256.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report here.", show_default=False, metavar="FILE")
    ] = None,
) -> None:
    """Launch every kernel on a GPU that is not there; exit 1 where one would have been refused, or was not reached."""
    from ..bench.prove import rehearsal
    from ..console import print_tables
    from ..files import check_target, write_json

    check_target(json_file)
    outcomes = []
    for outcome in rehearsal.rehearse(arch, dtype, full):
        part = outcome.part
        for failure in outcome.failures:
            typer.echo(f"FAIL {failure}", err=True)
        typer.echo(f"{outcome.cases} cases of {part.subject}, {part.dtype}, {part.arch}", err=True)
        outcomes.append(outcome)
    missed = rehearsal.unreached(outcomes)
    for sentence in missed:
        typer.echo(f"FAIL {sentence}", err=True)
    if json_file is not None:
        write_json(rehearsal.to_json(outcomes), json_file)
    print_tables(rehearsal.render(outcomes))
    if missed or any(outcome.failures for outcome in outcomes):
        raise typer.Exit(1)


def main() -> None:
    """The entry point of ``ditfast`` and ``python -m ditfast``."""
    app(prog_name="ditfast")
