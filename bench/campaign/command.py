"""``ditfast bench campaign``: one command for some minutes on somebody's GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import options

if TYPE_CHECKING:
    from ..records.files import Results
    from .run import Campaign

_FAILED = 1
_LEAST_SECONDS = 60.0


def campaign(
    out: Annotated[Path, typer.Option(help="The folder for results, logs and the state.", metavar="DIR")],
    budget: Annotated[str, typer.Option(help="Wall-clock time, e.g. 8m; run again, it goes on.")] = "8m",
    device: Annotated[
        str | None, typer.Option(help="cuda or cuda:N. The first GPU by default.", show_default=False)
    ] = None,
    cache: Annotated[
        list[Path] | None,
        typer.Option(
            help="An archive of compiled kernels, of ditfast warm or of an earlier campaign; may be repeated.",
            show_default=False,
            metavar="ARCHIVE",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the campaign of this results.tar.xz, in a new --out.",
            show_default=False,
            metavar="ARCHIVE",
        ),
    ] = None,
    archives: Annotated[
        Path | None,
        typer.Option(
            help="The folder for archives to take along, each below 15 MB; DIR/archives by default.",
            show_default=False,
            metavar="DIR",
        ),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try the plan itself: tiny models on a CPU, of which nothing counts.")
    ] = False,
) -> None:
    """Parity, then figures in order of value, within a budget; what was found is kept at every moment.

    First, side by side and untimed: parity of everything, and rivals' first calls, which fill the compilers' caches.
    Then each figure in a process with a limit of its own: ours is saved alone, then timed again beside each rival.
    Interrupted or out of time, run again with the same --out it goes on; with --resume it goes on elsewhere. After a
    change of the sources everything is measured again, and older rows are kept, marked, until then.
    """
    from ...console import print_tables, terminated_as_interrupted
    from ...environment import parse_device
    from ..suites.suite import INTERRUPTED
    from . import archives as module
    from .plan import REHEARSAL_VARIABLES, plan
    from .run import Campaign
    from .table import figures, has_parity, table

    seconds = options.parse_budget(budget)
    assert seconds is not None
    if seconds < _LEAST_SECONDS:
        raise ValueError(f"--budget must be at least a minute, in which the first step fits, got {budget!r}")
    if rehearse and device is not None:
        raise ValueError("--rehearse runs on a CPU, and --device does not go with it")
    torch_device = parse_device("cpu" if rehearse else device)
    if torch_device.type != "cuda" and not rehearse:
        raise ValueError("campaign measures a GPU, and there is none; --rehearse tries the plan on a CPU")
    if resume is not None:
        module.unpack_results(resume, out)
    packed = archives or out / "archives"
    caches = module.Caches(out / "caches", packed)
    opened = Campaign.open(out, caches.variables | (REHEARSAL_VARIABLES if rehearse else {}))
    try:
        packed.mkdir(parents=True, exist_ok=True)
        module.pack_results(opened, packed)  # a folder that cannot be written is an error now, not later
    except OSError as error:
        raise ValueError(f"--archives must be a folder that can be written, got {packed}: {error.strerror}") from error
    for sentence in caches.fill(cache or ()):
        typer.echo(sentence, err=True)
    steps = plan(str(torch_device), rehearse)
    warm = False  # whether the caches have been packed since the steps that fill them

    def renew() -> None:
        nonlocal warm
        with _reporting_write_errors():
            module.pack_results(opened, packed)
            if not warm and all(step.name in opened.steps or opened.is_over(step) for step in steps if step.beside):
                warm = True  # and no more until the end: it takes time that is for measuring
                caches.pack()

    interrupted = False
    with _alone(out):
        try:
            with terminated_as_interrupted():
                opened.run(steps, seconds, lambda message: typer.echo(message, err=True), renew)
        except KeyboardInterrupt:
            interrupted = True
        summary = figures(steps, opened.steps, load(opened))
        rehearsed = "A rehearsal: small models on a CPU, of which nothing counts"
        print_tables(table(summary, rehearsed if rehearse else "What this campaign found"))
        with _reporting_write_errors():
            module.pack_results(opened, packed)
            caches.pack()
    typer.echo(f"results: {out}; archives: {packed}", err=True)
    typer.echo(f"ditfast bench report {out}/*.json --out {out}/report renders them", err=True)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    # with an exit code of 0 it was a rival that failed
    if not has_parity(summary) or any(step.state == "failed" and step.exit_code for step in opened.steps.values()):
        raise typer.Exit(_FAILED)


@contextmanager
def _reporting_write_errors() -> Iterator[None]:
    """Prints errors of writing archives, which end no campaign: its folder holds the results."""
    try:
        yield
    except OSError as error:
        typer.echo(f"an archive is not written: {error}", err=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two campaigns in one folder would time against each other.

    Raises:
        ValueError: another one runs in it.
    """
    import fcntl

    with (folder / "campaign.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"--out {folder}: another campaign runs in it") from None
        yield


def load(opened: Campaign) -> dict[str, Results]:
    """Step -> its results, of which those of other sources are older ones; a file that is damaged is named and left
    out, the others count."""
    from ..records.files import Older, Results
    from ..suites.suite import renewing

    results = {}
    for path in opened.result_files():
        try:
            loaded = Results.load(path)
        except ValueError as error:
            typer.echo(f"left out: {error}", err=True)
            continue
        if changed := renewing(loaded.environment, opened.environment):
            loaded.older += [Older(row, changed) for row in loaded.rows]
            loaded.rows = []
        results[path.stem] = loaded
    return results
