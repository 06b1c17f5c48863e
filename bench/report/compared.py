"""A run beside an older one: losses come first; only ditfast's own rows are called regressions."""

from __future__ import annotations

from typing import Any

from ..records.compare import Change, timed
from ..records.text import digits, factor, percent, row_name
from .data import Compared
from .tables import Cell, Table, blank, columns_of


def comparison_table(pair: Compared) -> Table:
    """Every row of both runs; losses come first."""
    order = {"slower": 0, "faster": 1, "tie": 2}
    comparison = pair.comparison
    rows = [
        [Cell(row_name(row)), *blank(4), _worse(row, loss)]
        for affected, loss in ((comparison.lost, "no longer runs"), (comparison.unticked, "parity lost"))
        for row in affected
    ]
    for change in sorted(comparison.changes, key=lambda change: order[change.verdict]):
        numbers = [digits(change.old_ms), digits(change.new_ms), factor(change.speedup)]
        noise = percent(timed(change.row).noise)
        rows.append([Cell(row_name(change.row)), *map(Cell, numbers), Cell(noise), _verdict(change)])
    names = ("row", "then, ms", "now, ms", "speed", "noise now", "verdict")
    columns = columns_of(names, text=("row", "verdict"))
    return Table(f"{pair.new} against {pair.old}, on {pair.machine}", columns, rows, _notes(pair))


def _notes(pair: Compared) -> list[str]:
    notes = ["A change within the noise of either run, or with overlapping quartiles, is a tie."]
    if pair.comparison.only_old or pair.comparison.only_new:
        only = f"{pair.comparison.only_old} rows only then, {pair.comparison.only_new} rows only now"
        notes.append(f"Measured in one run alone: {only}.")
    return notes + [f"Conditions differ: {condition}." for condition in pair.comparison.conditions]


def _worse(row: Any, loss: str) -> Cell:
    return Cell(f"✗ {loss}", "bad") if timed(row).is_ours else Cell(f"{loss} (a rival)", "quiet")


def _verdict(change: Change) -> Cell:
    if change.is_regression:
        return Cell("✗ regression", "bad")
    if change.verdict == "slower":
        return Cell("slower (a rival)", "quiet")
    return Cell("faster", "good") if change.verdict == "faster" else Cell("a tie", "quiet")
