"""Tuned tables: choices measured on a GPU, which override the heuristics.

A table is ``configs/<gpu>.json``: {"schema": "ditfast.configs/1", "gpu": the name its driver gives, "environment":
{...}, "entries": {key: {field: value}}, "measured": {key: {...}}}. A key is "operator/dtype/size/...": the sizes that
the operator's heuristic looks at, those that vary from call to call (tokens, rows) rounded up to a power of two. The
fields are some of those of the operator's configuration; "candidate" names the implementation. "measured", for the
reader and for ``ditfast tune``, may tell of an entry its "ms", the heuristic's ("heuristic_ms") and their "noise" (a
share), null where the heuristic's choice does not run, and by which versions: of all this nothing is launched.
"""

from __future__ import annotations

import json
import math
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from .. import launch

SCHEMA = "ditfast.configs/1"
CONFIGS = Path(__file__).parent

Fields = dict[str, Any]

_ROW = {"block": 1, "tail": 0, "rows": 1, "num_warps": 1}
_GEMM = {
    "block_m": 16,
    "block_n": 16,
    "block_k": 16,
    "group_m": 1,
    "parts": 1,
    "num_warps": 1,
    "num_stages": 1,
    "max_registers": 0,
    "tma": 0,
}
_GEMM_CANDIDATES = ("triton", "separate")
_ATTENTION = {"block_m": 16, "block_n": 16, "num_warps": 1, "num_stages": 1}
_ATTENTION_CANDIDATES = (
    "triton", "sdpa", "cudnn", "flash", "efficient", "flash_attn", "flash_attn_3", "flash_attn_4",
)  # fmt: skip
# operator -> (its candidates, its whole-number fields with the least value of each)
OPERATORS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "adaln_fwd": ((), _ROW),
    "adaln_bwd": ((), _ROW),
    "linear_gelu": ((*_GEMM_CANDIDATES, "cublaslt"), _GEMM),
    "linear_gelu_save": (_GEMM_CANDIDATES, _GEMM),
    "linear_gelu_backward": (_GEMM_CANDIDATES, _GEMM),
    "linear_gated_residual": (_GEMM_CANDIDATES, _GEMM),
    "linear_gated_residual_save": (_GEMM_CANDIDATES, _GEMM),
    "modulations": (_GEMM_CANDIDATES, _GEMM),
    "attention_fwd": ((), _ATTENTION),
    "attention_dq": ((), _ATTENTION),
    "attention_dkv": ((), _ATTENTION),
    "attention_inference": (_ATTENTION_CANDIDATES, {}),
    "attention_training": (_ATTENTION_CANDIDATES, {}),
}
_DTYPES = ("bfloat16", "float16", "float32")
# fields with a greatest value too: a program has 32 warps at the most, a thread 255 registers, TMA moves 256 x 256
_MOST = {"num_warps": 32, "block_m": 256, "block_n": 256, "block_k": 256, "max_registers": 255, "tma": 2}
# fields that need not be a power of two
_ANY = ("rows", "group_m", "num_stages", "max_registers")
# what may be said of an entry's measurement: times and a share
_MEASURED = ("ms", "heuristic_ms", "noise")


def table_key(operator: str, dtype: torch.dtype, fixed: tuple[int, ...], varying: tuple[int, ...]) -> str:
    """The key of a shape bucket: ``fixed`` sizes as they are, ``varying`` ones rounded up to a power of two."""
    sizes = (*fixed, *(triton.next_power_of_2(max(size, 1)) for size in varying))
    return "/".join((operator, str(dtype).removeprefix("torch."), *map(str, sizes)))


def table_path(gpu: str) -> Path:
    """Where the tuned table of a GPU, by the name its driver gives, is kept."""
    return CONFIGS / f"{'-'.join(gpu.lower().split())}.json"


