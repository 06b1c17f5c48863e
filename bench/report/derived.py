"""Values derived from rows for tables and plots: curves with their fits, the largest shapes, rows without bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..records.rows import Axis, MemoryRow, OpRow, ScalingRow
from ..records.text import digits, model_name
from .fits import fit_exponent, is_power_law


@dataclass(frozen=True)
class Curve:
    """The points of one provider along one axis, all else the same.

    Attributes:
        exponent: of the power law; None if none is stated.
        r_squared: of the fit; None if fewer than two points ran.
    """

    provider: str
    points: list[ScalingRow]
    exponent: float | None
    r_squared: float | None

    @property
    def measured(self) -> list[ScalingRow]:
        return [point for point in self.points if point.row.ms is not None]


def curve_case(item: ScalingRow) -> tuple[Axis, str, str, str]:
    """(axis, the values held constant, mode, dtype) of a point."""
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
    return {case: [_curve(name, points) for name, points in by_provider.items()] for case, by_provider in cases.items()}


def points_text(curve: Curve) -> str:
    """Every point that ran: 64: 1.00 ms, 256: 8.00 ms."""
    return ", ".join(
        f"{point.value:,}: {digits(point.row.ms.median)} ms" for point in curve.measured if point.row.ms
    )


def largest_ops(rows: Iterable[OpRow]) -> list[list[OpRow]]:
    """Of each operator, direction and dtype, the rows of the largest shape that has a time."""
    groups: dict[tuple[str, str, str], dict[tuple[int, int, int], list[OpRow]]] = {}
    for row in rows:
        shape = (row.batch, row.tokens, row.width)
        groups.setdefault((row.operator, row.direction, row.dtype), {}).setdefault(shape, []).append(row)
    largest = []
    for shapes in groups.values():
        measured = [shape for shape, members in shapes.items() if any(row.ms for row in members)]
        if measured:
            largest.append(shapes[max(measured, key=lambda shape: shape[0] * shape[1] * shape[2])])
    return largest


def lacks_bytes(row: MemoryRow) -> bool:
    """Whether a row of ditfast ran but has no bytes, as without a parity tick."""
    return row.is_ours and row.status == "ok" and row.peak_bytes is None and row.saved_bytes is None


def _curve(provider: str, points: list[ScalingRow]) -> Curve:
    points = sorted(points, key=lambda point: point.value)
    timed = [(point.value, point.row.ms.median) for point in points if point.row.ms is not None]
    if len({value for value, _ in timed}) < 2:
        return Curve(provider, points, None, None)
    exponent, r_squared = fit_exponent(*map(list, zip(*timed, strict=True)))
    return Curve(provider, points, exponent if is_power_law(len(timed), r_squared) else None, r_squared)
