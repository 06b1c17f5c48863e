"""``ditfast bench readme``: the table of results in a page, rendered from result files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..records.files import Results
from ..records.rows import ModelRow
from ..records.text import listed, mode_name, model_name, percent, pixels
from .conditions import limits_text
from .data import Machine, Run, gather
from .headline import COLUMNS, Headline, headlines
from .markdown import NOTE, escape, link, pipes

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
_NO_GPU = ["GPU: DiT-XL/2, 256 px, bf16", *["not measured yet"] * 4, "-", "-"]


def render(readme: str, results: Mapping[str, Results]) -> str:
    """A page with the block between its markers replaced.

    Args:
        readme: the page's text, with one line ``BEGIN`` and below it one line ``END``.
        results: link, relative to the page -> the file's content. The suite models makes the table; files of the
            other suites are linked.

    Raises:
        ValueError: no results, or markers that are missing, repeated or in the wrong order.
    """
    before, after = _split(readme)
    return f"{before}{BEGIN}\n\n{block(results)}\n\n{END}{after}"


def block(results: Mapping[str, Results]) -> str:
    """The table, a note on its columns, and each device's conditions and files."""
    report = gather(Run(link, content) for link, content in results.items())
    measured = [machine for machine in report.machines if machine.rows("models")]
    rows = [] if any(machine.is_gpu for machine in measured) else [_NO_GPU]
    chosen = _chosen(measured)
    rows += [[_case(machine, headline), *headline.cells] for machine, headline in chosen]
    columns = [("images/s", False), *((name, True) for name in COLUMNS)]
    lines = []
    for machine in report.machines:
        cases = [headline for owner, headline in chosen if owner is machine]
        lines.append(f"- {_conditions(machine, cases)}")
    lines += [f"- {escape(machine.short_conditions)}: {_links(machine.runs)}." for machine in report.computed]
    return "\n\n".join([pipes(columns, rows), NOTE, "\n".join(lines)])


def _chosen(machines: Iterable[Machine]) -> list[tuple[Machine, Headline]]:
    """The cases; if one was measured again under the same conditions, its run with most rivals, then most rows."""
    best: dict[tuple[object, ...], tuple[tuple[int, int], Machine, Headline]] = {}
    for machine in machines:
        for headline in headlines(machine.rows("models")):
            measured = [row for row in headline.rows if row.ms is not None]
            worth = (sum(not row.is_ours for row in measured), len(measured))
            case = (machine.identity, headline.case.case)
            if case not in best or worth > best[case][0]:
                best[case] = (worth, machine, headline)
    return [(machine, headline) for _, machine, headline in best.values()]


def first_difference(old: str, new: str) -> str | None:
    """The first line in which two texts differ, with its number; None where they are equal."""
    if old == new:
        return None
    was, now = old.splitlines(), new.splitlines()
    for number, (left, right) in enumerate(zip(was, now, strict=False), 1):
        if left != right:
            return f"line {number}: {left!r} should be {right!r}"
    number = min(len(was), len(now)) + 1
    if len(was) == len(now):
        return f"line {number - 1} or before it: the line ends differ"
    left, right = (repr(lines[number - 1]) if number <= len(lines) else "nothing" for lines in (was, now))
    return f"line {number}: {left} should be {right}"


def _split(readme: str) -> tuple[str, str]:
    """The text before and after the block."""
    for marker in (BEGIN, END):
        if readme.count(marker) != 1:
            raise ValueError(f"README must hold {marker!r} once, got {readme.count(marker)}")
    before, _, rest = readme.partition(BEGIN)
    if END not in rest:
        raise ValueError(f"README must hold {BEGIN!r} before {END!r}, got them the other way round")
    return before, rest.partition(END)[2]


def _case(machine: Machine, headline: Headline) -> str:
    row = headline.case
    name = model_name(row) if row.conditioning != "adaln_zero" else row.model
    size = [] if name != row.model and tuple(row.latent_size) != (32, 32) else [pixels(row.latent_size)]
    mode = [] if row.mode == "forward" else [mode_name(row.mode)]
    return f"{machine.label}: {', '.join([name, *size, row.dtype, f'batch {row.batch}', *mode])}"


def _conditions(machine: Machine, cases: Sequence[Headline]) -> str:
    """The conditions of a machine's cases in the table; a machine without cases has links alone."""
    if machine.rows("models") and not cases:
        return f"{escape(machine.short_conditions)}. Rows: {_links(machine.runs)}."
    parts = [machine.short_conditions]
    rows = [row for headline in cases for row in headline.rows]
    if (limits := limits_text(machine.ceilings)) is not None:
        parts.append(f"limits measured in the same runs: {limits}")
    noises = [row.noise for row in rows if row.noise is not None]
    if noises:
        parts.append(f"noise up to {percent(max(noises))}")
    if rows:
        parts.append(_ticks(rows))
    parts += [remark.rstrip(".") for remark in machine.remarks]
    return f"{escape('; '.join(parts))}. Rows: {_links(machine.runs)}."


def _ticks(rows: Sequence[ModelRow]) -> str:
    measured = [row for row in rows if row.is_ours and row.ms is not None]
    unticked = [f"{model_name(row)} batch {row.batch}, {row.provider}" for row in measured if row.parity is not True]
    if unticked:
        return f"no parity tick: {listed(unticked)}"
    return "every row of ditfast with its parity tick" if measured else "no row of ditfast ran"


def _links(runs: Sequence[Run]) -> str:
    return ", ".join(link(run.name) for run in runs)