def tuned(
    gpu: int | None, operator: str, dtype: torch.dtype, fixed: tuple[int, ...], varying: tuple[int, ...]
) -> Fields:
    """What the table of a CUDA device says of a shape; nothing without a device, a table or an entry."""
    if gpu is None:
        return {}
    return load(launch.gpu(gpu).name).get(table_key(operator, dtype, fixed, varying), {})


@lru_cache(maxsize=16)
def load(gpu: str) -> dict[str, Fields]:
    """The entries of a GPU's table; none, with a warning, where the file is damaged or another GPU's."""
    path = table_path(gpu)
    if not path.exists():
        return {}
    try:
        table = read_table(path)
        if table["gpu"] != gpu:
            raise ValueError(f"{path} was tuned on {table['gpu']!r}, this GPU is {gpu!r}")
    except ValueError as error:
        warnings.warn(f"{error}; launch configurations follow the heuristic", stacklevel=2)
        return {}
    return dict(table["entries"])


def read_table(path: Path) -> dict[str, Any]:
    """A tuned table, checked: "gpu", "environment", "entries" and "measured", empty where the file has none.

    Raises:
        ValueError: not a table of this schema, or an entry that no kernel could be launched with; names the file.
    """
    try:
        table: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable table: {error}") from None
    if not isinstance(table, dict) or table.get("schema") != SCHEMA or not isinstance(table.get("entries"), dict):
        raise ValueError(f"{path} must be a table of schema {SCHEMA!r} with entries")
    if not isinstance(table.get("gpu"), str) or not isinstance(table.get("environment"), dict):
        raise ValueError(f"{path} must name its gpu and its environment")
    for key, fields in table["entries"].items():
        violation = _wrong(key, fields)
        if violation:
            raise ValueError(f"{path}: {key} {violation}, got {fields!r}")
    measured = table.setdefault("measured", {})
    if not isinstance(measured, dict):
        raise ValueError(f"{path} must hold an object as measured, got {measured!r}")
    for key, record in measured.items():
        if not _is_measurement(record):
            raise ValueError(f"{path}: {key} must be measured by {', '.join(_MEASURED)} and words, got {record!r}")
    return table


def _is_measurement(record: object) -> bool:
    """Whether it holds the three numbers, of which the heuristic's may be null, and text beside them."""
    if not isinstance(record, dict) or not set(_MEASURED) <= set(record) or record["ms"] is None:
        return False
    numbers = [record[name] for name in _MEASURED if record[name] is not None]
    words = [value for name, value in record.items() if name not in _MEASURED]
    return all(isinstance(value, str) for value in words) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf for value in numbers
    )


def _wrong(key: str, fields: object) -> str:
    """The rule that an entry breaks, such as "must set ...", or ""."""
    operator, *sizes = key.split("/")
    if operator not in OPERATORS:
        return f"must be of an operator among {', '.join(OPERATORS)}"
    if sizes[:1] not in ([name] for name in _DTYPES) or not all(size.isdecimal() for size in sizes[1:]):
        return f"must be of a dtype among {', '.join(_DTYPES)}, and sizes"
    candidates, numbers = OPERATORS[operator]
    names = [*(["candidate"] if candidates else []), *numbers]
    if not isinstance(fields, dict) or not fields or set(fields) - set(names):
        return f"must set some of {', '.join(names)}"
    for name, value in fields.items():
        if name == "candidate":
            if value not in candidates:
                return f"must name a candidate among {', '.join(candidates)}"
        elif isinstance(value, bool) or not isinstance(value, int) or value < numbers[name]:
            return f"must hold whole numbers, {name} at least {numbers[name]}"
        elif value > _MOST.get(name, value):
            return f"must hold {_MOST[name]} as {name} at the most"
        elif name not in _ANY and value & (value - 1):
            return f"must hold a power of two as {name}"
    if {"block", "tail"} & set(fields):  # else a row's end would never be reached
        width = int(sizes[1]) if len(sizes) > 1 and sizes[1].isdecimal() else 0
        if fields.get("block", 0) + fields.get("tail", 0) < width:
            return f"must cover a row of {width} with block + tail"
    return ""
