"""How row kernels are launched: a heuristic that works everywhere, overridden by a GPU's tuned table (tables.py)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..launch import gpu_index
from .tables import tuned


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
    return _row_config(operator, width, tokens, batch, x.dtype, gpu_index(x))


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
        # partial sums cost 4 fp32 rows a slab, written and read: 4 % of the traffic at 32 rows in bf16
        rows = 16 if tokens <= 64 else 32
    else:
        # enough programs to fill the largest GPU before the vectors of a slab are reused
        rows = min(max(triton.next_power_of_2(batch * tokens // 2048), 1), 16)
    heuristic = RowConfig(block, tail, rows, num_warps)
    return heuristic._replace(**tuned(gpu, operator, dtype, (width,), (tokens,)))

