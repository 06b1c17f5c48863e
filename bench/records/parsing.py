"""JSON values as annotated dataclasses, every field checked."""

from __future__ import annotations

import sys
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def parse(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``kind``, or a ValueError that says where it does not fit."""
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else parse(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _parse_dataclass(kind, value, where)
    if origin is dict:
        _check(isinstance(value, dict), where, "an object", value)
        return {key: parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        _check(isinstance(value, list), where, "a list", value)
        return [parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is tuple:
        _check(isinstance(value, list) and len(value) == len(arguments), where, f"{len(arguments)} values", value)
        return tuple(parse(a, item, where) for a, item in zip(arguments, value, strict=True))
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
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
    values = {name: parse(hints[name], value[name], f"{where}.{name}") for name in names}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check(fits: bool, where: str, expected: str, value: Any) -> None:
    if not fits:
        raise ValueError(f"{where} must be {expected}, got {str(value)[:60]!r}")
