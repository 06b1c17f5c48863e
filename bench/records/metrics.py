"""The derived columns: images/s, TFLOP/s, share of the measured ceilings, speed-up over the best rival."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from ditfast import reference
from ditfast.config import DiTConfig

from ..cases.case import Mode, is_training
from ..measure.ceilings import Ceilings
from .rows import ModelRow, OpRow, OwnRow, SampleRow

Timed = TypeVar("Timed", ModelRow, OpRow, OwnRow, SampleRow)


@lru_cache(maxsize=64)
def flops_per_image(config: DiTConfig, mode: Mode) -> int:
    """FLOPs of the reference for one image, 2 for a multiply-accumulate; counted on the meta device.

    cfg runs two samples an image; training counts the forward and the backward, neither the optimiser nor what
    activation checkpointing computes twice.
    The count is the reference's for every provider, so that work a provider saves shows as speed.
    """
    with torch.device("meta"):
        model = reference.DiT(config).eval()
        x = torch.empty(1, config.in_channels, *config.latent_hw)
        index = torch.zeros(1, dtype=torch.int64)
    training = is_training(mode)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        output = model(x, index, index)
        if training:
            output.sum().backward()
    return int(counter.get_total_flops()) * (2 if mode == "cfg" else 1)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights a call has to read: all but the label table, of which it reads a few rows."""
    return sum(p.nbytes for name, p in model.named_parameters() if "embedding_table" not in name)


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
