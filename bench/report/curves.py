"""The scaling curves: time against tokens, batch and width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..records.rows import Axis
from ..records.text import median_of, mode_name, slug
from .data import Machine
from .derived import Curve, curves
from .figure import MARKERS, SMALL, TEXT, Frame, Palette, Plot, plain_log, provider_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AXIS = {"tokens": "tokens of an image", "batch": "images in a batch", "width": "width D"}


def scaling_plots(machine: Machine, palette: Palette) -> list[Plot]:
    """Log-log curves with their exponents: a figure for each mode and dtype, a panel for each axis."""
    groups: dict[tuple[str, str], dict[tuple[Axis, str], list[Curve]]] = {}
    for (axis, held, mode, dtype), group in curves(machine.rows("scaling")).items():
        measured = [curve for curve in group if curve.measured]
        if measured:
            groups.setdefault((mode, dtype), {})[axis, held] = measured
    plots = []
    for (mode, dtype), panels in groups.items():
        case = f"{mode_name(mode)}, {dtype}"
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        title = f"Scaling: {case}, on {machine.label}"
        samples = [
            p.row.ms.samples for group in panels.values() for c in group for p in c.measured if p.row.ms
        ]
        note = (
            f"{machine.short_conditions}; {case}. {median_of(samples)}; error bars: quartiles. Exponents: least "
            "squares in log-log over all points, stated from three points and r² 0.95 on. "
            "Hollow points: no parity tick."
        )
        if any(p.row.status == "oom" for group in panels.values() for c in group for p in c.points):
            note += " Where the memory did not suffice there is no point."
        frame = Frame(title, 3.7 * columns, [3.0] * rows, columns, [], note, gap=0.85, titled=True)
        for axes, ((axis, held), group) in zip(frame.axes, panels.items(), strict=False):
            _panel(axes, axis, held, group, palette)
        for axes in frame.axes[len(panels) :]:
            axes.set_visible(False)
        exponents = "; ".join(
            f"{axis}: {_legend(c)}" for (axis, _), group in panels.items() for c in group if c.exponent
        )
        alt = f"Curves of time against {', '.join(axis for axis, _ in panels)}; {case}, on {machine.label}."
        alt += f" {exponents}." if exponents else ""
        name = slug(f"scaling {machine.number} {case} {machine.label}")
        plots.append(Plot(name, title, "scaling", machine.label, alt, f"{title}.", frame.png(), frame.width))
    return plots


def _panel(axes: Axes, axis: Axis, held: str, group: Sequence[Curve], palette: Palette) -> None:
    order = provider_order(curve.provider for curve in group)
    for curve in sorted(group, key=lambda curve: order.index(curve.provider)):
        points = [(p.value, p.row.ms, p.row.parity) for p in curve.measured if p.row.ms]
        color, ours = palette[curve.provider], curve.measured[0].row.is_ours
        x, y = [value for value, _, _ in points], [ms.median for _, ms, _ in points]
        spread = [[ms.median - ms.p25 for _, ms, _ in points], [ms.p75 - ms.median for _, ms, _ in points]]
        marker = MARKERS[order.index(curve.provider) % len(MARKERS)]
        axes.errorbar(x, y, spread, color=color, linewidth=2.0 if ours else 1.2, elinewidth=0.8, capsize=2)
        axes.plot(
            [],
            [],
            color=color,
            marker=marker,
            markersize=5,
            linewidth=2.0 if ours else 1.2,
            label=_legend(curve),
        )
        for value, ms, parity in points:
            face = color if parity else "white"
            axes.plot([value], [ms.median], marker=marker, markersize=5, color=color, markerfacecolor=face)
    values = sorted({point.value for curve in group for point in curve.measured})
    low, high = axes.get_ylim()
    plain_log(axes, "x")
    plain_log(axes, "y", sparse=high > 1000 * max(low, 1e-9))
    axes.set_xticks(_apart(values), [f"{value:,}" for value in _apart(values)])
    axes.set_xticks([], minor=True)
    axes.set_title(f"{axis}: {held}", size=TEXT)
    axes.set_xlabel(_AXIS[axis], size=TEXT)
    axes.set_ylabel("ms", size=TEXT)
    axes.grid(color="#E3E3E3", linewidth=0.7)
    low, high = axes.get_ylim()
    # room above the curves for the legend
    axes.set_ylim(low, high * (high / low) ** (0.11 * len(group)))
    axes.legend(fontsize=SMALL, frameon=False, loc="upper left", borderaxespad=0.2, labelspacing=0.25)


def _apart(values: Sequence[int]) -> list[int]:
    """Those whose labels have room on a logarithmic axis."""
    shown = [values[0]]
    for value in values[1:]:
        if math.log(value / shown[-1]) > 0.12 * math.log(values[-1] / values[0]):
            shown.append(value)
    return shown


def _legend(curve: Curve) -> str:
    exponent = "no power law" if curve.exponent is None else f"exponent {curve.exponent:.2f}"
    return f"{curve.provider}, {exponent}"
