"""The table of a campaign: each figure with its parity and its rival, or the reason that it has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType

from ...console import line, plain_table
from ..records.files import Results
from ..records.metrics import is_tie
from ..records.rows import OpRow
from ..records.text import digits, factor, percent, size
from .run import Done, Step

_TIMED = ("models", "ops", "scaling", "sample")
_NAMED = 5  # of what has no parity


class Figure(NamedTuple):
    """A line of the table: ``parity`` is None if nothing was judged; ``older``: of other sources."""

    step: str
    what: str
    value: str
    parity: bool | None
    rival: str
    note: str = ""
    older: bool = False


def figures(steps: Sequence[Step], done: Mapping[str, Done], results: Mapping[str, Results]) -> list[Figure]:
    """The figures of every step in order; of one without any, why.

    Args:
        steps: of the plan.
        done: name -> outcome.
        results: name -> result file, if there is one.
    """
    rows: list[Figure] = []
    for step in steps:
        state, result = done.get(step.name), results.get(step.name)
        lines = _figures_of(step, result) if result is not None else []
        if not lines or (state is not None and state.state in ("cut", "failed")):
            lines.append(Figure(step.name, step.title, _state(state, bool(lines)), None, ""))
        rows += lines
    return rows


def _state(done: Done | None, has_figures: bool) -> str:
    if done is None or done.state == "older":
        return "not reached"
    if done.state == "cut":
        return f"cut, {done.note}: {'the rest' if has_figures else 'a first figure'} not reached"
    return ": ".join(filter(None, (done.state, done.note)))


def _figures_of(step: Step, results: Results) -> list[Figure]:
    by_reason: dict[str, list[Any]] = {}
    for item in results.older:
        by_reason.setdefault(item.why, []).append(item.row)
    of = {"verify": _verified, "memory": _memory}.get(results.suite, _timed)
    lines = [*of(step, results.rows, "")]
    for why, rows in by_reason.items():
        lines += [figure._replace(older=True) for figure in of(step, rows, f"older: {why}")]
    return lines


def _verified(step: Step, rows: Sequence[Any], note: str) -> Iterable[Figure]:
    missed = [row for row in rows if not row.ok]
    if rows:
        names = [f"{row.subject}, {row.backend}, {row.dtype}" for row in missed[:_NAMED]]
        names += [f"{len(missed) - _NAMED} more"] if len(missed) > _NAMED else []
        value = f"{len(rows) - len(missed)} of {len(rows)} hold"
        yield Figure(step.name, step.title, value, not missed, "fp64", "; ".join(filter(None, [*names, note])))


def _memory(step: Step, rows: Sequence[Any], note: str) -> Iterable[Figure]:
    for row in rows:
        if row.is_ours:
            rival = next((other for other in rows if other.key[:-1] == row.key[:-1] and not other.is_ours), None)
            value, beside = (
                "-" if measured is None or measured.peak_bytes is None else f"{size(measured.peak_bytes)} at its peak"
                for measured in (row, rival)
            )
            beside = beside if rival is None else f"{rival.provider}: {beside}"
            yield Figure(step.name, _named(row), value, None, beside, "; ".join(filter(None, (row.note, note))))


def _timed(step: Step, rows: Sequence[Any], note: str) -> Iterable[Figure]:
    """The fastest of ours in each case that has its tick, else the first of ours."""
    cases: dict[tuple[object, ...], list[Any]] = {}
    for item in rows:
        row = getattr(item, "row", item)
        cases.setdefault((getattr(item, "axis", None), *row.case), []).append(row)
    for case in cases.values():
        ours = [row for row in case if row.is_ours and row.status != "unavailable"]
        ticked = [row for row in ours if row.ms is not None and row.parity is True]
        if not ours:
            if not note:  # of older ones ours may have been measured again
                yield Figure(step.name, _named(case[0]), "no row of ditfast", None, "")
            continue
        best = min(ticked, key=lambda row: row.ms.median) if ticked else ours[0]
        failed = [row for row in ours if row.status == "error" or (row.ms is not None and row.parity is not True)]
        notes = [f"{row.provider}: {row.note or 'no parity'}" for row in failed]
        notes += [f"{row.provider}: {row.note}" for row in case if not row.is_ours and row.note]
        value = _value(best)
        judged = not failed if any(row.parity is not None or row.status == "error" for row in ours) else None
        remarks = "; ".join(filter(None, [*notes, note]))
        yield Figure(step.name, _named(best), value, judged, _rival(best, case), remarks)


def _value(row: Any) -> str:
    if row.ms is None:
        return f"{row.provider}: {row.status}"
    parts = [f"{row.provider}: {digits(row.ms.median)} ms"]
    if getattr(row, "images_per_s", None) is not None:
        parts.append(f"{digits(row.images_per_s)} images/s")
    if isinstance(row, OpRow):
        if row.rate is not None:
            parts.append(f"{digits(row.rate)} {row.unit}")
        if row.share is not None:
            parts.append(f"{percent(row.share)} of {'copy' if row.unit == 'GB/s' else 'matmul'}")
    elif getattr(row, "ceiling_share", None) is not None:
        parts.append(f"{percent(row.ceiling_share)} of {row.ceiling}")
    return ", ".join(parts)


def _rival(row: Any, case: Sequence[Any]) -> str:
    """The speed-up over the fastest rival, which only rows timed side by side have; and over the yardstick."""
    parts = []
    if row.speedup is not None:
        tie = ", a tie" if is_tie(row.speedup, row.noise or 0.0) else ""
        parts.append(f"{factor(row.speedup)} over {row.rival}{tie}")
    alone = next((other for other in case if other.provider == "gemm" and other.ms is not None), None)
    if alone is not None and row.ms is not None:
        parts.append(f"{percent(row.ms.median / alone.ms.median)} of the GEMM alone")
    return ", ".join(parts) or "no rival"


def _named(row: Any) -> str:
    if isinstance(row, OpRow):
        return f"{row.operator}, {row.direction}, {row.size}, {row.dtype}"
    how = row.mode if hasattr(row, "mode") else f"{row.steps} steps of {row.sampler}"
    tokens = f", {row.tokens} tokens" if hasattr(row, "tokens") else ""
    return f"{row.model}, {how}, batch {row.batch}{tokens}, {row.dtype}"


def has_parity(rows: Iterable[Figure]) -> bool:
    """Whether no figure of the current sources failed its parity."""
    return all(figure.parity is not False for figure in rows if not figure.older)


def table(rows: Sequence[Figure], title: str) -> RenderableType:
    """The figures for a terminal or a log."""
    from rich.console import Console
    from rich.markup import escape

    from ..report.terminal import tick

    ascii_only = Console().options.ascii_only
    shown = plain_table()
    for header in ("step", "what", "value", "parity", "rival", ""):
        shown.add_column(header, justify="right" if header == "parity" else "left", no_wrap=header == "step")
    for index, figure in enumerate(rows):
        first = index == 0 or rows[index - 1].step != figure.step
        cells = (figure.step if first else "", figure.what, figure.value)
        shown.add_row(*map(escape, cells), tick(figure.parity, ascii_only), escape(figure.rival), escape(figure.note))
    return Group(line(title, "bold"), shown)
