"""``ditfast evaluate``: its options, its progress, its table."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..evaluation import Evaluation

_LABELS = {"fid": "FID", "sfid": "sFID", "is": "Inception Score", "precision": "precision", "recall": "recall"}


def evaluate(
    npz: Annotated[
        Path, typer.Option(help="The samples: uint8 images (N, H, W, 3) under arr_0.", metavar="FILE")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Images in the same form, or statistics mu, sigma, mu_s, sigma_s; ADM's have both. is needs none.",
            show_default=False,
            metavar="STATS.npz",
        ),
    ] = None,
    metrics: Annotated[str, typer.Option(help="Which metrics, separated by commas.")] = "fid,sfid,is,precision,recall",
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the network gets at a time.")] = 64,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. By default cuda where there is one.", show_default=False)
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="torch-fidelity's file of the Inception network; by default where torch.hub keeps it.",
            show_default=False,
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="A function that returns another network, a torch-fidelity FeatureExtractorBase: net.py:make.",
            show_default=False,
            metavar="PATH:FACTORY",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """FID, sFID, Inception Score, precision and recall of samples, through torch-fidelity.

    By the definitions of ADM's evaluation suite. Nothing is downloaded: where the network's weights are missing, the
    error says what they are called, where they come from and where they belong.
    """
    from dataclasses import asdict

    from ..bench.cases.factory import make_model
    from ..environment import parse_device
    from ..evaluation import evaluate as compute

    result = compute(
        npz,
        reference,
        metrics=[name.strip() for name in metrics.split(",") if name.strip()],
        batch_size=batch_size,
        device=parse_device(device),
        weights=weights,
        extractor=None if extractor is None else make_model(extractor)[0],
        on_progress=_Progress(),
    )
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
    else:
        _print(result)


def _print(result: Evaluation) -> None:
    from ..console import plain_table, print_tables

    table = plain_table()
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for metric, value in result.metrics.items():
        table.add_row(_LABELS[metric], f"{value:.4f}")
    for metric in result.missing:
        table.add_row(_LABELS[metric], "-")
    print_tables(table)
    typer.echo(f"{result.samples:,} samples; the reference has {result.reference_images:,} images")
    if result.by_statistics:
        typer.echo(f"by the reference's statistics: {', '.join(_LABELS[metric] for metric in result.by_statistics)}")
    for metric, reason in result.missing.items():
        typer.echo(f"no {_LABELS[metric]}: {reason}")
    for note in result.notes:
        typer.echo(note)


class _Progress:
    """Lines on stderr with images/s: one that is written over on a terminal, one every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._phase = ""
        self._start = self._last = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not total:
            typer.echo(f"computing: {_LABELS[phase]}", err=True)
            return
        now = time.perf_counter()
        if phase != self._phase:
            # the first batch, with its warm-up, is not in the rate
            self._phase, self._start, self._first, self._last = phase, now, done, now
        elif done < total and now - self._last < (0.2 if self._terminal else 10):
            return
        self._last = now
        rate = f", {(done - self._first) / (now - self._start):.1f} images/s" if done > self._first else ""
        end = "\n" if done == total or not self._terminal else ""
        typer.echo(f"{chr(13) if self._terminal else ''}{phase}: {done:,} of {total:,}{rate}{end}", err=True, nl=False)
