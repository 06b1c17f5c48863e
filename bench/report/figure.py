"""What all plots share: colours, the frame with its conditions beneath, and the PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..records.rows import is_ours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
#: Points; no text in a plot is smaller.
SMALL, TEXT, TITLE = 8.0, 9.0, 11.0
_COLUMN_GAP = 0.85
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")

# Okabe-Ito and greys: blues are ditfast, everything else is a rival
_COLORS = {
    "ditfast": "#0072B2",
    "ditfast-compile": "#56B4E9",
    "ditfast-graph": "#00335C",
    "reference": "#777777",
    "reference-tf32": "#BDBDBD",
    "reference-autocast": "#000000",
    "reference-compile": "#E69F00",
    "reference-max-autotune": "#D55E00",
    "reference-reduce-overhead": "#F0E442",
    "diffusers": "#009E73",
    "diffusers-compile": "#CC79A7",
    "eager": "#777777",
    "compile": "#E69F00",
}
_MORE_OURS = ("#7B9FE0", "#1F3FA8", "#A6DDF0", "#26869C")
_MORE_RIVALS = ("#882255", "#999933", "#7A4A21", "#B39DDB", "#44AA99", "#F4A6C0")


@dataclass(frozen=True)
class Plot:
    """A finished plot.

    Attributes:
        name: of its file, without the suffix.
        group: the page's section: "models", "ops", "scaling" or "memory".
        caption: the text beneath it on the page.
        width: inches, at which its letters have their size.
    """

    name: str
    title: str
    group: str
    machine: str
    alt: str
    caption: str
    png: bytes
    width: float


class Palette:
    """One colour a provider, the same in every plot of a report."""

    def __init__(self, providers: Iterable[str]) -> None:
        unknown = sorted({*providers} - _COLORS.keys())
        ours, rivals = [n for n in unknown if is_ours(n)], [n for n in unknown if not is_ours(n)]
        self._colors = dict(_COLORS)
        for names, spare in ((ours, _MORE_OURS), (rivals, _MORE_RIVALS)):
            self._colors |= {name: spare[index % len(spare)] for index, name in enumerate(names)}

    def __getitem__(self, provider: str) -> str:
        return self._colors[provider]


def provider_order(providers: Iterable[str]) -> list[str]:
    """Rivals first, in the order of the colours; ours last."""
    known = list(_COLORS)

    def order(name: str) -> tuple[bool, int, str]:
        return is_ours(name), known.index(name) if name in known else len(known), name

    return sorted({*providers}, key=order)


def wrapped(text: str, width: float) -> list[str]:
    """The text in lines that fit ``width`` inches at the small size."""
    # a letter is about 0.55 of its height wide
    return textwrap.wrap(text, max(20, int((width - 0.5) * 72 / (SMALL * 0.55))))


class Frame:
    """A figure with a title and a legend above the axes and the conditions beneath.

    Args:
        width: in inches.
        heights: of each row of axes, in inches.
        columns: axes in a row.
        gap: between the rows, in inches.
        titled: whether the axes have titles of their own.
        legend: (handle, label) pairs for all axes.
    """

    def __init__(
        self,
        title: str,
        width: float,
        heights: Sequence[float],
        columns: int,
        legend: Sequence[tuple[Any, str]],
        conditions: str,
        gap: float = 0.6,
        titled: bool = False,
    ) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines, titles = (
            wrapped(conditions, width),
            textwrap.wrap(title, int((width - 0.4) * 72 / (TITLE * 0.6))),
        )
        longest = max((len(label) for _, label in legend), default=0)
        per_row = max(1, int((width - 0.5) / (longest * SMALL * 0.58 / 72 + 0.5)))
        legend_rows = -(-len(legend) // per_row)
        top = 0.2 + 0.22 * len(titles) + 0.2 * legend_rows + (0.25 if titled else 0.05)
        bottom = 0.52 + 0.15 * len(lines) + 0.1
        height = top + bottom + sum(heights) + gap * (len(heights) - 1)
        self.width, left = width, 0.95
        self.figure: Figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        inner = (width - left - 0.25 - _COLUMN_GAP * (columns - 1)) / columns
        grid = self.figure.add_gridspec(
            len(heights),
            columns,
            left=left / width,
            right=1 - 0.25 / width,
            top=1 - top / height,
            bottom=bottom / height,
            height_ratios=list(heights),
            hspace=gap / (sum(heights) / len(heights)),
            wspace=_COLUMN_GAP / inner,
        )
        self.axes: list[Axes] = [
            self.figure.add_subplot(grid[r, c]) for r in range(len(heights)) for c in range(columns)
        ]
        self.figure.text(
            0.2 / width, 1 - 0.12 / height, "\n".join(titles), size=TITLE, weight="bold", va="top", ha="left"
        )
        self.figure.text(
            0.2 / width, 0.1 / height, "\n".join(lines), size=SMALL, color="#444444", va="bottom", ha="left"
        )
        if legend:
            handles, labels = zip(*legend, strict=True)
            place = (0.15 / width, 1 - (0.15 + 0.22 * len(titles)) / height)
            self.figure.legend(
                handles,
                labels,
                loc="upper left",
                bbox_to_anchor=place,
                ncols=min(per_row, len(legend)),
                fontsize=SMALL,
                frameon=False,
                borderaxespad=0.0,
                columnspacing=1.2,
                handlelength=1.6,
            )
        for axes in self.axes:
            style(axes)
            # where it stays whatever the numbers' width
            axes.yaxis.set_label_coords(-0.68 / inner, 0.5)

    def png(self) -> bytes:
        from matplotlib.text import Text

        # a dollar sign in a name begins no formula
        for text in self.figure.findobj(Text):
            text.set_parse_math(False)
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def style(axes: Axes) -> None:
    """Quiet axes: two spines, small ticks, a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.set_axisbelow(True)


def plain_log(axes: Axes, which: str, sparse: bool = False) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 (only powers of ten where ``sparse``), as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0,) if sparse else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axis.set_minor_formatter(NullFormatter())


def plain_linear(axes: Axes) -> None:
    """A linear y axis with commas in its thousands."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:.6f}".rstrip("0").rstrip(".")
