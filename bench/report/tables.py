"""The tables of the page: every row of every suite, failures with their reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..compare import Change, timed
from ..metrics import is_tie
from ..rows import CostRow, MemoryRow, ModelRow, OpRow, ScalingRow, VerifyRow
from .data import Compared, Machine, Run
from .text import STATUS, digits, factor, mode_name, model_name, percent, row_name, size, tick

# what _model_cells fills
_MODEL_COLUMNS = (
    *("images/s", "ms", "quartiles", "TFLOP/s", "of limit", "memory", "first call, ms"),
    *("error", "bound", "parity", "speed-up", "noise", "note"),
)

Tone = Literal["", "good", "bad", "quiet"]


@dataclass(frozen=True)
class Cell:
    """A text, and whether it is good news, bad news, or of little weight."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """Columns as (name, whether numeric), and rows of as many cells."""

    title: str
    columns: Sequence[tuple[str, bool]]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)


def model_tables(machine: Machine) -> list[Table]:
    """One for each mode and dtype."""
    columns = ("model", "batch", "provider", *_MODEL_COLUMNS)
    groups = _grouped(machine.rows("models"), lambda row: (row.mode, row.dtype))
    return [
        Table(
            f"Models, {mode_name(mode)}, {dtype}, on {machine.label}",
            _columns(columns, text=("model", "provider", "parity", "note")),
            [
                [Cell(model_name(row)), Cell(str(row.batch)), Cell(row.provider), *_model_cells(row)]
                for row in rows
            ],
        )
        for (mode, dtype), rows in groups.items()
    ]


def op_tables(machine: Machine) -> list[Table]:
    """One for each dtype."""
    case = ("operator", "direction", "batch", "tokens", "width", "provider")
    columns = (*case, "ms", "quartiles", "rate", "of limit", "parity", "speed-up", "timed", "note")
    names = _columns(columns, text=("operator", "direction", "provider", "parity", "timed", "note"))
    return [
        Table(f"Operators, {dtype}, on {machine.label}", names, [_op_cells(row) for row in rows])
        for (dtype,), rows in _grouped(machine.rows("ops"), lambda row: (row.dtype,)).items()
    ]


def scaling_tables(machine: Machine) -> list[Table]:
    rows: list[ScalingRow] = machine.rows("scaling")
    columns = ("axis", "value", "model", "batch", "mode", "provider", *_MODEL_COLUMNS)
    found = []
    for item in rows:
        row = item.row
        cells = [
            item.axis,
            f"{item.value:,}",
            model_name(row),
            str(row.batch),
            f"{mode_name(row.mode)}, {row.dtype}",
        ]
        found.append([*map(Cell, cells), Cell(row.provider), *_model_cells(row)])
    text = ("axis", "model", "mode", "provider", "parity", "note")
    return [Table(f"Scaling on {machine.label}", _columns(columns, text), found)] if found else []


def memory_tables(machine: Machine) -> list[Table]:
    rows: list[MemoryRow] = machine.rows("memory")
    columns = ("model", "batch", "mode", "provider", "peak", "saved for backward", "largest batch", "note")
    found = []
    for row in rows:
        cells = [model_name(row), str(row.batch), f"{mode_name(row.mode)}, {row.dtype}", row.provider]
        largest = "-" if row.max_batch is None else f"{row.max_batch:,}"
        numbers = [_status(row), Cell(size(row.saved_bytes)), Cell(largest)]
        found.append([*map(Cell, cells), *numbers, Cell(row.note, "quiet")])
    text = ("model", "mode", "provider", "note")
    return [Table(f"Memory on {machine.label}", _columns(columns, text), found)] if found else []


def verify_tables(machine: Machine) -> list[Table]:
    rows: list[VerifyRow] = machine.rows("verify")
    columns = ("subject", "backend", "dtype", "worst tensor", "error", "eager PyTorch's", "bound", "verdict")
    found = []
    for row in rows:
        numbers = [_science(row.error), _science(row.yardstick), _science(row.bound)]
        verdict = Cell("✓", "good") if row.ok else Cell("✗ failed", "bad")
        found.append([*map(Cell, [row.subject, row.backend, row.dtype, row.tensor, *numbers]), verdict])
    text = ("subject", "backend", "dtype", "worst tensor", "verdict")
    return [Table(f"Numerics on {machine.label}", _columns(columns, text), found)] if found else []


def cost_tables(runs: Sequence[Run]) -> list[Table]:
    """What was computed without a device, and what the fusions save."""
    rows: list[CostRow] = [row for run in runs for row in run.results.rows]
    if not rows:
        return []
    gpus = list(dict.fromkeys(gpu for row in rows for gpu in row.roofline_ms))
    traced = ("model", "batch", "mode", "provider", "launches", "GB moved", "TFLOP", "FLOP/byte")
    columns = (*traced, *(f"{gpu}, ms at least" for gpu in gpus))
    counted, saved = [], []
    for row in rows:
        case = [model_name(row), str(row.batch), f"{mode_name(row.mode)}, {row.dtype}"]
        numbers = [
            f"{row.launches:,}",
            digits(row.bytes / 1e9),
            digits(row.flops / 1e12),
            digits(row.intensity),
        ]
        bounds = [digits(row.roofline_ms.get(gpu)) for gpu in gpus]
        counted.append([Cell(text) for text in (*case, row.provider, *numbers, *bounds)])
        for item in row.savings:
            numbers = [f"{item.uses:,}", f"{item.launches:,}", digits(item.bytes / 1e9)]
            saved.append([Cell(text) for text in (*case, item.fusion, *numbers)])
    text = ("model", "mode", "provider", "fusion")
    notes = ["Computed by tracing on meta tensors, with datasheet rates: bounds, not measurements."]
    tables = [
        Table("Launches, bytes and FLOPs of a call (computed)", _columns(columns, text), counted, notes)
    ]
    if saved:
        names = _columns(("model", "batch", "mode", "fusion", "uses", "launches saved", "GB saved"), text)
        tables.append(Table("What each fusion saves over the reference (computed)", names, saved, notes))
    return tables


def comparison_table(pair: Compared) -> Table:
    """Every row of both runs; what became worse comes first."""
    order = {"slower": 0, "faster": 1, "tie": 2}
    rows = [
        [Cell(row_name(row)), *_blank(4), Cell("✗ no longer runs", "bad")] for row in pair.comparison.lost
    ]
    rows += [
        [Cell(row_name(row)), *_blank(4), Cell("✗ parity lost", "bad")] for row in pair.comparison.unticked
    ]
    for change in sorted(pair.comparison.changes, key=lambda change: order[change.verdict]):
        numbers = [digits(change.old_ms), digits(change.new_ms), factor(change.speedup)]
        noise = percent(timed(change.row).noise)
        rows.append([Cell(row_name(change.row)), *map(Cell, numbers), Cell(noise), _verdict(change)])
    columns = _columns(
        ("row", "then, ms", "now, ms", "speed", "noise now", "verdict"), text=("row", "verdict")
    )
    return Table(f"{pair.new} against {pair.old}, on {pair.machine}", columns, rows, comparison_notes(pair))


def comparison_notes(pair: Compared) -> list[str]:
    notes = ["A change within the noise of either run, or with overlapping quartiles, is a tie."]
    if pair.comparison.only_old or pair.comparison.only_new:
        only = f"{pair.comparison.only_old} rows only then, {pair.comparison.only_new} rows only now"
        notes.append(f"Measured in one run alone: {only}.")
    return notes + [f"Conditions differ: {condition}." for condition in pair.comparison.conditions]


def _verdict(change: Change) -> Cell:
    if change.is_regression:
        return Cell("✗ regression", "bad")
    if change.verdict == "slower":
        return Cell("slower (a rival)", "quiet")
    return Cell("faster", "good") if change.verdict == "faster" else Cell("a tie", "quiet")


def _model_cells(row: ModelRow) -> list[Cell]:
    """From images/s to the note."""
    share = percent(row.ceiling_share) + (
        f" {row.ceiling}" if row.ceiling_share is not None and row.ceiling else ""
    )
    return [
        _status(row, digits(row.images_per_s)),
        *_times(row),
        *map(Cell, [digits(row.tflops), share, size(row.peak_bytes), digits(row.first_call_ms)]),
        *map(Cell, [_science(row.error), _science(row.bound)]),
        _tick(row),
        _speedup(row),
        Cell("-" if row.noise is None else percent(row.noise)),
        Cell(row.note, "quiet"),
    ]


def _op_cells(row: OpRow) -> list[Cell]:
    names = [row.operator, row.direction, str(row.batch), str(row.tokens), str(row.width), row.provider]
    rate = "-" if row.rate is None else f"{digits(row.rate)} {row.unit}"
    first, quartiles = _times(row)
    times = [first if row.ms else _status(row), quartiles, Cell(rate), Cell(percent(row.share))]
    return [*map(Cell, names), *times, _tick(row), _speedup(row), Cell(row.timed), Cell(row.note, "quiet")]


def _times(row: ModelRow | OpRow) -> list[Cell]:
    if row.ms is None:
        return _blank(2)
    return [Cell(digits(row.ms.median)), Cell(f"{digits(row.ms.p25)} to {digits(row.ms.p75)}")]


def _status(row: ModelRow | OpRow | MemoryRow, text: str = "") -> Cell:
    """``text``, or the peak; where it did not run, that."""
    if row.status != "ok":
        return Cell(STATUS[row.status], "quiet" if row.status == "unavailable" else "bad")
    return Cell(size(row.peak_bytes) if isinstance(row, MemoryRow) else text)


def _tick(row: ModelRow | OpRow) -> Cell:
    if row.ms is None:
        return Cell("-")
    return Cell(tick(row.parity), "good" if row.parity else "bad" if row.is_ours else "quiet")


def _speedup(row: ModelRow | OpRow) -> Cell:
    if row.speedup is None or row.parity is not True:
        return Cell("")
    over = f" over {row.rival}" if row.rival else ""
    if is_tie(row.speedup, row.noise or 0.0):
        return Cell(f"{factor(row.speedup)}, a tie{over}", "quiet")
    return Cell(f"{factor(row.speedup)}{over}", "good" if row.speedup > 1 else "bad")


def _blank(number: int) -> list[Cell]:
    return [Cell("-", "quiet")] * number


def _science(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _columns(names: Iterable[str], text: Sequence[str]) -> list[tuple[str, bool]]:
    return [(name, name not in text) for name in names]


def _grouped(rows: Iterable[Any], key: Callable[[Any], tuple[Any, ...]]) -> dict[tuple[Any, ...], list[Any]]:
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
