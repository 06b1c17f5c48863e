"""Launch configurations as data: a heuristic that works everywhere, overridden by a GPU's tuned table.

A table is ``configs/<gpu>.json``: {"schema": "ditfast.configs/1", "environment": {...}, "entries": {key: {field:
value}}}, where a key is "operator/dtype/width/tokens", tokens rounded up to a power of two, and the fields are
those of the operator's configuration below.
"""

from __future__ import annotations

import json
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

SCHEMA = "ditfast.configs/1"
CONFIGS = Path(__file__).parent / "configs"


class RowConfig(NamedTuple):
    """How a row kernel is launched: lanes of a row (block + tail), rows of a program, warps."""

    block: int
    tail: int
    rows: int
    num_warps: int


def row_config(operator: str, width: int, tokens: int, batch: int, x: Tensor) -> RowConfig:
    """The configuration for x (batch, tokens, width): the tuned one where there is one, else the heuristic.

    ``adaln_bwd`` never depends on the batch: its rows decide in which order the sums over tokens are taken, and a
    sample's gradients must not change with its neighbours.
    """
    return _row_config(operator, width, tokens, batch, x.dtype, x.get_device() if x.is_cuda else None)


@lru_cache(maxsize=4096)
def _row_config(
    operator: str, width: int, tokens: int, batch: int, dtype: torch.dtype, gpu: int | None
) -> RowConfig:
    lower = 1 << (width.bit_length() - 1)
    block, tail = lower, 0
    if width > lower:
        # one block while at most a third of its lanes idle (384 in 512), else a block and a tail (1152 = 1024 + 128)
        block, tail = (2 * lower, 0) if 3 * width >= 4 * lower else (lower, triton.next_power_of_2(width - lower))
    # 8 elements a lane: 128-bit accesses in bf16 and fp16, two of them in fp32
    num_warps = min(max(block // 256, 1), 16)
    if operator == "adaln_bwd":
        # partial sums cost 3 fp32 rows a slab: 6 % of the traffic at 16 rows in bf16
        rows = 16 if tokens <= 256 else 32
    else:
        # enough programs to fill the largest GPU before the vectors of a slab are reused
        rows = min(max(triton.next_power_of_2(batch * tokens // 2048), 1), 16)
    heuristic = RowConfig(block, tail, rows, num_warps)
    if gpu is None:
        return heuristic
    tuned = _tuned(torch.cuda.get_device_name(gpu)).get(table_key(operator, dtype, width, tokens))
    return heuristic if tuned is None else heuristic._replace(**tuned)


def table_key(operator: str, dtype: torch.dtype, width: int, tokens: int) -> str:
    """The key of a shape bucket in a tuned table."""
    return f"{operator}/{str(dtype).removeprefix('torch.')}/{width}/{triton.next_power_of_2(max(tokens, 1))}"


def table_path(gpu: str) -> Path:
    """Where the tuned table of a GPU, by the name its driver gives, is kept."""
    return CONFIGS / f"{'-'.join(gpu.lower().split())}.json"


@lru_cache(maxsize=16)
def _tuned(gpu: str) -> dict[str, dict[str, int]]:
    """The entries of a GPU's tuned table; none, with a warning, where the file is damaged or of another schema."""
    path = table_path(gpu)
    if not path.exists():
        return {}
    try:
        entries = read_table(path)
    except ValueError as error:
        warnings.warn(f"{error}; launch configurations follow the heuristic", stacklevel=2)
        return {}
    return entries


def read_table(path: Path) -> dict[str, dict[str, int]]:
    """The entries of a tuned table.

    Raises:
        ValueError: not a table of this schema, naming the file and what is wrong.
    """
    try:
        table: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable table: {error}") from None
    if not isinstance(table, dict) or table.get("schema") != SCHEMA or not isinstance(table.get("entries"), dict):
        raise ValueError(f"{path} must be a table of schema {SCHEMA!r} with entries")
    for key, fields in table["entries"].items():
        if not isinstance(fields, dict) or not fields or set(fields) - set(RowConfig._fields):
            raise ValueError(f"{path}: {key} must set some of {', '.join(RowConfig._fields)}, got {fields!r}")
        if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in fields.values()):
            raise ValueError(f"{path}: {key} must hold whole numbers, got {fields!r}")
    return dict(table["entries"])


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launches within go to x's GPU, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: decided by TRITON_INTERPRET when they were defined."""
    return bool(triton.knobs.runtime.interpret)
