"""Tunes the adaLN kernels (kernels/adaln.py): lanes of a row, rows of a program, warps.

Their keys hold width and tokens but no batch. A backward's rows set the order of its sums, which must not change with
the batch. A forward's rows depend on the batch, and the heuristic chooses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ditfast.config import DiTConfig
from ditfast.kernels import adaln
from ditfast.kernels.configs import tables
from ditfast.kernels.configs.rows import RowConfig, row_config
from ditfast.reference import ops as formulas

from ...testing.operators import OPERATORS, Inputs, Shape, draw_inputs
from ..records.text import count
from . import spaces
from .family import Family, Results, Target, normal

_EPS = 1e-6


@dataclass(frozen=True)
class AdaLNForward(Family[RowConfig]):
    """Gated residual and modulated norm together, run twice in a block; only at ``batch``."""

    batch: int = 64
    operator: str = "adaln_fwd"

    def shapes(self, config: DiTConfig, batch: int) -> list[Shape]:
        return [Shape(self.batch, config.num_tokens, config.hidden_size)]

    def key(self, shape: Shape, dtype: torch.dtype) -> str:
        return tables.table_key(self.operator, dtype, (shape.width,), (shape.tokens,))

    def heuristic(self, shape: Shape, dtype: torch.dtype, target: Target) -> RowConfig:
        without_table = torch.empty(0, dtype=dtype, device="meta")
        return row_config(self.operator, shape.width, shape.tokens, shape.batch, without_table)

    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterator[RowConfig]:
        rows = self.heuristic(shape, dtype, target).rows
        return (RowConfig(*cover, rows, warps) for cover, warps in _covers(shape.width))

    def fields(self, config: RowConfig) -> tables.Fields:
        return {name: value for name, value in config._asdict().items() if name != "rows"}

    def label(self, config: RowConfig) -> str:
        lanes = f"{config.block}+{config.tail}" if config.tail else str(config.block)
        return f"{lanes} lanes, {count(config.rows, 'row')}, {count(config.num_warps, 'warp')}"

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return draw_inputs(OPERATORS["gated_residual_layer_norm_modulate"], shape, dtype, device, seed=seed)

    def call(self, config: RowConfig, inputs: Inputs) -> Any:
        tensors = [inputs[name] for name in ("residual", "branch", "gate", "shift", "scale")]
        return adaln.AdaLNForward(tensors, _EPS, config=config)(*tensors)

    def results(self, config: RowConfig, inputs: Inputs) -> Results:
        r, out, _, _ = self.call(config, inputs)
        return {"r": r, "out": out}

    def formula(self, judged: Inputs) -> Results:
        r, out = formulas.gated_residual_layer_norm_modulate(**judged, eps=_EPS)
        return {"r": r, "out": out}


@dataclass(frozen=True)
class AdaLNBackward(AdaLNForward):
    """Its backward with all outputs of a training block: every gradient, and the norm once more."""

    operator: str = "adaln_bwd"

    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterator[RowConfig]:
        least = self.heuristic(shape, dtype, target).rows
        for rows in spaces.BACKWARD_ROWS:
            if rows <= max(shape.tokens, least):
                yield from (RowConfig(*cover, rows, warps) for cover, warps in _covers(shape.width))

    def fields(self, config: RowConfig) -> tables.Fields:
        return config._asdict()

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = super().draw(shape, dtype, device, seed)
        r = inputs.pop("residual")
        rows = r.float()
        saved = {"mean": rows.mean(-1), "rstd": torch.rsqrt(rows.var(-1, correction=0) + _EPS)}
        incoming = normal((2, *r.shape), r, seed)
        return {"d_r": incoming[0], "d_out": incoming[1], "r": r, **inputs, **saved}

    def call(self, config: RowConfig, inputs: Inputs) -> Any:
        names = ("d_r", "d_out", "r", "branch", "gate", "shift", "scale", "mean", "rstd")
        tensors = [inputs[name] for name in names]
        all_wanted = adaln.Wants(*(True for _ in adaln.Wants._fields))
        return adaln.AdaLNBackward(tensors, all_wanted, config)(*tensors)

    def results(self, config: RowConfig, inputs: Inputs) -> Results:
        d_x, d_branch, out, (d_gate, d_shift, d_scale), d_bias, _ = self.call(config, inputs)
        vectors = {"d_gate": d_gate, "d_shift": d_shift, "d_scale": d_scale, "d_bias": d_bias}
        return {"d_x": d_x, "d_branch": d_branch, "out": out, **vectors}

    def formula(self, judged: Inputs) -> Results:
        r, shift, scale = leaves = [judged[name].detach().requires_grad_() for name in ("r", "shift", "scale")]
        with torch.enable_grad():
            out = formulas.layer_norm_modulate(r, shift, scale, _EPS)
        d_norm, d_shift, d_scale = torch.autograd.grad(out, leaves, judged["d_out"])
        d_x = judged["d_r"] + d_norm
        d_branch = judged["gate"].unsqueeze(1) * d_x
        d_gate, d_bias = (d_x * judged["branch"]).sum(1), d_branch.sum((0, 1))
        vectors = {"d_gate": d_gate, "d_shift": d_shift, "d_scale": d_scale, "d_bias": d_bias}
        return {"d_x": d_x, "d_branch": d_branch, "out": out.detach(), **vectors}


def _covers(width: int) -> Iterator[tuple[tuple[int, int], int]]:
    """((block, tail), warps): a row in one block, or in a block and a tail; the warps fit the block."""
    lower = 1 << (width.bit_length() - 1)
    rest = width - lower
    least, most = spaces.LANE_ELEMENTS
    for cover in [(lower, 1 << (rest - 1).bit_length()), (2 * lower, 0)] if rest else [(lower, 0)]:
        for warps in spaces.WARPS:
            if least <= cover[0] / (32 * warps) <= most:
                yield cover, warps
