"""``ditfast bench report`` and ``ditfast bench readme``: their options."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .data import Run

_DIFFERS = 1


def report(
    results: Annotated[
        list[Path], typer.Argument(help="Result files of any suites and devices.", metavar="RESULTS.json...")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, made where it is absent.", metavar="DIR")],
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            help="An older result to set beside; may be repeated.", show_default=False, metavar="OLD.json"
        ),
    ] = None,
) -> None:
    """A page, plots and tables for READMEs from result files.

    Writes report.html, plots/*.png and table.md, and removes the other plots of an earlier report in DIR. The page and
    the tables mark regressions against an older run; the exit code tells of errors only.
    """
    from .data import gather
    from .write import prepare, render, require_matplotlib, write

    gathered = gather(_load(results), _load(compare or []))
    prepare(out)
    require_matplotlib()
    write(render(gathered), out)
    if gathered.compared:
        worse = sum(pair.comparison.regressed for pair in gathered.compared)
        typer.echo(f"regressions past the noise: {worse} (the exit code stays 0)")
    typer.echo(f"report: {out / 'report.html'}", err=True)


def readme(
    readme: Annotated[Path, typer.Argument(help="The page with the markers, such as README.md.", metavar="PAGE.md")],
    results: Annotated[
        list[Path], typer.Argument(help="The result files to render.", metavar="RESULTS.json...")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 where the file would change.")
    ] = False,
) -> None:
    """Render result files into the table of a page, between its two markers."""
    import os

    from ...files import write_bytes
    from ..records.files import Results
    from .readme import first_difference, render

    # newlines as they are, so that a rewrite changes nothing else
    old = readme.read_bytes().decode("utf-8")
    folder = readme.absolute().parent
    links = {Path(os.path.relpath(path.absolute(), folder)).as_posix(): path for path in results}
    new = render(old, {link: Results.load(path) for link, path in links.items()})
    difference = first_difference(old, new)
    if check:
        if difference is not None:
            typer.echo(f"{readme} and the results disagree, {difference}", err=True)
            raise typer.Exit(_DIFFERS)
        return
    if difference is not None:
        write_bytes(new.encode("utf-8"), readme)
    typer.echo(f"{readme}: {'unchanged' if difference is None else 'rendered'}", err=True)


def _load(paths: Iterable[Path]) -> list[Run]:
    """The runs, named by their files; files of the same name are named by their paths."""
    from ..records.files import Results
    from .data import Run

    unique = list({path.resolve(): path for path in paths}.values())
    names = [path.name for path in unique]
    return [
        Run(path.name if names.count(path.name) == 1 else str(path), Results.load(path)) for path in unique
    ]
