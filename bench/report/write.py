"""The report's files: rendered first, then written, each beside and renamed."""

from __future__ import annotations

import secrets
from pathlib import Path

from ..files import write_bytes
from .bars import memory_plots, model_plots
from .curves import scaling_plots
from .data import Report
from .figure import Palette, Plot
from .markdown import markdown
from .page import page
from .roofline import roofline_plots
from .summary import as_text, summarise


def prepare(out: Path) -> None:
    """Makes the folder and tries that it can be written, before anything is rendered.

    Raises:
        ValueError: a file is in its place, or in the place of its folder of plots.
        OSError: it cannot be made or written.
    """
    for folder in (out, out / "plots"):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out must be a folder, got {out}: {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{secrets.token_hex(4)}.part"
        try:
            trial.write_bytes(b"")
        finally:
            trial.unlink(missing_ok=True)


def require_matplotlib() -> None:
    """Raises ValueError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "the report's plots need matplotlib, which is missing: pip install 'ditfast[bench]'"
        ) from None


def render(report: Report) -> dict[str, bytes]:
    """The report's files by their paths within its folder; the page comes last."""
    plots = draw(report)
    sections = summarise(report)
    files = {f"plots/{plot.name}.png": plot.png for plot in plots}
    texts = {
        "table.md": markdown(report),
        "summary.txt": as_text(sections),
        "report.html": page(report, sections, plots),
    }
    return files | {name: text.encode() for name, text in texts.items()}


def draw(report: Report) -> list[Plot]:
    """Every plot, machine by machine."""
    palette = Palette(_providers(report))
    plots = []
    for machine in report.machines:
        plots += model_plots(machine, palette)
        plots += roofline_plots(machine, report.computed, palette)
        plots += scaling_plots(machine, palette)
        plots += memory_plots(machine, palette)
    return plots


def write(files: dict[str, bytes], out: Path) -> None:
    """Writes the files into a folder that :func:`prepare` has made."""
    for name, data in files.items():
        write_bytes(data, out / name)


def _providers(report: Report) -> set[str]:
    found = set()
    for machine in report.machines:
        rows = [*machine.rows("models"), *machine.rows("ops"), *machine.rows("memory")]
        found |= {row.provider for row in [*rows, *(item.row for item in machine.rows("scaling"))]}
    return found
