"""The report's files: rendered first, then written, each beside and renamed."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import replace
from pathlib import Path

from ...files import write_bytes
from .bars import memory_plots, model_plots
from .curves import scaling_plots
from .data import Report
from .figure import Palette, Plot
from .markdown import markdown
from .page import page
from .roofline import roofline_plots


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


# names the plots that are a report's own, in the folder of plots
MANIFEST = ".ditfast-plots"


def render(report: Report) -> dict[str, bytes]:
    """The report's files by their paths within its folder; the page comes last."""
    plots = draw(report)
    files = {f"plots/{plot.name}.png": plot.png for plot in plots}
    texts = {"table.md": markdown(report), "report.html": page(report, plots)}
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
    for machine in report.computed:
        plots += memory_plots(machine, palette)
    return _with_unique_names(plots)


def write(files: dict[str, bytes], out: Path) -> None:
    """Writes the files into a folder that :func:`prepare` has made, and removes an earlier report's other plots."""
    for name, data in files.items():
        write_bytes(data, out / name)
    folder = out / "plots"
    plots = sorted(name.removeprefix("plots/") for name in files if name.startswith("plots/"))
    for name in _earlier(folder / MANIFEST) - {*plots}:
        (folder / name).unlink(missing_ok=True)
    write_bytes((json.dumps(plots, indent=1) + "\n").encode(), folder / MANIFEST)


def _earlier(manifest: Path) -> set[str]:
    """The plots that an earlier report wrote; none where its list is absent or damaged."""
    try:
        names = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    # nothing but a plot's own name: this list is followed by deleting
    fits = re.compile(r"[a-z0-9-]+\.png").fullmatch
    return (
        {name for name in names if isinstance(name, str) and fits(name)} if isinstance(names, list) else set()
    )


def _with_unique_names(plots: list[Plot]) -> list[Plot]:
    """The plots; a name that another has already is numbered."""
    unique: dict[str, Plot] = {}
    for plot in plots:
        name, number = plot.name, 2
        while name in unique:
            name, number = f"{plot.name}-{number}", number + 1
        unique[name] = replace(plot, name=name)
    return list(unique.values())


def _providers(report: Report) -> set[str]:
    names = set()
    for machine in [*report.machines, *report.computed]:
        rows = [*machine.rows("models"), *machine.rows("ops"), *machine.rows("memory")]
        names |= {row.provider for row in [*rows, *(item.row for item in machine.rows("scaling"))]}
    return names
