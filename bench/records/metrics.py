"""The derived columns: images/s, TFLOP/s, share of the measured ceilings, speed-up over the best rival."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from .files import Ceilings
from .rows import ModelRow, OpRow, OwnRow, SampleRow

Timed = TypeVar("Timed", ModelRow, OpRow, OwnRow, SampleRow)


def images_per_second(batch: int, median_ms: float) -> float:
    return batch / median_ms * 1e3


def tflops(flops: int, median_ms: float) -> float:
    """TFLOP/s of ``flops`` in ``median_ms``."""
    return flops / median_ms / 1e9


def with_shares(rows: Iterable[ModelRow], ceilings: Ceilings) -> list[ModelRow]:
    """The rows with ``ceiling_share`` and ``ceiling``: the larger of the shares of the two measured ceilings.

    They are the TFLOP/s over the matmul's in the row's precision, and reading the weights once over the copy.
    A row without a time, or whose precision's matmul was not measured, has none.
    """
    return [_with_share(row, ceilings) for row in rows]


def _with_share(row: ModelRow, ceilings: Ceilings) -> ModelRow:
    peak = ceilings.matmul_tflops.get(row.precision)
    if row.ms is None or row.tflops is None or row.weight_bytes is None or peak is None:
        return row
    memory = row.weight_bytes / row.ms.median / 1e6 / ceilings.copy_gb_per_s
    share, ceiling = max((row.tflops / peak, "matmul"), (memory, "copy"))
    return replace(row, ceiling_share=share, ceiling=ceiling)


def with_speedups(rows: Iterable[Timed]) -> list[Timed]:
    """The rows of one case with ``speedup`` and ``rival`` set where they are earned.

    A ditfast row earns a speed-up only by a parity tick of this run. The rival is the fastest provider
    of any other codebase or setting that ran, whatever its precision or parity.
    """
    rows = list(rows)
    rivals = [row for row in rows if row.status == "ok" and not row.is_ours and row.ms is not None]
    if not rivals:
        return rows
    best = min(rivals, key=lambda row: row.ms.median if row.ms else float("inf"))
    return [
        replace(row, speedup=best.ms.median / row.ms.median, rival=best.provider)
        if row.is_ours and row.status == "ok" and row.parity is True and row.ms and best.ms
        else row
        for row in rows
    ]


def is_tie(ratio: float, noise: float) -> bool:
    """Whether a ratio of two times is within the noise, in either direction."""
    return max(ratio, 1 / ratio) - 1 <= noise
