"""Grouped bars: throughput, share of the limit, and memory, with every provider side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..records.metrics import images_per_second
from ..records.rows import MemoryRow, ModelRow
from ..records.text import (
    STATUS_SHORT,
    count,
    median_of,
    mode_name,
    model_name,
    model_order,
    pixels,
    size,
    slug,
)
from .data import Machine
from .derived import lacks_bytes
from .figure import SMALL, TEXT, Frame, Palette, Plot, plain_linear, plain_log, provider_order
from .headline import headlines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# bars in a row of axes; more would be too narrow for a mark above each
_MOST_BARS = 72
_LOG_RANGE = 30.0
_WIDE = 11.0


@dataclass(frozen=True)
class Bar:
    """A bar; without a value, ``mark`` stands in its place, otherwise above it."""

    value: float | None
    low: float | None = None
    high: float | None = None
    mark: str = ""
    hatched: bool = False


Bars = dict[tuple[str, str], Bar]


def model_plots(machine: Machine, palette: Palette) -> list[Plot]:
    """Throughput and share of the limit, a figure for each mode, dtype, size, block design and batch."""
    groups: dict[tuple[Any, ...], list[ModelRow]] = {}
    for row in machine.rows("models"):
        key = (row.mode, row.dtype, tuple(row.latent_size), row.conditioning, row.batch)
        groups.setdefault(key, []).append(row)
    plots = []
    for (mode, dtype, latent, design, batch), rows in groups.items():
        conditions = f"{mode_name(mode)}, {dtype}, {pixels(latent)}, batch {batch}"
        if design != "adaln_zero":
            conditions += f", {design}"
        if any(row.ms for row in rows):
            plots.append(_throughput(machine, conditions, rows, palette))
        if any(row.ceiling_share is not None for row in rows):
            plots.append(_shares(machine, conditions, rows, palette))
    return plots


def memory_plots(machine: Machine, palette: Palette) -> list[Plot]:
    """Peak memory, and in training what is saved for the backward; a figure for each mode, dtype and batch."""
    groups: dict[tuple[Any, ...], list[MemoryRow]] = {}
    for row in machine.rows("memory"):
        groups.setdefault((row.mode, row.dtype, row.batch), []).append(row)
    plots = []
    for (mode, dtype, batch), rows in groups.items():
        for name, title in (("peak_bytes", "Peak memory"), ("saved_bytes", "Saved for the backward")):
            if not any(getattr(row, name) for row in rows):
                continue
            case = f"{mode_name(mode)}, {dtype}, batch {batch}"
            device = max((row.device_bytes or 0 for row in rows), default=0)
            limit = f"; the device has {size(device)}" if device else ""
            meaning = f"Bytes at their most, weights included{limit}"
            if name == "saved_bytes":
                meaning = "What the forward keeps for the backward, parameters left out"
            meaning += "; traced, not measured." if machine.is_traced else "; of each provider on its own."
            note = f"{machine.short_conditions}; {case}. {meaning}"
            bars = {(model_name(row), row.provider): _memory_bar(row, getattr(row, name)) for row in rows}
            groups_of = _ordered(rows)
            png, width = _draw(f"{title}: {case}, {machine.where}", "GiB", groups_of, {}, bars, palette, note)
            alt = f"Bars: {title.lower()} in GiB of {_whom(bars)}; {case}, {machine.where}."
            plots.append(
                _plot(f"memory-{name.split('_')[0]}", title, "memory", machine, case, alt, png, width)
            )
    return plots


def _throughput(machine: Machine, case: str, rows: Sequence[ModelRow], palette: Palette) -> Plot:
    bars = {}
    for row in rows:
        # the slower quartile is the lower rate
        ends = (
            [images_per_second(row.batch, ms) for ms in (row.ms.p75, row.ms.p25)] if row.ms else [None, None]
        )
        bars[model_name(row), row.provider] = _bar(row, row.images_per_s, *ends)
    below = {
        model_name(headline.case): headline.speedup_text.replace(", a tie", " tie") for headline in headlines(rows)
    }
    note = f"{_conditions(machine, case, rows)} Beneath each model: the best ticked ditfast over the fastest rival."
    title = f"Throughput: {case}, on {machine.label}"
    png, width = _draw(title, "images/s", _ordered(rows), below, bars, palette, note)
    speedups = ", ".join(f"{name} {text}" for name, text in below.items() if text != "-")
    alt = f"Bars: images/s of {_whom(bars)}; {case}, on {machine.label}."
    alt += f" Best of ditfast over the fastest rival: {speedups}." if speedups else ""
    return _plot("throughput", "Throughput", "models", machine, case, alt, png, width)


def _shares(machine: Machine, case: str, rows: Sequence[ModelRow], palette: Palette) -> Plot:
    bars = {}
    for row in rows:
        bar = _bar(row, None if row.ceiling_share is None else row.ceiling_share * 100)
        if row.ceiling == "copy" and not bar.mark:
            bar = Bar(bar.value, mark="c", hatched=bar.hatched)
        bars[model_name(row), row.provider] = bar
    limits = (
        "Limits, measured in the same run: the matmul, or where marked c, the copy, reading the weights once."
    )
    note = f"{_conditions(machine, case, rows, quartiles=False)} {limits}"
    title = f"Share of the measured limit: {case}, on {machine.label}"
    png, width = _draw(title, "% of the limit", _ordered(rows), {}, bars, palette, note, linear=True)
    alt = f"Bars: share of the measured limit in percent of {_whom(bars)}; {case}, on {machine.label}."
    return _plot("share", "Share of the limit", "models", machine, case, alt, png, width)


def _bar(row: ModelRow, value: float | None, low: float | None = None, high: float | None = None) -> Bar:
    if row.ms is None or value is None:
        return Bar(None, mark=STATUS_SHORT.get(row.status, "no limit"))
    mark = "" if row.parity else "✗" if row.parity is False else "?"
    return Bar(value, low, high, mark, row.parity is not True)


def _memory_bar(row: MemoryRow, value: int | None) -> Bar:
    if value is not None:
        return Bar(value / 2**30)
    return Bar(None, mark=STATUS_SHORT.get(row.status, "no tick" if lacks_bytes(row) else "not counted"))


def _conditions(machine: Machine, case: str, rows: Sequence[ModelRow], quartiles: bool = True) -> str:
    medians = median_of([row.ms.samples for row in rows if row.ms])
    medians += "; error bars: quartiles" if quartiles else ""
    missing = sorted(
        {row.provider for row in rows} - {row.provider for row in rows if row.status != "unavailable"}
    )
    absent = f" Not available: {', '.join(missing)}." if missing else ""
    marks = "Hatched: no parity tick (✗ failed, ? not judged)."
    return f"{machine.short_conditions}; {case}. {medians}. {marks}{absent}"


def _draw(
    title: str,
    unit: str,
    models: Sequence[str],
    below: dict[str, str],
    bars: Bars,
    palette: Palette,
    note: str,
    linear: bool = False,
) -> tuple[bytes, float]:
    """(PNG, width in inches); the models in as many rows of axes as keep the bars wide enough."""
    from matplotlib.patches import Patch

    # who ran nowhere has no place among the bars
    providers = provider_order({name for (_, name), bar in bars.items() if bar.mark != "n/a"})
    rows = max(1, math.ceil(len(models) * len(providers) / _MOST_BARS))
    each = math.ceil(len(models) / rows)
    chunks = [models[start : start + each] for start in range(0, len(models), each)]
    width = min(_WIDE, max(7.0, 1.5 + 0.14 * each * (len(providers) + 1.5)))
    legend: list[tuple[Any, str]] = [
        (Patch(facecolor=palette[name], edgecolor="#333333", linewidth=0.5), name) for name in providers
    ]
    frame = Frame(title, width, [2.7] * len(chunks), 1, legend, note)
    for axes, chunk in zip(frame.axes, chunks, strict=True):
        _draw_row(axes, chunk, providers, bars, palette, linear)
        axes.set_ylabel(unit, size=TEXT)
        labels = [f"{name}\n{below[name]}" if name in below else name for name in chunk]
        axes.set_xticks(range(len(chunk)), labels, size=SMALL)
        # a short last row keeps the bars' width of the others
        axes.set_xlim(-0.55, each - 0.45)
    return frame.png(), width


def _draw_row(
    axes: Axes, models: Sequence[str], providers: Sequence[str], bars: Bars, palette: Palette, linear: bool
) -> None:
    pitch = 0.86 / len(providers)
    values = [bar.value for (model, _), bar in bars.items() if model in models and bar.value]
    log = not linear and bool(values) and max(values) / min(values) > _LOG_RANGE
    floor, top = (min(values) * 0.55, max(values)) if values else (0.0, 1.0)
    if log:
        plain_log(axes, "y")
        axes.set_ylim(floor, top * (top / floor) ** 0.14)
    else:
        plain_linear(axes)
        axes.set_ylim(0, top * 1.2)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.7)
    axes.tick_params(axis="x", length=0)
    for group, model in enumerate(models):
        for index, provider in enumerate(providers):
            bar = bars.get((model, provider))
            if bar is None:
                continue
            place = group + (index - (len(providers) - 1) / 2) * pitch
            above: dict[str, Any] = {
                "textcoords": "offset points",
                "ha": "center",
                "va": "bottom",
                "size": SMALL,
            }
            if bar.value is None:
                foot = axes.get_ylim()[0]
                axes.annotate(bar.mark, (place, foot), (0, 2), rotation=90, color="#8A0000", **above)
                continue
            color = "white" if bar.hatched else palette[provider]
            # a dark edge sets off the light colours
            edge, hatch = (palette[provider], "////") if bar.hatched else ("#333333", None)
            axes.bar(place, bar.value, pitch * 0.9, color=color, edgecolor=edge, hatch=hatch, linewidth=0.5)
            high = bar.value
            if bar.low is not None and bar.high is not None:
                spread = [[max(0.0, bar.value - bar.low)], [max(0.0, bar.high - bar.value)]]
                axes.errorbar(
                    place, bar.value, spread, color="#222222", elinewidth=0.8, capsize=1.5, capthick=0.8
                )
                high = max(high, bar.high)
            if bar.mark:
                tone = {"✗": "#8A0000", "?": "#8A0000"}.get(bar.mark, "#444444")
                axes.annotate(bar.mark, (place, high), (0, 1.5), color=tone, weight="bold", **above)


def _plot(
    kind: str, title: str, group: str, machine: Machine, case: str, alt: str, png: bytes, width: float
) -> Plot:
    # the number first: it stays whatever the label's length and letters
    name = slug(f"{kind} {machine.number} {case} {machine.label}")
    caption = f"{title}: {case}, {machine.where}."
    return Plot(name, f"{title}: {case}", group, machine.label, alt, caption, png, width)


def _ordered(rows: Iterable[ModelRow | MemoryRow]) -> list[str]:
    """The models' names in the paper's order."""
    orders = {model_name(row): model_order(row.model) for row in rows}
    key: Callable[[str], Any] = lambda name: (orders[name], name)  # noqa: E731
    return sorted(orders, key=key)


def _whom(bars: Bars) -> str:
    models, providers = ({key[index] for key in bars} for index in (0, 1))
    return f"{count(len(models), 'model')} and {count(len(providers), 'provider')}"
