"""The tables of the page: every row of every suite, failures with their reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..records.metrics import is_tie
from ..records.rows import CostRow, HostRow, MemoryRow, ModelRow, OpRow, SampleRow, ScalingRow, VerifyRow
from ..records.text import (
    COST_CAPTION,
    HOST_CAPTION,
    HOST_DIFFERENCES,
    HOST_PARTS_CAPTION,
    STATUS,
    cost_mode_name,
    digits,
    mode_name,
    model_name,
    percent,
    size,
    tick,
)
from .data import Machine
from .derived import lacks_bytes
from .headline import noise, speedup_text

# what _model_cells fills
_MODEL_COLUMNS = (
    *("images/s", "ms", "quartiles", "TFLOP/s", "of limit", "memory", "first call, ms"),
    *("error", "bound", "parity", "speed-up", "noise", "note"),
)

# the terminal's, without what it says of columns that are not here
_COST_NOTE = " ".join(COST_CAPTION).replace(" /s: images a second.", "")
_HOST_NOTE = " ".join((*HOST_CAPTION, *HOST_DIFFERENCES)).replace(", and median and half the interquartile range", "")

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
            columns_of(columns, text=("model", "provider", "parity", "note")),
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
    names = columns_of(columns, text=("operator", "direction", "provider", "parity", "timed", "note"))
    return [
        Table(f"Operators, {dtype}, on {machine.label}", names, [_op_cells(row) for row in rows])
        for (dtype,), rows in _grouped(machine.rows("ops"), lambda row: (row.dtype,)).items()
    ]


def scaling_tables(machine: Machine) -> list[Table]:
    rows: list[ScalingRow] = machine.rows("scaling")
    columns = ("axis", "value", "model", "batch", "mode", "provider", *_MODEL_COLUMNS)
    lines = []
    for item in rows:
        row = item.row
        cells = [
            item.axis,
            f"{item.value:,}",
            model_name(row),
            str(row.batch),
            f"{mode_name(row.mode)}, {row.dtype}",
        ]
        lines.append([*map(Cell, cells), Cell(row.provider), *_model_cells(row)])
    text = ("axis", "model", "mode", "provider", "parity", "note")
    return [Table(f"Scaling on {machine.label}", columns_of(columns, text), lines)] if lines else []


def sample_tables(machine: Machine) -> list[Table]:
    rows: list[SampleRow] = machine.rows("sample")
    case = ("model", "batch", "dtype", "sampler", "steps", "guidance", "provider")
    columns = (*case, "images/s", "ms", "quartiles", "error", "bound", "parity", "speed-up", "note")
    lines = []
    for row in rows:
        names = [model_name(row), str(row.batch), row.dtype, row.sampler, str(row.steps), f"{row.cfg_scale:g}"]
        numbers = [_status(row, digits(row.images_per_s)), *_times(row)]
        errors = [Cell(_science(row.error)), Cell(_science(row.bound))]
        cells = [*map(Cell, [*names, row.provider]), *numbers, *errors]
        lines.append([*cells, _tick(row), _speedup(row), Cell(row.note, "quiet")])
    text = ("model", "dtype", "sampler", "provider", "parity", "speed-up", "note")
    title = f"Sampling trajectories, latents only, on {machine.label}"
    return [Table(title, columns_of(columns, text), lines)] if lines else []


def memory_tables(machine: Machine) -> list[Table]:
    rows: list[MemoryRow] = machine.rows("memory")
    columns = ("model", "batch", "mode", "provider", "peak", "saved for backward", "largest batch", "note")
    lines = []
    for row in rows:
        cells = [model_name(row), str(row.batch), f"{mode_name(row.mode)}, {row.dtype}", row.provider]
        largest = "-" if row.max_batch is None else f"{row.max_batch:,}"
        peak = Cell("no bytes", "bad") if lacks_bytes(row) else _status(row)
        lines.append(
            [*map(Cell, cells), peak, Cell(size(row.saved_bytes)), Cell(largest), Cell(row.note, "quiet")]
        )
    text = ("model", "mode", "provider", "note")
    title = (
        "Memory, traced on meta tensors, not measured" if machine.is_traced else f"Memory on {machine.label}"
    )
    return [Table(title, columns_of(columns, text), lines)] if lines else []


def host_tables(machine: Machine) -> list[Table]:
    """The host's time of eager calls, and of the operators in ditfast's calls."""
    rows: list[HostRow] = machine.rows("host")
    if not rows:
        return []
    models, parts = [], []
    for row in rows:
        case = [model_name(row), str(row.batch), f"{cost_mode_name(row.mode)}, {row.dtype}"]
        whole = row.process_ms
        numbers = [digits(row.least_ms), digits(whole.median), f"{digits(whole.p25)} to {digits(whole.p75)}"]
        numbers += ["-" if row.launches is None else f"{row.launches:,}", f"{row.triton_launches:,}"]
        models.append([Cell(text) for text in (*case, row.provider, *numbers)])
        for part in row.parts:
            spreads = (part.public, part.launcher, part.launch)
            times = ["-" if spread is None else digits(spread.median * 1e3) for spread in spreads]
            name = f"{part.operator}, {part.direction}"
            parts.append([Cell(text) for text in (*case, name, str(part.uses), str(part.launches), *times)])
    text = ("model", "mode", "provider", "quartiles", "operator")
    columns = ("model", "batch", "mode", "provider", "least, ms", "median", "quartiles", "launches", "by Triton")
    title = f"The host's time of an eager call, on {machine.label}"
    tables = [Table(title, columns_of(columns, text), models, [_HOST_NOTE])]
    if parts:
        levels = ("public", "launcher", "launch")
        names = columns_of(("model", "batch", "mode", "operator", "uses", "launches", *levels), text)
        title = "ditfast's operators on the host, microseconds a call, each level with those below it"
        tables.append(Table(title, names, parts, [" ".join(HOST_PARTS_CAPTION)]))
    return tables


def verify_tables(machine: Machine) -> list[Table]:
    rows: list[VerifyRow] = machine.rows("verify")
    columns = ("subject", "backend", "dtype", "worst tensor", "error", "eager PyTorch's", "bound", "verdict")
    lines = []
    for row in rows:
        numbers = [_science(row.error), _science(row.yardstick), _science(row.bound)]
        verdict = Cell("✓", "good") if row.ok else Cell("✗ failed", "bad")
        lines.append([*map(Cell, [row.subject, row.backend, row.dtype, row.note or row.tensor, *numbers]), verdict])
    text = ("subject", "backend", "dtype", "worst tensor", "verdict")
    return [Table(f"Numerics on {machine.label}", columns_of(columns, text), lines)] if lines else []


def cost_tables(machine: Machine) -> list[Table]:
    """What was computed without a device."""
    rows: list[CostRow] = machine.rows("cost")
    if not rows:
        return []
    gpus = list(dict.fromkeys(gpu for row in rows for gpu in row.roofline_ms))
    traced = ("model", "batch", "mode", "provider", "launches", "GB moved", "TFLOP", "FLOP/byte")
    columns = (*traced, *(f"{gpu}, ms at least" for gpu in gpus))
    counted = []
    for row in rows:
        case = [model_name(row), str(row.batch), f"{cost_mode_name(row.mode)}, {row.dtype}"]
        numbers = [
            f"{row.launches:,}",
            digits(row.bytes / 1e9),
            digits(row.flops / 1e12),
            digits(row.intensity),
        ]
        bounds = [digits(row.roofline_ms.get(gpu)) for gpu in gpus]
        counted.append([Cell(text) for text in (*case, row.provider, *numbers, *bounds)])
    text = ("model", "mode", "provider")
    title = "Launches, bytes and FLOPs of a call (computed)"
    return [Table(title, columns_of(columns, text), counted, [_COST_NOTE])]


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


def _times(row: ModelRow | OpRow | SampleRow) -> list[Cell]:
    if row.ms is None:
        return blank(2)
    return [Cell(digits(row.ms.median)), Cell(f"{digits(row.ms.p25)} to {digits(row.ms.p75)}")]


def _status(row: ModelRow | OpRow | SampleRow | MemoryRow, text: str = "") -> Cell:
    """``text``, or the peak; or why the row did not run."""
    if row.status != "ok":
        return Cell(STATUS[row.status], "quiet" if row.status == "unavailable" else "bad")
    return Cell(size(row.peak_bytes) if isinstance(row, MemoryRow) else text)


def _tick(row: ModelRow | OpRow | SampleRow) -> Cell:
    if row.ms is None:
        return Cell("-")
    return Cell(tick(row.parity), "good" if row.parity else "bad" if row.is_ours else "quiet")


def _speedup(row: ModelRow | OpRow | SampleRow) -> Cell:
    text = speedup_text(row)
    if not text or row.speedup is None:
        return Cell("")
    if is_tie(row.speedup, noise(row)):
        return Cell(text, "quiet")
    return Cell(text, "good" if row.speedup > 1 else "bad")


def blank(number: int) -> list[Cell]:
    return [Cell("-", "quiet")] * number


def _science(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def columns_of(names: Iterable[str], text: Sequence[str]) -> list[tuple[str, bool]]:
    return [(name, name not in text) for name in names]


def _grouped(rows: Iterable[Any], key: Callable[[Any], tuple[Any, ...]]) -> dict[tuple[Any, ...], list[Any]]:
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
