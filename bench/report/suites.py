"""The summary's sentences about operators, scaling, memory, the host's time and computed costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..fits import fit_exponent, is_power_law
from ..metrics import is_tie
from ..rows import Axis, CostRow, HostRow, MemoryRow, OpRow, ScalingRow
from ..text import (
    case_name,
    count,
    digits,
    factor,
    is_unticked,
    listed,
    mode_name,
    model_name,
    op_case_name,
    percent,
    size,
)


@dataclass(frozen=True)
class Curve:
    """The points of one provider along one axis, all else the same.

    Attributes:
        exponent: of the power law; None where none is stated.
        r_squared: of the fit; None where fewer than two points ran.
    """

    provider: str
    points: list[ScalingRow]
    exponent: float | None
    r_squared: float | None

    @property
    def measured(self) -> list[ScalingRow]:
        return [point for point in self.points if point.row.ms is not None]


def curve_case(item: ScalingRow) -> tuple[Axis, str, str, str]:
    """(axis, what is held, mode, dtype) of a point."""
    row = item.row
    held = {
        "tokens": f"{row.model}, batch {row.batch}",
        "batch": model_name(row),
        "width": f"depth {row.depth}, {row.tokens} tokens, batch {row.batch}",
    }
    return item.axis, held[item.axis], row.mode, row.dtype


def curves(rows: Iterable[ScalingRow]) -> dict[tuple[Axis, str, str, str], list[Curve]]:
    """The curves by :func:`curve_case`, their points in order."""
    cases: dict[tuple[Axis, str, str, str], dict[str, list[ScalingRow]]] = {}
    for item in rows:
        cases.setdefault(curve_case(item), {}).setdefault(item.row.provider, []).append(item)
    return {case: [_curve(name, points) for name, points in found.items()] for case, found in cases.items()}


def largest_ops(rows: Iterable[OpRow]) -> list[list[OpRow]]:
    """Of each operator, direction and dtype, the rows of the largest shape that has a time."""
    groups: dict[tuple[str, str, str], dict[tuple[int, int, int], list[OpRow]]] = {}
    for row in rows:
        shape = (row.batch, row.tokens, row.width)
        groups.setdefault((row.operator, row.direction, row.dtype), {}).setdefault(shape, []).append(row)
    found = []
    for shapes in groups.values():
        ran = [shape for shape, members in shapes.items() if any(row.ms for row in members)]
        if ran:
            found.append(shapes[max(ran, key=lambda shape: shape[0] * shape[1] * shape[2])])
    return found


def op_lines(rows: Sequence[OpRow]) -> list[str]:
    """Each operator at its largest shape, then parity and failures."""
    lines = []
    for members in largest_ops(rows):
        ticked = [row for row in members if row.is_ours and row.parity is True and row.ms]
        if not ticked:
            lines.append(
                f"{op_case_name(members[0])}: no speed-up is stated, for no row of ditfast has a parity tick."
            )
            continue
        best = min(ticked, key=lambda row: row.ms.median if row.ms else float("inf"))
        text = f"{op_case_name(best)}: {digits(best.rate)} {best.unit}"
        if best.share is not None:
            text += f", {percent(best.share)} of the {'copy' if best.unit == 'GB/s' else 'matmul'} limit"
        if best.speedup is not None:
            tie = ", a tie" if is_tie(best.speedup, best.noise or 0.0) else ""
            over = f" ({best.rival})" if best.rival else ""
            text += f"; {factor(best.speedup)} the fastest rival{over}{tie}"
        lines.append(text + ".")
    ours = [row for row in rows if row.is_ours and row.ms]
    unticked = [op_case_name(row) for row in ours if is_unticked(row)]
    if unticked:
        lines.append(
            f"PARITY is missing in {len(unticked)} of {count(len(ours), 'operator row')}: {listed(unticked)}."
        )
    elif ours:
        lines.append(f"Parity held in every operator row of ditfast ({count(len(ours), 'row')}).")
    failed = [
        f"{op_case_name(row)}, {row.provider} ({row.note or row.status})"
        for row in rows
        if row.status in ("oom", "error")
    ]
    return lines + (
        [f"{count(len(failed), 'operator row')} did not run: {listed(failed)}."] if failed else []
    )


def scaling_lines(rows: Sequence[ScalingRow]) -> list[str]:
    """The exponents of the best of ours and of the best rival, or their points where no power law is stated."""
    lines = []
    for (axis, held, mode, dtype), found in curves(rows).items():
        ran = [curve for curve in found if curve.measured]
        ours = _best([curve for curve in ran if curve.measured[-1].row.is_ours])
        rival = _best([curve for curve in ran if not curve.measured[-1].row.is_ours])
        named = [_growth(curve, axis) for curve in (ours, rival) if curve is not None]
        where = f"Scaling with {axis} ({held}, {mode_name(mode)}, {dtype})"
        lines.append(f"{where}: {'; '.join(named)}." if named else f"{where}: no point ran.")
    unticked = [f"{item.axis} {item.value:,}, {item.row.provider}" for item in rows if is_unticked(item.row)]
    if unticked:
        lines.append(f"{count(len(unticked), 'point')} of ditfast without a parity tick: {listed(unticked)}.")
    failed = [
        f"{item.axis} {item.value:,}, {item.row.provider}"
        for item in rows
        if item.row.status in ("oom", "error")
    ]
    return lines + ([f"{count(len(failed), 'point')} did not run: {listed(failed)}."] if failed else [])


def lacks_bytes(row: MemoryRow) -> bool:
    """Whether it is a row of ditfast that ran and shows no bytes, as without a parity tick."""
    return row.is_ours and row.status == "ok" and row.peak_bytes is None and row.saved_bytes is None


def memory_lines(rows: Sequence[MemoryRow], traced: bool = False) -> list[str]:
    """Ours beside the reference, by mode and dtype: the largest case, and the range over all.

    Args:
        traced: whether nothing ran, which every line then says.
    """
    lines = []
    for pairs in _beside_reference(rows).values():
        mine, base = max(pairs, key=_asks_for)
        parts = []
        for name, field in (("saved for the backward", "saved_bytes"), ("peak", "peak_bytes")):
            ratios = [ratio for pair in pairs if (ratio := _ratio(*pair, field)) is not None]
            if (own := _ratio(mine, base, field)) is not None:
                text = f"{name} {size(getattr(mine, field))}, {percent(own)} of the reference's"
                parts.append(text + _over(ratios))
        if mine.max_batch is not None:
            than = "" if base.max_batch is None else f" (the reference: {base.max_batch:,})"
            parts.append(f"largest batch {mine.max_batch:,}{than}")
        if parts:
            said = "; traced, not measured" if traced else ""
            lines.append(f"Memory of ditfast, {case_name(mine)}: {'; '.join(parts)}{said}.")
    ours = [row for row in rows if row.is_ours and row.status == "ok"]
    bare = [
        f"{case_name(row)}, {row.provider} ({row.note or 'no reason given'})"
        for row in ours
        if lacks_bytes(row)
    ]
    if bare:
        of = f"{len(bare)} of {count(len(ours), 'memory row')} of ditfast"
        lines.append(f"{'No bytes were traced' if traced else 'PARITY is missing'} in {of}: {listed(bare)}.")
    failed = [f"{case_name(row)}, {row.provider}" for row in rows if row.status in ("oom", "error")]
    return lines + ([f"{count(len(failed), 'memory row')} did not run: {listed(failed)}."] if failed else [])


def computed_lines(rows: Sequence[CostRow]) -> list[str]:
    """Launches and bytes of ours beside the reference's, by mode and dtype; each line says that it was computed."""
    lines = []
    for pairs in _beside_reference(rows).values():
        mine, base = max(pairs, key=lambda pair: pair[1].flops)
        ratios = [ratio for pair in pairs if (ratio := _ratio(*pair, "bytes")) is not None]
        text = f"{case_name(mine)}: ditfast makes {count(mine.launches, 'launch', 'launches')}"
        text += f" where the reference makes {base.launches:,}"
        moved = f"moves {percent(_ratio(mine, base, 'bytes'))} of its bytes{_over(ratios)}"
        lines.append(f"{text}, and {moved}; computed, not measured.")
    return lines or ["No case holds both ditfast and the reference."]


