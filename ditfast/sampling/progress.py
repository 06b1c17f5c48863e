"""The progress of a run: a bar with images/s and the time left on a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_EVERY = 10.0  # seconds between plain lines


class Progress(Protocol):
    """Called with the images done, parts of images included."""

    def __call__(self, images: float) -> None: ...


class Rate:
    """Images/s since the start, without those done before, and the time left.

    Args:
        total: images of the run.
        before: images that were there at the start.
    """

    def __init__(self, total: int, before: int) -> None:
        self.total, self.before, self.images = total, before, float(before)
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    @property
    def per_second(self) -> float:
        return (self.images - self.before) / max(self.seconds, 1e-9)

    def text(self) -> str:
        """``12.3 images/s, 1:02:03 left``."""
        rate = self.per_second
        if rate <= 0:
            return "- images/s"
        left = round((self.total - self.images) / rate)
        return f"{rate:.3g} images/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


@contextmanager
def progress(total: int, before: int, shown: bool = True) -> Iterator[Progress]:
    """Yields what to call while the run goes on; ``shown`` False shows nothing."""
    rate = Rate(total, before)
    if not shown:
        yield lambda images: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(rate)
        return
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("sampling", total=total, completed=before, rate="")

        def update(images: float) -> None:
            rate.images = images
            bar.update(task, completed=int(images), rate=rate.text())

        yield update


class _Lines:
    """A plain line every ten seconds."""

    def __init__(self, rate: Rate) -> None:
        self._rate, self._last = rate, 0.0

    def __call__(self, images: float) -> None:
        rate = self._rate
        rate.images = images
        if images < rate.total and rate.seconds - self._last >= _EVERY:
            self._last = rate.seconds
            print(f"{int(images)}/{rate.total} images, {rate.text()}", file=sys.stderr, flush=True)
