"""The roofline: operators and models as points, with the limits measured in the same runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..records.files import Ceilings
from ..records.rows import CostRow, ModelRow, OpRow
from ..records.text import count, mode_name, slug
from .conditions import limits_text, version
from .data import Machine
from .derived import largest_ops
from .figure import MARKERS, SMALL, TEXT, Frame, Palette, Plot, plain_log, provider_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZES = ("S", "B", "L", "XL")
# provider -> whose trace has its launches; what a compiler fuses was not traced
_TRACED_AS = {
    "reference": "reference",
    "diffusers": "diffusers",
    "ditfast": "ditfast",
    "ditfast-graph": "ditfast",
}
# panels in a row
_MOST_BATCHES = 3
NO_COST = "The models are not on a roofline: no result of `ditfast bench cost` for them was given."
Point = tuple[float, float, ModelRow]


def roofline_plots(machine: Machine, computed: Sequence[Machine], palette: Palette) -> list[Plot]:
    """The operators, and on a GPU the models whose costs are known, with the measured limits."""
    ceilings = machine.ceilings
    if ceilings is None:
        return []
    plots = []
    ops = [row for members in largest_ops(machine.rows("ops")) for row in members if row.ms and row.flops > 0]
    for dtype in dict.fromkeys(row.dtype for row in ops):
        plots.append(
            _ops_roofline(machine, ceilings, dtype, [row for row in ops if row.dtype == dtype], palette)
        )
    traced_by, costs = _costs(machine, computed)
    # on a CPU ditfast runs its formulas, and not what was traced
    points = located(machine.rows("models"), costs) if machine.is_gpu else []
    for mode, dtype in dict.fromkeys((row.mode, row.dtype) for _, _, row in points):
        chosen = [point for point in points if (point[2].mode, point[2].dtype) == (mode, dtype)]
        plots.append(_models_roofline(machine, ceilings, mode, dtype, chosen, traced_by, palette))
    return plots


def located(rows: Iterable[ModelRow], costs: Iterable[CostRow]) -> list[Point]:
    """(FLOP/byte, TFLOP/s, row) of the providers that were traced on the same model, batch, dtype and mode.

    Left out are compiled providers, which launch other kernels than were traced, and those that compute in another
    precision than their case, which move other bytes.
    """
    known = {row.key: row for row in costs}
    points = []
    for row in filter(_locatable, rows):
        names = (row.model, row.conditioning, row.latent_size, row.batch, row.dtype, row.mode)
        cost = known.get((*names, _TRACED_AS[row.provider]))
        if cost is not None and row.tflops:
            points.append((cost.intensity, row.tflops, row))
    return points


def lacks_costs(machine: Machine, computed: Sequence[Machine]) -> bool:
    """Whether only costs are missing for a roofline of the models."""
    rows = machine.rows("models")
    could = machine.is_gpu and machine.ceilings is not None and any(map(_locatable, rows))
    return could and not located(rows, _costs(machine, computed)[1])


def _locatable(row: ModelRow) -> bool:
    return row.provider in _TRACED_AS and bool(row.tflops) and row.precision == row.dtype


def _costs(machine: Machine, computed: Sequence[Machine]) -> tuple[str, list[CostRow]]:
    """(version of ditfast, rows): of the measured version, or else of the first one in ``computed``."""
    versions = {group.number: version(group.environment) for group in computed if group.rows("cost")}
    if not versions:
        return "", []
    current = version(machine.environment)
    chosen = current if current in versions.values() else next(iter(versions.values()))
    return chosen, [
        row for group in computed if versions.get(group.number) == chosen for row in group.rows("cost")
    ]


def _ops_roofline(
    machine: Machine, ceilings: Ceilings, dtype: str, rows: Sequence[OpRow], palette: Palette
) -> Plot:
    from matplotlib.lines import Line2D

    operators, providers = (
        list(dict.fromkeys(row.operator for row in rows)),
        provider_order(r.provider for r in rows),
    )
    marker = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(operators)}
    title = f"Roofline of the operators, {dtype}, on {machine.label}"
    note = (
        f"{machine.short_conditions}; {dtype}, each operator at the largest shape measured. {_limits(ceilings)} "
        "Filled: forward; half filled: backward; hollow: no parity tick. "
        "Bytes: each input read and each output written once."
    )
    legend: list[tuple[Any, str]] = [
        (Line2D([], [], color=palette[n], marker="o", linestyle=""), n) for n in providers
    ]
    legend += [
        (Line2D([], [], color="#444444", marker=marker[n], linestyle="", fillstyle="none"), n)
        for n in operators
    ]
    frame = Frame(title, 8.5, [4.2], 1, legend, note)
    points = []
    for row in rows:
        assert row.ms is not None
        points.append((row.flops / row.bytes, row.flops / row.ms.median / 1e9))
        fill: Any = "none" if row.parity is not True else "full" if row.direction == "forward" else "left"
        frame.axes[0].plot(
            *points[-1],
            marker=marker[row.operator],
            markersize=8,
            color=palette[row.provider],
            fillstyle=fill,
            markeredgewidth=1.2,
            linestyle="",
        )
    _roofs(frame.axes[0], ceilings, [dtype], points)
    alt = f"{title}: {len(rows)} points of {', '.join(operators)}, and the limits. {_limits(ceilings)}"
    name = slug(f"roofline operators {machine.number} {dtype} {machine.label}")
    return Plot(name, title, "ops", machine.label, alt, f"{title}.", frame.png(), frame.width)


def _models_roofline(
    machine: Machine,
    ceilings: Ceilings,
    mode: str,
    dtype: str,
    points: Sequence[Point],
    traced_by: str,
    palette: Palette,
) -> Plot:
    from matplotlib.lines import Line2D

    all_batches = sorted({row.batch for _, _, row in points})
    batches = all_batches[-_MOST_BATCHES:]
    shown = [point for point in points if point[2].batch in batches]
    providers = provider_order(row.provider for _, _, row in shown)
    sizes = [name for name in (*_SIZES, "other") if any(_size(row) == name for _, _, row in shown)]
    marker = {name: MARKERS[index] for index, name in enumerate((*_SIZES, "other"))}
    case = f"{mode_name(mode)}, {dtype}"
    title = f"Roofline of the models: {case}, on {machine.label}"
    batches_text = _batches_text(batches, all_batches)
    note = (
        f"{machine.short_conditions}; {case}. {_limits(ceilings)} {batches_text} FLOP/byte: computed, by "
        f"tracing the eager models with {traced_by}; a graph replays the same launches, what is compiled is left out. "
        "Hollow: no parity tick. The larger a mark, the more tokens."
    )
    legend: list[tuple[Any, str]] = [
        (Line2D([], [], color=palette[n], marker="o", linestyle=""), n) for n in providers
    ]
    legend += [
        (Line2D([], [], color="#444444", marker=marker[n], linestyle="", fillstyle="none"), f"DiT-{n}")
        for n in sizes
    ]
    frame = Frame(title, 3.7 * max(2, len(batches)), [3.4], len(batches), legend, note, titled=True)
    for axes, batch in zip(frame.axes, batches, strict=True):
        in_batch = [point for point in shown if point[2].batch == batch]
        for x, y, row in in_batch:
            side = 4 if row.tokens <= 32 else 6 if row.tokens <= 128 else 8
            axes.plot(
                [x],
                [y],
                marker=marker[_size(row)],
                markersize=side,
                color=palette[row.provider],
                markerfacecolor=palette[row.provider] if row.parity else "white",
                linestyle="",
            )
        precisions = list(dict.fromkeys(row.precision for _, _, row in in_batch))
        _roofs(axes, ceilings, precisions, [(x, y) for x, y, _ in in_batch])
        axes.set_title(f"batch {batch}", size=TEXT)
    alt = f"{title}: {count(len(shown), 'point')}, and the measured limits. {batches_text}"
    alt += f" {_limits(ceilings)}"
    name = slug(f"roofline models {machine.number} {case} {machine.label}")
    return Plot(name, title, "models", machine.label, alt, f"{title}.", frame.png(), frame.width)


def _roofs(
    axes: Axes, ceilings: Ceilings, precisions: Sequence[str], points: Sequence[tuple[float, float]]
) -> None:
    """The copy as a slope and each matmul as a level above it, around the points."""
    rates = {name: ceilings.matmul_tflops[name] for name in precisions if name in ceilings.matmul_tflops}
    slope = ceilings.copy_gb_per_s / 1e3
    knees = [rate / slope for rate in rates.values()]
    left = min([x for x, _ in points] + knees) / 3
    right = max([x for x, _ in points] + knees) * 3
    highest = max(rates.values(), default=slope * right)
    axes.plot([left, highest / slope], [left * slope, highest], color="#222222", linewidth=1.2)
    for name, rate in rates.items():
        axes.plot([rate / slope, right], [rate, rate], color="#222222", linewidth=1.2)
        axes.annotate(
            f"matmul {name}", (right, rate), (0, 3), textcoords="offset points", ha="right", size=SMALL
        )
    axes.annotate("copy", (left, left * slope), (14, 3), textcoords="offset points", va="top", size=SMALL)
    plain_log(axes, "x", sparse=right > 100 * left)
    lowest = min([y for _, y in points] + [left * slope])
    plain_log(axes, "y", sparse=highest > 100 * lowest)
    axes.set_xlim(left, right)
    axes.set_ylim(lowest / 2, highest * 2.2)
    axes.set_xlabel("FLOP/byte", size=TEXT)
    axes.set_ylabel("TFLOP/s", size=TEXT)
    axes.grid(color="#E3E3E3", linewidth=0.7)


def _limits(ceilings: Ceilings) -> str:
    return f"Limits measured in the same runs: {limits_text(ceilings)}."


def _batches_text(batches: Sequence[int], all_batches: Sequence[int]) -> str:
    """A sentence on the batches in the figure."""
    text = f"{'Batch' if len(batches) == 1 else 'Batches'} {', '.join(map(str, batches))}"
    if len(batches) == len(all_batches):
        return f"{text}."
    return f"{text}, the largest of {', '.join(map(str, all_batches))}."


def _size(row: ModelRow) -> str:
    """ "XL" of "DiT-XL/2"."""
    name = row.model.removeprefix("DiT-").partition("/")[0]
    return name if name in _SIZES else "other"
