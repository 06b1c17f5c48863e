"""The report's plots: colours, marks, letters and points, read from the figures themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import results_helpers as made
from results_helpers import model_row

from ditfast.bench.records import Results
from ditfast.bench.report import bars, figure
from ditfast.bench.report.data import Run, gather
from ditfast.bench.report.roofline import located
from ditfast.bench.report.write import draw


def runs(*found: Results) -> list[Run]:
    return [Run(f"{index}.json", item) for index, item in enumerate(found)]


def test_points_of_the_roofline_by_hand() -> None:
    ours = model_row("ditfast", 10.0, tflops=500.0)
    rows = [ours, replace(ours, provider="ditfast-graph", tflops=550.0), replace(ours, provider="reference-tf32",
            precision="tf32"), replace(ours, batch=1), replace(ours, mode="train")]  # fmt: skip
    found = located(rows, made.cost_rows())
    assert [(round(x), y, row.provider) for x, y, row in found] == [(260, 550.0, "ditfast-graph")]


def test_colours_are_fixed_distinct_and_ours_are_blue() -> None:
    palette = figure.Palette(["ditfast-z", "mine", "other"])
    names = [*made.PACE, "reference-autocast", "diffusers-compile", "ditfast-z", "mine", "other"]
    colors = {name: palette[name] for name in names}
    assert len(set(colors.values())) == len(names)
    for name, color in colors.items():
        red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
        assert (blue > max(green, red + 60)) == name.startswith("ditfast"), name
    assert figure.Palette(["other", "mine", "ditfast"])["mine"] == colors["mine"]
    assert figure.provider_order(["ditfast", "mine", "reference"]) == ["reference", "mine", "ditfast"]


def test_a_bar_without_a_tick_is_marked() -> None:
    row = model_row()
    assert bars._bar(row, 1.0) == bars.Bar(1.0)
    assert bars._bar(replace(row, parity=False), 1.0) == bars.Bar(1.0, mark="✗", hatched=True)
    assert bars._bar(replace(row, parity=None), 1.0) == bars.Bar(1.0, mark="?", hatched=True)
    assert bars._bar(model_row(ms=None), None) == bars.Bar(None, mark="no memory")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are drawn, instead of their PNG files."""
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")
    drawn: list[Any] = []

    def keep(frame: figure.Frame) -> bytes:
        drawn.append(frame.figure)
        return b""

    monkeypatch.setattr(figure.Frame, "png", keep)
    yield drawn


def test_every_letter_of_the_plots_is_legible_and_within(figures: list[Any]) -> None:
    from matplotlib.text import Text

    plots = draw(gather(runs(*made.everything())))
    assert len(plots) == len(figures) == 9
    for plot, drawn in zip(plots, figures, strict=True):
        drawn.draw_without_rendering()
        texts = [text for text in drawn.findobj(Text) if text.get_visible() and text.get_text().strip()]
        # what an invisible axis carries is not drawn
        texts = [text for text in texts if text.axes is None or text.axes.get_visible()]
        assert min(text.get_fontsize() for text in texts) >= 8
        words = " ".join(text.get_text().replace("\n", " ") for text in texts)
        assert plot.machine in words and "torch 9.9.9" in words
        for axes in drawn.axes:
            boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
            assert not any(left.overlaps(right) for left, right in zip(boxes, boxes[1:], strict=False)), (
                plot.name
            )
        width, height = drawn.canvas.get_width_height()
        for text in drawn.texts + [axes.yaxis.label for axes in drawn.axes if axes.get_visible()]:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, (plot.name, text)


def test_the_throughput_figure_shows_marks_and_speedups(figures: list[Any]) -> None:
    draw(gather(runs(made.twelve_models())))
    words = [text.get_text() for axes in figures[0].axes for text in axes.texts]
    assert [words.count(mark) for mark in ("✗", "?", "no memory", "failed", "n/a")] == [1, 3, 2, 1, 1]
    labels = [label.get_text() for axes in figures[0].axes for label in axes.get_xticklabels()]
    assert labels[0] == "DiT-S/2\n1.13x" and "DiT-L/4\n-" in labels
    hatched = [bar for axes in figures[0].axes for bar in axes.patches if bar.get_hatch()]
    assert len(hatched) == 4
