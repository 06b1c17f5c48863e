"""Tables and progress on a terminal, and SIGTERM as an interruption."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


@contextmanager
def progress(total: int, first: str = "measuring the limits") -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, plain lines elsewhere, both on stderr; yields what to call after each of ``total`` steps.

    Args:
        first: what is being done before the first step has ended.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        done = 0

        def line(text: str) -> None:
            nonlocal done
            done += 1
            typer.echo(f"[{done}/{max(done, total)}] {text}", err=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(first, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
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


_MAX_WIDTH = 400


def print_tables(*tables: RenderableType) -> None:
    """Prints on stdout at the tables' own width where the terminal, or the pipe, is narrower."""
    console = Console()
    wide = console.options.update(max_width=_MAX_WIDTH)
    parts = [part for table in tables for part in (table.renderables if isinstance(table, Group) else [table])]
    widths = [Measurement.get(console, wide, part).maximum for part in parts if isinstance(part, Table)]
    Console(width=max([console.width, *widths])).print(*tables, crop=False)


def plain_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def line(text: str, style: str = "") -> Text:
    """A line that is left to the terminal to wrap: a path or a message stays in one piece."""
    return Text(text, style, no_wrap=True, overflow="ignore")
