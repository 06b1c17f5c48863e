"""``table.md``: the tables for READMEs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from ..records.rows import OpRow
from ..records.text import digits, mode_name, model_name, op_case_name, percent, pixels, tick
from .compared import comparison_table
from .conditions import limits_text
from .data import Machine, Report
from .derived import curves, largest_ops, points_text
from .headline import COLUMNS, headlines, speedup_text
from .tables import Table, cost_tables, memory_tables, sample_tables, verify_tables

_BEST = (
    "Best over best: the fastest ditfast with a parity tick over the fastest rival of the same run; "
    "no tick, no speed-up; a tie is a difference within the run's noise."
)
NOTE = f"Median images/s. {_BEST}"
_OPS_NOTE = f"Median times at the largest shape measured. {_BEST}"
_SCALING_NOTE = "The exponent of time; below r² 0.95, or of fewer than three points, none is stated."
_SPECIAL = re.compile(r"([\\`|*_~#\[\]])")


def markdown(report: Report) -> str:
    """Every table with its conditions; regressions in bold."""
    blocks = []
    for machine in report.machines:
        blocks += _heading(machine)
        blocks += _models(machine) + _operators(machine) + _scaling(machine)
        tables = [*sample_tables(machine), *memory_tables(machine), *verify_tables(machine)]
        blocks += map(from_table, tables)
    for machine in report.computed:
        blocks += _heading(machine)
        for table in [*cost_tables(machine), *memory_tables(machine)]:
            blocks += [f"{escape(table.title)}:", from_table(table), *map(escape, table.notes)]
    for pair in report.compared:
        table = comparison_table(pair)
        blocks += [f"## {escape(table.title)}", from_table(table), *map(escape, table.notes)]
    return "\n\n".join(blocks) + "\n"


def pipes(columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of plain texts; columns as (name, whether numeric)."""
    return _lines(columns, ([escape(cell) for cell in row] for row in rows))


def from_table(table: Table) -> str:
    """A page's table, its bad news in bold."""
    cells = (
        [_bold(c.text) if c.tone == "bad" and c.text else escape(c.text) for c in row] for row in table.rows
    )
    return _lines(table.columns, cells)


def escape(text: str) -> str:
    """Text from a file, of which nothing is taken for Markdown or HTML, in one line."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", plain)


def link(path: str) -> str:
    """A link to a file by its path, with that as its text."""
    return f"[{escape(path)}]({quote(path)})"


def _bold(text: str) -> str:
    return f"**{escape(text)}**"


def _lines(columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    head = [[escape(name) for name, _ in columns], ["---:" if numeric else "---" for _, numeric in columns]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*head, *rows])


def _heading(machine: Machine) -> list[str]:
    """The device, the conditions, the limits, and what a reader must know."""
    lines = [f"## {escape(machine.label)}", f"{escape(machine.short_conditions)}."]
    if (limits := limits_text(machine.ceilings)) is not None:
        lines.append(f"Limits measured in the same runs: {escape(limits)}.")
    return lines + [escape(remark) for remark in machine.remarks]


def _models(machine: Machine) -> list[str]:
    cases = headlines(machine.rows("models"))
    if not cases:
        return []
    names = [("model", False), ("size", False), ("batch", True), ("dtype", False), ("mode", False)]
    rows = []
    for item in cases:
        row = item.case
        case = [model_name(row), pixels(row.latent_size), str(row.batch), row.dtype, mode_name(row.mode)]
        rows.append([*case, *item.cells])
    return [pipes([*names, *((name, True) for name in COLUMNS)], rows), NOTE]


def _operators(machine: Machine) -> list[str]:
    """Each operator at its largest shape."""
    operators = largest_ops(machine.rows("ops"))
    if not operators:
        return []
    providers = list(dict.fromkeys(row.provider for members in operators for row in members))
    columns = [("operator", False), *((f"{name}, ms", True) for name in providers)]
    columns += [("ditfast's rate", True), ("of limit", True), ("parity", False), ("best over best", True)]
    return [pipes(columns, [_operator(members, providers) for members in operators]), _OPS_NOTE]


def _operator(members: Sequence[OpRow], providers: Sequence[str]) -> list[str]:
    by = {row.provider: row for row in members}
    spreads = [by[name].ms if name in by else None for name in providers]
    times = ["-" if spread is None else digits(spread.median) for spread in spreads]
    measured = [row for row in members if row.is_ours and row.ms]
    # the fastest with its tick; without one, what ran stands there unticked
    ours = min(measured, key=lambda row: (row.parity is not True, row.ms.median if row.ms else 0.0), default=None)
    if ours is None:
        return [op_case_name(members[0]), *times, "-", "-", "-", "-"]
    rate = f"{digits(ours.rate)} {ours.unit}" + ("" if ours.provider == "ditfast" else f" ({ours.provider})")
    return [
        op_case_name(ours),
        *times,
        rate,
        percent(ours.share),
        tick(ours.parity),
        speedup_text(ours) or "-",
    ]


def _scaling(machine: Machine) -> list[str]:
    rows = []
    for (axis, held, mode, dtype), group in curves(machine.rows("scaling")).items():
        for curve in group:
            if not curve.measured:
                continue
            case = [axis, f"{held}, {mode_name(mode)}, {dtype}", curve.provider]
            fit = ["-" if curve.r_squared is None else f"{curve.r_squared:.3f}", str(len(curve.measured))]
            if curve.exponent is not None:
                rows.append([*case, f"{curve.exponent:.2f}", *fit])
            else:
                rows.append([*case, f"none stated ({points_text(curve)})", *fit])
    columns = [("time against", False), ("held", False), ("provider", False)]
    columns += [("exponent", True), ("r²", True), ("points", True)]
    return [pipes(columns, rows), _SCALING_NOTE] if rows else []
