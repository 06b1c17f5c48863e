"""The report's plots: colours, marks, letters and points, read from the figures themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ditfast.bench.records.rows import MemoryRow, OpRow, ScalingRow, Spread
from ditfast.bench.report import bars, figure
from ditfast.bench.report.roofline import located
from ditfast.bench.report.write import draw
from tests.report import conftest as made_up
from tests.report.conftest import model_row, report_of, results


def test_points_of_the_roofline_by_hand() -> None:
    ours = model_row("ditfast", 10.0, tflops=500.0)
    rows = [ours, replace(ours, provider="ditfast-graph", tflops=550.0), replace(ours, provider="reference-tf32",
            precision="tf32"), replace(ours, batch=1), replace(ours, mode="train")]  # fmt: skip
    points = located(rows, made_up.cost_rows())
    assert [(round(x), y, row.provider) for x, y, row in points] == [
        (260, 500.0, "ditfast"),
        (260, 550.0, "ditfast-graph"),
    ]


def test_colours_are_fixed_distinct_and_ours_are_blue() -> None:
    palette = figure.Palette(["ditfast-z", "mine", "other"])
    names = [*made_up.PACE, "reference-autocast", "diffusers-compile", "ditfast-z", "mine", "other"]
    colors = {name: palette[name] for name in names}
    assert len(set(colors.values())) == len(names)
    for name, color in colors.items():
        red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
        assert (blue > max(green, red + 60)) == name.startswith("ditfast"), name
    assert figure.Palette(["other", "mine", "ditfast"])["mine"] == colors["mine"]
    assert figure.provider_order(["ditfast", "mine", "reference"]) == ["reference", "mine", "ditfast"]


@pytest.mark.quick
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
    figures: list[Any] = []

    def keep(frame: figure.Frame) -> bytes:
        figures.append(frame.figure)
        return b""

    monkeypatch.setattr(figure.Frame, "png", keep)
    yield figures


def test_every_letter_of_the_plots_is_legible_and_within(figures: list[Any]) -> None:
    from matplotlib.text import Text

    plots = draw(report_of(*made_up.everything()))
    assert len(plots) == len(figures) == 10
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


@pytest.mark.quick
def test_the_throughput_figure_shows_marks_and_speedups(figures: list[Any]) -> None:
    draw(report_of(made_up.twelve_models()))
    words = [text.get_text() for axes in figures[0].axes for text in axes.texts]
    assert [words.count(mark) for mark in ("✗", "?", "no memory", "failed", "n/a")] == [1, 3, 2, 1, 1]
    labels = [label.get_text() for axes in figures[0].axes for label in axes.get_xticklabels()]
    assert labels[0] == "DiT-S/2\n1.13x" and "DiT-L/4\n-" in labels
    hatched = [bar for axes in figures[0].axes for bar in axes.patches if bar.get_hatch()]
    assert len(hatched) == 4


def heights(axes: Any) -> list[float]:
    return [bar.get_height() for bar in axes.patches]


def error_bars(axes: Any) -> list[list[list[float]]]:
    """Both ends of every error bar."""
    lines = [
        lines for container in axes.containers if hasattr(container, "lines") for lines in container.lines[2]
    ]
    return [segment.tolist() for line in lines for segment in line.get_segments()]


def notes(drawn: Any) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in drawn.texts)


def test_heights_error_bars_and_shares_by_hand(figures: list[Any]) -> None:
    rows = [
        replace(
            model_row("reference", 20.0),
            ms=Spread(20.0, 16.0, 25.0, 20, 1),
            ceiling_share=0.25,
            ceiling="copy",
        ),
        replace(
            model_row("ditfast", 8.0), ms=Spread(8.0, 6.4, 10.0, 30, 1), ceiling_share=0.5, ceiling="matmul"
        ),
    ]
    draw(report_of(results("models", rows)))
    throughput, shares = figures
    # 256 images in 20 and 8 ms; the slower quartile is the lower rate
    assert heights(throughput.axes[0]) == [12800.0, 32000.0]
    ends = [[low[1], high[1]] for low, high in error_bars(throughput.axes[0])]
    assert ends == [pytest.approx([10240.0, 16000.0]), pytest.approx([25600.0, 40000.0])]
    assert "Median of 20 to 30 samples; error bars: quartiles." in notes(throughput)
    assert heights(shares.axes[0]) == [25.0, 50.0] and error_bars(shares.axes[0]) == []
    assert [text.get_text() for text in shares.axes[0].texts] == ["c"]
    assert "Median of 20 to 30 samples. Hatched" in notes(shares) and "error bars" not in notes(shares)


def test_memory_in_gib_and_rows_without_bytes_by_hand(figures: list[Any]) -> None:
    case = ("DiT-XL/2", "adaln_zero", (32, 32), 256, "bf16", "train")
    rows = [
        MemoryRow(
            *case, "reference", "ok", peak_bytes=3 * 2**30, saved_bytes=2**30, device_bytes=100 * 2**30
        ),
        MemoryRow(*case, "reference-compile", "ok", peak_bytes=2**31),
        MemoryRow(*case, "diffusers", "unavailable"),
        MemoryRow(*case, "ditfast", "ok", "parity failed"),
    ]
    draw(report_of(results("memory", rows)))
    peak, saved = figures
    assert heights(peak.axes[0]) == [3.0, 2.0] and heights(saved.axes[0]) == [1.0]
    assert [text.get_text() for text in peak.axes[0].texts] == ["no tick"]
    assert [text.get_text() for text in saved.axes[0].texts] == ["not counted", "no tick"]
    legend = [text.get_text() for text in peak.legends[0].get_texts()]
    assert legend == ["reference", "reference-compile", "ditfast"]
    assert "Bytes at their most, weights included; the device has 100.00 GiB; of each provider" in notes(peak)
    assert "Bytes at their most" not in notes(saved) and "What the forward keeps for the backward" in notes(
        saved
    )


def test_traced_memory_says_so(figures: list[Any]) -> None:
    [plot] = draw(report_of(made_up.traced_memory()))
    assert heights(figures[0].axes[0]) == [40.0, 24.0]
    for text in (plot.caption, plot.alt, notes(figures[0])):
        assert "traced, not measured" in text and "Test GPU" not in text


def curve_points(axes: Any) -> list[tuple[float, float, str]]:
    """(x, y, face) of each mark."""
    lines = [
        line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_marker() in figure.MARKERS
    ]
    return [(*line.get_xdata(), *line.get_ydata(), line.get_markerfacecolor()) for line in lines]


def test_curves_by_hand(figures: list[Any]) -> None:
    rows = []
    for value, ms, parity in ((1, 2.0, True), (4, 4.0, False), (16, 8.0, None), (64, None, None)):
        row = model_row("ditfast", ms, "DiT-S/2", value, parity)
        row = row if ms is None else replace(row, ms=Spread(ms, ms / 2, ms * 3, 20, 1))
        rows.append(ScalingRow("batch", value, row))
    [plot] = draw(report_of(results("scaling", rows)))
    [axes] = figures[0].axes
    blue = figure.Palette([])["ditfast"]
    assert curve_points(axes) == [(1, 2.0, blue), (4, 4.0, "white"), (16, 8.0, "white")]
    assert error_bars(axes) == [[[1, 1.0], [1, 6.0]], [[4, 2.0], [4, 12.0]], [[16, 4.0], [16, 24.0]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ditfast, exponent 0.50"]
    assert "Where the memory did not suffice there is no point." in notes(figures[0])
    assert "batch: ditfast, exponent 0.50." in plot.alt
    draw(report_of(results("scaling", rows[:2])))
    assert [text.get_text() for text in figures[1].axes[0].get_legend().get_texts()] == [
        "ditfast, no power law"
    ]
    assert "did not suffice" not in notes(figures[1])


def roofs(axes: Any) -> tuple[float, list[float]]:
    """(TFLOP/s a FLOP/byte of the slope, the levels)."""
    lines = [(line.get_xdata(), line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 2]
    slopes = [y[0] / x[0] for x, y in lines if y[0] != y[1]]
    assert all(y[1] / x[1] == pytest.approx(slope) for (x, y), slope in zip(lines, slopes, strict=False))
    return slopes[0], [y[0] for _, y in lines if y[0] == y[1]]


def test_the_rooflines_by_hand(figures: list[Any]) -> None:
    """4 TB/s and 800 TFLOP/s: the knee is at 200 FLOP/byte."""
    row = OpRow(
        *(
            "linear_gelu",
            "forward",
            8,
            256,
            1152,
            "bf16",
            "ditfast",
            "ok",
            "graph",
            10**12,
            10**10,
            "TFLOP/s",
        ),
        ms=Spread(4.0, 4.0, 4.0, 20, 1),
        parity=True,
    )
    models = [model_row("ditfast", batch=b, tflops=500.0 + b) for b in (1, 8, 32, 256)]
    models += [
        model_row(name, tflops=450.0) for name in ("reference-compile", "ditfast-compile", "reference")
    ]
    costs = [cost for b in (1, 8, 32, 256) for cost in made_up.cost_rows(b)]
    draw(report_of(results("ops", [row]), results("models", models), results("cost", costs)))
    operators, drawn = [figure for figure in figures if figure.axes[0].get_xlabel() == "FLOP/byte"]
    for axes in [*operators.axes, *drawn.axes]:
        assert roofs(axes) == (pytest.approx(4.0), [800.0])
    # 10^12 FLOPs, 10^10 bytes, 4 ms
    assert [(x, y) for x, y, _ in curve_points(operators.axes[0])] == [(100.0, 250.0)]
    assert [axes.get_title() for axes in drawn.axes] == ["batch 8", "batch 32", "batch 256"]
    assert [[(round(x), y) for x, y, _ in curve_points(axes)] for axes in drawn.axes] == [
        [(260, 508.0)],
        [(260, 532.0)],
        [(260, 756.0), (150, 450.0)],
    ]
    assert "Batches 8, 32, 256, the largest of 1, 8, 32, 256." in notes(drawn)
    assert "by tracing the eager models with ditfast 0.0.test (012345678);" in notes(drawn)


def test_the_models_are_on_a_roofline_of_the_version_that_was_measured(figures: list[Any]) -> None:
    def traced(intensity: float, environment: dict[str, Any]) -> Any:
        return results("cost", [replace(cost, intensity=intensity) for cost in made_up.cost_rows()], environment)

    other, same = traced(1.0, {**made_up.GPU, "commit": "f"}), traced(300.0, made_up.GPU)
    measured = results("models", [model_row("ditfast", tflops=500.0)])
    for costs, position in (((other, same), 300.0), ((other,), 1.0)):
        figures.clear()
        plots = draw(report_of(measured, *costs))
        assert curve_points(figures[-1].axes[0])[0][:2] == (position, 500.0)
    assert "with ditfast 0.0.test (f);" in notes(figures[-1]) and "beneath" not in plots[-1].alt
    on_cpu = replace(measured, environment=made_up.CPU)
    assert not any("roofline" in plot.name for plot in draw(report_of(on_cpu, same)))


def test_dollars_begin_no_formula_and_names_of_files_are_apart() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")
    devices = ["$x_{ GPU$ " + "long " * 80 + end for end in "ab"]
    files = [
        results("models", [model_row(model="$^{$")], {**made_up.GPU, "gpu": {"name": name}}) for name in devices
    ]
    plots = draw(report_of(*files))
    names = [plot.name for plot in plots]
    assert len({*names}) == len(names) == 2 and max(map(len, names)) <= 120
    assert [name.split("-")[1] for name in names] == ["1", "2"]
    # two modes whose letters are alike
    alike = [model_row(mode=mode) for mode in ("a b", "a-b")]
    names = [plot.name for plot in draw(report_of(results("models", alike)))]
    assert names[1] == names[0] + "-2"
