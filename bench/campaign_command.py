"""``ditfast bench campaign``: one command for half an hour on somebody's GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    import torch

    from .campaign import Campaign, Step
    from .records import Results

_INTERRUPTED, _FAILED = 130, 1
_BENCH = ("-m", "ditfast", "bench")
_ADALN = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")


def campaign(
    out: Annotated[Path, typer.Option(help="The folder for results, logs and the state.", metavar="DIR")],
    budget: Annotated[str, typer.Option(help="Wall-clock time, e.g. 9m; run again, it goes on.")] = "9m",
    device: options.Device = None,
) -> None:
    """Everything in order of value within a budget: verify, GPU tests, models, ops, sampling, the rest; the goals.

    Every row is saved as it comes. Interrupted or out of time, it keeps what it has; run again with the same --out,
    it goes on with what is missing. Ends with the goals: met, missed by how much, or not measured.
    """
    from .campaign import Campaign
    from .environment import parse_device
    from .goals import goals, goals_table
    from .progress import terminated_as_interrupted
    from .render import print_tables

    seconds = options.parse_budget(budget)
    assert seconds is not None
    where = parse_device(device)
    if where.type != "cuda" and device is None:
        raise ValueError("campaign measures a GPU, and there is none; --device cpu rehearses it with small models")
    opened = Campaign.open(out)
    interrupted = False
    try:
        with terminated_as_interrupted():
            opened.run(make_steps(where), seconds, lambda what: typer.echo(what, err=True))
    except KeyboardInterrupt:
        interrupted = True
    found = goals(load(opened))
    print_tables(goals_table(found))
    typer.echo(f"results: {out}; ditfast bench report {out}/*.json --out {out}/report renders them", err=True)
    if interrupted:
        raise typer.Exit(_INTERRUPTED)
    parity = found[-1]
    if parity.status == "missed" or any(step.state == "failed" for step in opened.steps.values()):
        raise typer.Exit(_FAILED)


def load(opened: Campaign) -> list[Results]:
    """The result files of a campaign; one that is damaged is named and left out, the others count."""
    from .records import Results

    results = []
    for path in opened.result_files():
        try:
            results.append(Results.load(path))
        except ValueError as error:
            typer.echo(f"left out: {error}", err=True)
    return results


def make_steps(device: torch.device) -> list[Step]:
    """The steps in order of value; on a CPU a rehearsal with the smallest models."""
    from .campaign import Step

    on = ("--device", str(device))
    verify = Step("verify", ("-m", "ditfast", "verify", *on, "--continue", "--json", "{json}"), 0.2, suite=True)
    ours = ("--providers", "reference,ditfast")
    if device.type != "cuda":
        small = ("--seconds", "0.1", *on)
        return [
            verify,
            _suite("models", "models", "--model", "DiT-S/8", "--batch", "1", *ours, *small),
            _suite("ops", "ops", "--model", "DiT-S/8", "--batch", "1", *small),
            _suite("memory", "memory", "--model", "DiT-S/8", "--batch", "1", "--mode", "train", *ours, *on),
            _suite("scaling", "scaling", "--batch", "1", "--batch", "2", *ours, *small),
            _sample("sample", "--batch", "1", "--steps", "2", *ours, *small),
        ]
    forward, train = ("--mode", "forward"), ("--mode", "train")
    xl2, s2 = ("--model", "DiT-XL/2"), ("--model", "DiT-S/2")
    adaln = [part for name in _ADALN for part in ("--operator", name)]
    every = [part for size in ("S", "B", "L", "XL") for part in ("--model", f"DiT-{size}/2")]
    small_size = ("--image-size", "256", *on)
    # a model of 28 blocks compiles for a minute and autotunes for more: first few rivals, later all
    few = ("--providers", "reference,reference-compile,ditfast,ditfast-graph")
    launches = ("--providers", "reference,reference-reduce-overhead,ditfast,ditfast-graph")
    return [
        verify,
        _suite("models-xl2-256", "models", *xl2, *forward, "--batch", "256", *few, *small_size, share=0.4),
        _suite("models-xl2-1", "models", *xl2, *forward, "--batch", "1", *launches, *small_size, share=0.4),
        _suite("ops-adaln", "ops", *adaln, *xl2, "--batch", "256", *on, share=0.2),
        _suite("models-xl2-train", "models", *xl2, *train, "--batch", "128", *few, *small_size, share=0.4),
        _suite("ops-attention", "ops", "--operator", "self_attention", *on, share=0.2),
        _gpu_tests(),
        _tune(on),
        _sample("sample-xl2", *xl2, "--batch", "1", "--batch", "8", "--steps", "50", *small_size, share=0.4),
        _suite("models-s2-train", "models", *s2, *train, "--batch", "256", *few, *small_size),
        _suite("memory", "memory", *xl2, *s2, *train, "--batch", "32", "--no-search", *ours, *on, share=0.3),
        _suite("models-xl2-forward", "models", *xl2, *forward, "--batch", "256", "--batch", "1", *small_size),
        _suite("ops", "ops", *xl2, *s2, "--batch", "256", *on),
        _suite("models-train", "models", *xl2, *s2, *train, "--batch", "128", *small_size),
        _suite("scaling", "scaling", *on),
        _suite("models-forward", "models", *forward, "--batch", "32", "--batch", "256", *on),
        _suite("models-cfg", "models", *every, "--mode", "cfg", "--batch", "32", *small_size),
        _suite("models-checkpoint", "models", *every, "--mode", "train-checkpoint", "--batch", "32", *small_size),
        _suite("memory-forward", "memory", *every, *forward, *train, *on),
        _sample("sample", "--batch", "64", *on),
        _suite("models-all", "models", *on),
    ]


def _suite(name: str, suite: str, *arguments: str, share: float = 1.0) -> Step:
    """A step of a suite that goes on with its file."""
    from .campaign import Step

    goes_on = ("--json", "{json}", "--continue", "--budget", "{seconds}")
    return Step(name, (*_BENCH, suite, *arguments, *goes_on), share, suite=True)


def _sample(name: str, *arguments: str, share: float = 1.0) -> Step:
    """A step of sampling, whose solvers are diffusers'."""
    from dataclasses import replace

    from .diffusers_dit import missing

    return replace(_suite(name, "sample", *arguments, share=share), skip=missing() or "")


def _gpu_tests() -> Step:
    """``pytest -m gpu``, where the tests are there: an installed ditfast does not bring them."""
    from importlib.util import find_spec

    import ditfast

    from .campaign import Step

    tests = Path(ditfast.__file__).resolve().parents[1] / "tests"
    skip = "" if (tests / "conftest.py").exists() else "no tests beside an installed ditfast; run from a checkout"
    if not skip and find_spec("pytest") is None:
        skip = "the package pytest is not installed"
    # not the strict configuration of the development environment, whose plugins may be absent here
    lenient = ("-o", "addopts=--import-mode=importlib", "--rootdir", str(tests.parent))
    command = ("-m", "pytest", "-q", "-m", "gpu", *lenient, str(tests))
    return Step("gpu-tests", command, 0.3, fine=(), skip=skip)


def _tune(on: Sequence[str]) -> Step:
    """``ditfast tune``, into a file of its own: tables that changed on the way would make other conditions of the
    campaign. Not .json, for it is no result; copied to kernels/configs/<gpu>.json it is in use."""
    from .campaign import Step

    ends = ("--out", "{json}.table", "--budget", "{seconds}")
    return Step("tune", ("-m", "ditfast", "tune", "--model", "DiT-XL/2", *ends, *on), 0.3, fine=())
