"""The result files of ``ditfast bench``: one versioned JSON schema a suite, checked on load, written atomically."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ...files import write_json
from .parsing import parse
from .rows import CostRow, HostRow, MemoryRow, ModelRow, OpRow, SampleRow, ScalingRow, VerifyRow

Suite = Literal["models", "ops", "scaling", "memory", "cost", "verify", "sample", "host"]
SUITES: tuple[Suite, ...] = get_args(Suite)

ROW_TYPES: dict[Suite, type[Any]] = {
    "models": ModelRow,
    "ops": OpRow,
    "scaling": ScalingRow,
    "memory": MemoryRow,
    "cost": CostRow,
    "verify": VerifyRow,
    "sample": SampleRow,
    "host": HostRow,
}

_HUGE = 1 << 63
_POSITIVE = ("batch", "tokens", "hidden_size", "depth", "width", "images_per_s", "tflops", "rate", "speedup", "bytes")

# ops, 2: num_heads; cost, 2: without what each fusion saves; verify, 2: note
_VERSIONS: dict[Suite, int] = {"ops": 2, "cost": 2, "verify": 2}


def schema(suite: Suite) -> str:
    return f"ditfast.bench.{suite}/{_VERSIONS.get(suite, 1)}"


@dataclass(frozen=True)
class Older:
    """A row that the run keeps and has not measured again: ``why`` says what it lacks to be one of its rows."""

    row: Any
    why: str


@dataclass
class Results:
    """A run of one suite.

    Attributes:
        suite: which; it determines the type of the rows.
        environment: where, as :func:`environment.collect` says.
        settings: how: the options, completed by the device's defaults.
        ceilings: the limits measured in the same run; None where none were needed.
        readings: the GPU's clocks, power and temperature, in the order read: "when" is "before" or "after"; before,
            also the host's load average of the last minute.
        parts: how many processes measured it, one after another; more than 1 where a run was continued.
        rows: what was measured.
        complete: whether it came to its end.
        older: rows of earlier parts, of other sources or of cases that were not finished, each until it is measured
            again. No figure may set them beside ``rows``.
    """

    suite: Suite
    environment: dict[str, Any]
    settings: dict[str, Any]
    ceilings: Ceilings | None = None
    readings: list[dict[str, Any]] = field(default_factory=list)
    parts: int = 1
    rows: list[Any] = field(default_factory=list)
    complete: bool = False
    older: list[Older] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        return {"schema": schema(data.pop("suite")), **data}

    def save(self, path: Path) -> None:
        """Writes beside, then renames: a reader, or an interruption, never meets half a file."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: Path, *suites: Suite) -> Results:
        """Reads and checks a result file.

        Args:
            path: the file.
            suites: those that will do; any by default.

        Raises:
            ValueError: not JSON, another schema, or a field that is missing, unknown or of the wrong type;
                names the file and the field.
            OSError: the file cannot be read.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no result of ditfast bench: not valid JSON ({error})") from error
        name = data.get("schema") if isinstance(data, dict) else None
        by_schema = {schema(suite): suite for suite in suites or SUITES}
        if not isinstance(name, str) or name not in by_schema:
            one_of = "the schema" if len(by_schema) == 1 else "one of the schemas"
            raise ValueError(f"{path} must have {one_of} {', '.join(map(repr, by_schema))}, got {name!r}")
        try:
            return _from_dict(by_schema[name], {key: value for key, value in data.items() if key != "schema"})
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _from_dict(suite: Suite, data: dict[str, Any]) -> Results:
    names = [item.name for item in fields(Results) if item.name != "suite"]
    data = {"older": [], **data}  # which files had not before there were any
    missing, unknown = [n for n in names if n not in data], [n for n in data if n not in names]
    if missing or unknown:
        raise ValueError(f"results must hold {', '.join(names)}; missing: {missing}, unknown: {unknown}")
    kinds = get_type_hints(Results)
    row_type = ROW_TYPES[suite]
    values = {name: parse(kinds[name], data[name], f"results.{name}") for name in names}
    values["rows"] = [_row(row_type, row, f"results.rows[{index}]") for index, row in enumerate(values["rows"])]
    values["older"] = [
        replace(item, row=_row(row_type, item.row, f"results.older[{index}].row"))
        for index, item in enumerate(values["older"])
    ]
    return Results(suite, **values)


def _row(kind: type[Any], value: Any, where: str) -> Any:
    row = parse(kind, value, where)
    _check_row(getattr(row, "row", row), where)
    return row


def _check_row(row: Any, where: str) -> None:
    """What the types do not say, and what every derived figure relies on."""
    for item in fields(row):
        value = getattr(row, item.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not 0 <= value < _HUGE:
            raise ValueError(f"{where}.{item.name} must be at least 0 and below 2^63, got {str(value)[:20]}")
        if number and value == 0 and item.name in _POSITIVE:
            raise ValueError(f"{where}.{item.name} must be above 0, got 0")
    if hasattr(row, "ms") and (row.status == "ok") != (row.ms is not None):
        raise ValueError(f"{where}.ms must be there exactly where status is ok, got status {row.status!r}")


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: the best of the samples, for a limit is not an average.

    Attributes:
        copy_gb_per_s: a large device-to-device copy, bytes read plus bytes written.
        copy_bytes: size of the buffer copied.
        matmul_tflops: precision ("bf16", "tf32", ...) -> TFLOP/s of a square matmul.
        matmul_size: precision -> the side of its matrices.
    """

    copy_gb_per_s: float
    copy_bytes: int
    matmul_tflops: dict[str, float]
    matmul_size: dict[str, int]

    def __post_init__(self) -> None:
        for name, rate in {"copy_gb_per_s": self.copy_gb_per_s, **self.matmul_tflops}.items():
            if not rate > 0:
                raise ValueError(f"{name} must be above 0, got {rate}")


def highest(first: Ceilings | None, second: Ceilings) -> Ceilings:
    """The higher of each figure of two measurements of one device: the first may have met a busy machine."""
    if first is None:
        return second
    copy = max(first, second, key=lambda ceilings: ceilings.copy_gb_per_s)
    rates, sizes = dict(first.matmul_tflops), dict(first.matmul_size)
    for precision, rate in second.matmul_tflops.items():
        if rate > rates.get(precision, 0.0):
            rates[precision], sizes[precision] = rate, second.matmul_size[precision]
    return Ceilings(copy.copy_gb_per_s, copy.copy_bytes, rates, sizes)