def host_lines(rows: Sequence[HostRow]) -> list[str]:
    """Ours beside the reference's in every case; each line says what is not in it."""
    lines = []
    for mine, base in (pair for pairs in _beside_reference(rows).values() for pair in pairs):
        own, other = mine.least_ms, base.least_ms
        text = f"The host's time of one eager call, {case_name(mine)}: ditfast {digits(own)} ms, the reference"
        text += f" {digits(other)} ms ({factor(own / other)}), without what a driver takes for their {mine.launches:,}"
        lines.append(f"{text} and {base.launches:,} launches.")
    return lines


def _beside_reference(rows: Iterable[Any]) -> dict[tuple[str, str], list[tuple[Any, Any]]]:
    """(ditfast, reference) of each case that has both, by mode and dtype."""
    cases: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in rows:
        cases.setdefault(row.key[:-1], {})[row.provider] = row
    found: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    for case in cases.values():
        if "ditfast" in case and "reference" in case:
            mine = case["ditfast"]
            found.setdefault((mine.mode, mine.dtype), []).append((mine, case["reference"]))
    return found


def _over(ratios: Sequence[float]) -> str:
    """The range over the cases, where there are several."""
    if len(ratios) < 2:
        return ""
    low, high = percent(min(ratios)), percent(max(ratios))
    return f" ({low if low == high else f'{low} to {high}'} over {len(ratios)} cases)"


