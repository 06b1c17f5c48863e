"""A run beside an older one: what became worse is said first, and of ditfast alone called a regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..compare import Change, timed
from ..text import count, digits, factor, listed, percent, row_name
from .data import Compared
from .tables import Cell, Table, blank, columns_of


def comparison_lines(pair: Compared) -> list[str]:
    """Regressions past the noise first; then what else changed."""
    found = pair.comparison
    regressions = [change for change in found.changes if change.is_regression]
    lines = []
    if regressions:
        named = [f"{row_name(c.row)}: {digits(c.old_ms)} to {digits(c.new_ms)} ms" for c in regressions]
        lines.append(
            f"REGRESSION: {count(len(regressions), 'row')} of ditfast slower past the noise: {listed(named)}."
        )
    worse = ((found.lost, "ran then and not now"), (found.unticked, "had a parity tick then and not now"))
    lines += _named("REGRESSION: ", "ditfast", worse, lambda row: timed(row).is_ours)
    if not lines:
        lines.append(
            "No regression past the noise." if found.changes else "No row was measured in both runs."
        )
    lines += _named("", "rivals", worse, lambda row: not timed(row).is_ours)
    faster, ties = (
        sum(change.verdict == verdict for change in found.changes) for verdict in ("faster", "tie")
    )
    rivals = sum(change.verdict == "slower" for change in found.changes) - len(regressions)
    parts = [f"{count(faster, 'row')} faster", count(ties, "tie"), f"{count(rivals, 'row')} of rivals slower"]
    lines.append(
        f"Of {count(len(found.changes), 'row')} in both: {len(regressions)} of ditfast slower, {', '.join(parts)}."
    )
    if found.only_old or found.only_new:
        lines.append(
            f"Measured in one run alone: {found.only_old} rows only then, {found.only_new} only now."
        )
    return lines + [f"Conditions differ: {condition}." for condition in found.conditions]


def comparison_table(pair: Compared) -> Table:
    """Every row of both runs; what became worse comes first."""
    order = {"slower": 0, "faster": 1, "tie": 2}
    found = pair.comparison
    rows = [
        [Cell(row_name(row)), *blank(4), _worse(row, what)]
        for gone, what in ((found.lost, "no longer runs"), (found.unticked, "parity lost"))
        for row in gone
    ]
    for change in sorted(found.changes, key=lambda change: order[change.verdict]):
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


def _named(before: str, whose: str, worse: Any, wanted: Callable[[Any], bool]) -> list[str]:
    """A line for each kind of loss among the wanted rows."""
    lines = []
    for rows, what in worse:
        names = [row_name(row) for row in rows if wanted(row)]
        if names:
            lines.append(f"{before}{count(len(names), 'row')} of {whose} {what}: {listed(names)}.")
    return lines


def _worse(row: Any, what: str) -> Cell:
    return Cell(f"✗ {what}", "bad") if timed(row).is_ours else Cell(f"{what} (a rival)", "quiet")


def _verdict(change: Change) -> Cell:
    if change.is_regression:
        return Cell("✗ regression", "bad")
    if change.verdict == "slower":
        return Cell("slower (a rival)", "quiet")
    return Cell("faster", "good") if change.verdict == "faster" else Cell("a tie", "quiet")
