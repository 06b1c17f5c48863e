"""``table.md``: the tables for READMEs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..rows import OpRow
from .data import Machine, Report, limits_text
from .headline import COLUMNS, headlines
from .suites import curves, largest_ops
from .tables import Table, comparison_table, memory_tables
from .text import digits, mode_name, model_name, op_case_name, percent, pixels, tick

NOTE = (
    "Median images/s. Best over best: the fastest ditfast with a parity tick over the fastest rival of the same run; "
    "no tick, no speed-up; a tie is a difference within the run's noise."
)


def markdown(report: Report) -> str:
    """Every table with its conditions; regressions in bold."""
    blocks = []
    for machine in report.machines:
        blocks.append(f"## {machine.label}\n\n{machine.short_conditions}.")
        if (limits := limits_text(machine.ceilings)) is not None:
            blocks.append(f"Limits measured in the same runs: {limits}.")
        blocks += [remark for run in machine.runs for remark in run.remarks]
        blocks += _models(machine) + _operators(machine) + _scaling(machine)
        blocks += [from_table(table) for table in memory_tables(machine)]
    for pair in report.compared:
        table = comparison_table(pair)
        blocks += [f"## {_escape(table.title)}", from_table(table), *table.notes]
    return "\n\n".join(blocks) + "\n"


def pipes(columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns as (name, whether numeric)."""
    lines = [[name for name, _ in columns], ["---:" if numeric else "---" for _, numeric in columns], *rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def from_table(table: Table) -> str:
    """A page's table, its bad news in bold."""
    return pipes(
        table.columns, ([f"**{c.text}**" if c.tone == "bad" else c.text for c in row] for row in table.rows)
    )


def _models(machine: Machine) -> list[str]:
    found = headlines(machine.rows("models"))
    if not found:
        return []
    names = [("model", False), ("size", False), ("batch", True), ("dtype", False), ("mode", False)]
    rows = []
    for item in found:
        row = item.case
        case = [model_name(row), pixels(row.latent_size), str(row.batch), row.dtype, mode_name(row.mode)]
        rows.append([*case, *item.cells])
    return [pipes([*names, *((name, True) for name in COLUMNS)], rows), NOTE]


def _operators(machine: Machine) -> list[str]:
    """Each operator at its largest shape."""
    found = largest_ops(machine.rows("ops"))
    if not found:
        return []
    providers = list(dict.fromkeys(row.provider for members in found for row in members))
    columns = [("operator", False), *((f"{name}, ms", True) for name in providers)]
    columns += [("ditfast's rate", True), ("of limit", True), ("parity", False), ("best over best", True)]
    return [pipes(columns, [_operator(members, providers) for members in found])]


def _operator(members: Sequence[OpRow], providers: Sequence[str]) -> list[str]:
    by = {row.provider: row for row in members}
    spreads = [by[name].ms if name in by else None for name in providers]
    times = ["-" if spread is None else digits(spread.median) for spread in spreads]
    ours = next((row for row in members if row.is_ours and row.ms), None)
    if ours is None:
        return [op_case_name(members[0]), *times, "-", "-", "-", "-"]
    speedup = f"{ours.speedup:.2f}x" if ours.speedup is not None and ours.parity is True else "-"
    return [
        op_case_name(ours),
        *times,
        f"{digits(ours.rate)} {ours.unit}",
        percent(ours.share),
        tick(ours.parity),
        speedup,
    ]


def _scaling(machine: Machine) -> list[str]:
    rows = []
    for (axis, held, mode, dtype), found in curves(machine.rows("scaling")).items():
        for curve in found:
            if curve.exponent is not None and curve.r_squared is not None:
                case = [axis, f"{held}, {mode_name(mode)}, {dtype}", curve.provider]
                rows.append(
                    [*case, f"{curve.exponent:.2f}", f"{curve.r_squared:.3f}", str(len(curve.measured))]
                )
    columns = [("time against", False), ("held", False), ("provider", False)]
    columns += [("exponent", True), ("r²", True), ("points", True)]
    return [pipes(columns, rows)] if rows else []


def _escape(text: str) -> str:
    """A cell: no bar or line break may end it."""
    return " ".join(text.replace("|", "\\|").split())