def _ratio(mine: Any, base: Any, field: str) -> float | None:
    own, other = getattr(mine, field), getattr(base, field)
    return own / other if own is not None and other else None


def _asks_for(pair: tuple[MemoryRow, MemoryRow]) -> tuple[bool, int]:
    """Orders pairs by what ours needs, those with two figures to compare last."""
    mine, base = pair
    comparable = any(_ratio(mine, base, field) is not None for field in ("peak_bytes", "saved_bytes"))
    return comparable, mine.peak_bytes or mine.saved_bytes or 0


def points_text(curve: Curve) -> str:
    """Every point that ran: 64: 1.00 ms, 256: 8.00 ms."""
    return ", ".join(
        f"{point.value:,}: {digits(point.row.ms.median)} ms" for point in curve.measured if point.row.ms
    )


def _growth(curve: Curve, axis: Axis) -> str:
    if curve.exponent is not None:
        return f"{curve.provider} takes {axis}^{curve.exponent:.2f} (r² {curve.r_squared:.3f})"
    fit = "" if curve.r_squared is None else f", r² {curve.r_squared:.3f}"
    why = f"no power law is stated of {count(len(curve.measured), 'point')}{fit}"
    return f"{curve.provider} {points_text(curve)} ({why})"


def _curve(provider: str, points: list[ScalingRow]) -> Curve:
    points = sorted(points, key=lambda point: point.value)
    timed = [(point.value, point.row.ms.median) for point in points if point.row.ms is not None]
    if len({value for value, _ in timed}) < 2:
        return Curve(provider, points, None, None)
    exponent, r_squared = fit_exponent(*map(list, zip(*timed, strict=True)))
    return Curve(provider, points, exponent if is_power_law(len(timed), r_squared) else None, r_squared)


def _best(found: Sequence[Curve]) -> Curve | None:
    """The one that gets furthest, and is fastest there."""

    def order(curve: Curve) -> tuple[int, float]:
        last = curve.measured[-1]
        return -last.value, last.row.ms.median if last.row.ms else float("inf")

    return min(found, key=order, default=None)
