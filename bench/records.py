"""The result file of ``ditfast bench``: a versioned JSON schema, checked on load, written atomically."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .ceilings import Ceilings
from .files import write_json
from .timing import Spread

SCHEMA = "ditfast.bench/1"

Status = Literal["ok", "oom", "error", "unavailable"]


@dataclass(frozen=True)
class Row:
    """One provider on one case. What could not be measured is None, and ``note`` says why.

    Attributes:
        model, conditioning, latent_size, batch, dtype, mode: the case; batch counts images.
        provider: its name.
        precision: what it computes in: the case's dtype, or "tf32".
        status: "ok" (it ran), "oom", "error", or "unavailable" (it cannot run on this device).
        note: why there is no time or no parity tick; otherwise empty.
        ms: time of a call.
        first_call_ms: the first call, compilation and capture included.
        images_per_s, tflops: by the median and the reference's FLOPs.
        weight_bytes: the least a call must read.
        ceiling_share: of the measured ceiling ``ceiling`` ("matmul" or "copy").
        peak_bytes: peak memory of the provider on its own.
        error: against fp64; where ``mode`` is train, of the gradient furthest up its bound. None where not finite.
        yardstick_error, bound: the reference's own error in the dtype, and the bound that follows from it.
        parity: the tick; None where it could not be judged.
        parity_samples: how many images of the batch were compared.
        noise: how far the reference timed twice lay apart in this case, as a share.
        speedup, rival: over the fastest rival that ran; only beside a parity tick.
    """

    model: str
    conditioning: str
    latent_size: tuple[int, int]
    batch: int
    dtype: str
    mode: str
    provider: str
    precision: str
    status: Status
    note: str = ""
    ms: Spread | None = None
    first_call_ms: float | None = None
    images_per_s: float | None = None
    tflops: float | None = None
    weight_bytes: int | None = None
    ceiling_share: float | None = None
    ceiling: str | None = None
    peak_bytes: int | None = None
    error: float | None = None
    yardstick_error: float | None = None
    bound: float | None = None
    parity: bool | None = None
    parity_samples: int | None = None
    noise: float | None = None
    speedup: float | None = None
    rival: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.provider == "ditfast" or self.provider.startswith("ditfast-")

    @property
    def key(self) -> tuple[object, ...]:
        """What must agree for two rows to measure the same thing."""
        return (self.model, self.conditioning, self.latent_size, self.batch, self.dtype, self.mode, self.provider)


@dataclass
class Results:
    """A run: where, how, the measured limits, the rows, and whether it came to its end."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: Path) -> None:
        """Writes beside, then renames: a reader, or an interruption, never meets half a file."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads and checks a result file.

        Raises:
            ValueError: not JSON, another schema, or a field that is missing, unknown or of the wrong type;
                names the file and the field.
            OSError: the file cannot be read.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no result of ditfast bench: not valid JSON ({error})") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path} must have the schema {SCHEMA!r}, got {schema!r}")
        try:
            results: Results = _parse(cls, {key: value for key, value in data.items() if key != "schema"}, "results")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return results


def _parse(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``kind``, or a ValueError that says where it does not fit."""
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _parse(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _parse_dataclass(kind, value, where)
    if origin is dict:
        _check(isinstance(value, dict), where, "an object", value)
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        _check(isinstance(value, list), where, "a list", value)
        return [_parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is tuple:
        _check(isinstance(value, list) and len(value) == len(arguments), where, f"{len(arguments)} values", value)
        return tuple(_parse(a, item, where) for a, item in zip(arguments, value, strict=True))
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        _check(number, where, "a finite number", value)
        return float(value)
    _check(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), where, kind.__name__, value)
    return value


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    _check(isinstance(value, dict), where, "an object", value)
    hints = get_type_hints(kind)
    names = [item.name for item in fields(kind)]
    missing, unknown = [n for n in names if n not in value], [n for n in value if n not in names]
    if missing or unknown:
        raise ValueError(f"{where} must hold {', '.join(names)}; missing: {missing}, unknown: {unknown}")
    return kind(**{name: _parse(hints[name], value[name], f"{where}.{name}") for name in names})


def _check(fits: bool, where: str, wanted: str, value: Any) -> None:
    if not fits:
        raise ValueError(f"{where} must be {wanted}, got {str(value)[:60]!r}")
