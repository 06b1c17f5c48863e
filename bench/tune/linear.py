"""Tunes the GEMMs with an epilogue (kernels/configs/gemm.py): the library's kernels, or the tiles of Triton's.

A matrix that is too large for an fp64 oracle is judged on its first and last rows. The operator runs on the whole
matrix, so the judged launch is the timed one. Each output row depends only on the same row of the input, and the
partial sums of a tile only on the tile's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditfast.config import DiTConfig
from ditfast.kernels.configs import gemm, tables
from ditfast.kernels.configs.gemm import GemmConfig, sum_rows
from ditfast.ops import gemm as linears
from ditfast.ops.modulations import modulations_plan, split

from ...testing.operators import OPERATORS, Inputs, Shape, draw_inputs, parameters
from ..cases.precision import float32_precision
from ..records.text import count
from . import spaces
from .family import Family, Results, Target, normal

_END_ROWS = 4096  # judged at either end; a multiple of every tile's rows


class _Gemm(Family[GemmConfig]):
    """(rows, inner) by (inner, columns). A shape's ``ratio`` is the Linear's longer side over the width."""

    def sizes(self, shape: Shape) -> tuple[int, int, int]:
        """(rows, columns, inner): of the Linear that widens."""
        return shape.batch * shape.tokens, shape.ratio * shape.width, shape.width

    def shapes(self, config: DiTConfig, batch: int) -> list[Shape]:
        ratio = config.mlp_hidden_size // config.hidden_size
        return [Shape(batch, config.num_tokens, config.hidden_size, ratio=ratio)]

    def key(self, shape: Shape, dtype: torch.dtype) -> str:
        rows, columns, inner = self.sizes(shape)
        return tables.table_key(self.operator, dtype, (columns, inner), (rows,))

    def describe(self, shape: Shape) -> str:
        return "M={} N={} K={}".format(*self.sizes(shape))

    def heuristic(self, shape: Shape, dtype: torch.dtype, target: Target) -> GemmConfig:
        gpu = (target.major, target.multiprocessors)
        return gemm.heuristic(self.operator, *self.sizes(shape), dtype, *gpu, tf32=dtype == torch.float32)

    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterator[GemmConfig]:
        heuristic = self.heuristic(shape, dtype, target)
        names: Any = tables.OPERATORS[self.operator][0]
        yield from (heuristic._replace(candidate=name) for name in names)
        rows, columns, _ = self.sizes(shape)
        for tile in spaces.HOPPER if target.major in (9, 10) else spaces.PORTABLE:
            if tile.block_m < 2 * max(rows, 64) and tile.block_n < 2 * max(columns, 64):
                yield tile._replace(block_k=tile.block_k * 2 // dtype.itemsize)

    def fields(self, config: GemmConfig) -> tables.Fields:
        return config._asdict() if config.candidate == "triton" else {"candidate": config.candidate}

    def label(self, config: GemmConfig) -> str:
        if config.candidate != "triton":
            return config.candidate
        tile = f"{'TMA ' if config.tma else ''}{config.block_m}x{config.block_n}x{config.block_k}"
        tile += f" {config.tma} a multiprocessor" if config.tma > 1 else ""
        parts = f"{count(config.parts, 'part')}, groups of {config.group_m}"
        registers = f", {config.max_registers} registers" if config.max_registers else ""
        return f"{tile}, {config.num_warps} warps, {config.num_stages} stages, {parts}{registers}"

    def conditions(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        # in fp32 the tables are looked up under TF32 alone
        return float32_precision("high") if dtype == torch.float32 else nullcontext()


@dataclass(frozen=True)
class LinearGelu(_Gemm):
    """gelu_tanh(x W^T + b), in training with the pre-activation saved."""

    operator: str = "linear_gelu"
    save: bool = False

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = draw_inputs(OPERATORS["linear_gelu"], shape, dtype, device, seed=seed)
        return {**inputs, "x": inputs["x"].flatten(0, 1)}

    def call(self, config: GemmConfig, inputs: Inputs) -> Any:
        tensors = [inputs[name] for name in ("x", "weight", "bias")]
        return linears.linear_gelu_plan(tensors, self.save, config=config)(*tensors)

    def results(self, config: GemmConfig, inputs: Inputs) -> Results:
        out, pre = self.call(config, inputs)
        return {"out": ends(out), **({"pre": ends(pre)} if self.save else {})}

    def judged(self, inputs: Inputs) -> Inputs:
        return {**inputs, "x": ends(inputs["x"])}

    def formula(self, judged: Inputs) -> Results:
        pre = F.linear(judged["x"], judged["weight"], judged["bias"])
        return {"out": F.gelu(pre, approximate="tanh"), **({"pre": pre} if self.save else {})}


@dataclass(frozen=True)
class LinearGatedResidual(_Gemm):
    """residual + gate * (x W^T + b), with the branch saved if its gate learns."""

    operator: str = "linear_gated_residual"
    save: bool = False

    def sizes(self, shape: Shape) -> tuple[int, int, int]:
        return shape.batch * shape.tokens, shape.width, shape.ratio * shape.width

    def shapes(self, config: DiTConfig, batch: int) -> list[Shape]:
        """The MLP's second Linear and attention's projection."""
        [shape] = super().shapes(config, batch)
        return [shape, Shape(batch, shape.tokens, shape.width, ratio=1)]

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = draw_inputs(OPERATORS["linear_gated_residual"], shape, dtype, device, seed=seed)
        return {**inputs, "x": inputs["x"].flatten(0, 1)}

    def call(self, config: GemmConfig, inputs: Inputs) -> Any:
        tensors = [inputs[name] for name in ("x", "weight", "bias", "gate", "residual")]
        return linears.linear_gated_residual_plan(tensors, self.save, config=config)(*tensors)

    def results(self, config: GemmConfig, inputs: Inputs) -> Results:
        out, branch = self.call(config, inputs)
        return {"out": ends(out.flatten(0, 1)), **({"branch": ends(branch)} if self.save else {})}

    def judged(self, inputs: Inputs) -> Inputs:
        gate = inputs["gate"].repeat_interleave(inputs["residual"].shape[1], 0)
        residual = inputs["residual"].flatten(0, 1)
        return {**inputs, "x": ends(inputs["x"]), "gate": ends(gate), "residual": ends(residual)}

    def formula(self, judged: Inputs) -> Results:
        branch = F.linear(judged["x"], judged["weight"], judged["bias"])
        out = judged["residual"] + judged["gate"] * branch
        return {"out": out, **({"branch": branch} if self.save else {})}


@dataclass(frozen=True)
class LinearGeluBackward(_Gemm):
    """(d_out W) * gelu_tanh'(pre), the activation once more, and the bias gradient's partial sums."""

    operator: str = "linear_gelu_backward"

    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterator[GemmConfig]:
        rows = sum_rows(shape.batch * shape.tokens, dtype)  # of a partial sum: no matter of tuning
        return (config for config in super().space(shape, dtype, target) if config.block_m == rows)

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = draw_inputs(OPERATORS["linear_gelu"], shape, dtype, device, seed=seed)
        rows, columns, _ = self.sizes(shape)
        d_out = inputs["x"].flatten(0, 1)
        # of the Linear after the GELU, (K, N)
        weight = inputs["weight"].t().contiguous()
        return {"d_out": d_out, "weight": weight, "pre": normal((rows, columns), d_out, seed)}

    def call(self, config: GemmConfig, inputs: Inputs) -> Any:
        tensors = [inputs[name] for name in ("d_out", "weight", "pre")]
        return linears.linear_gelu_backward_plan(tensors, True, config=config)(*tensors)

    def results(self, config: GemmConfig, inputs: Inputs) -> Results:
        d_pre, act, partial = self.call(config, inputs)
        sums = ends(partial[0], len(d_pre), sum_rows(len(d_pre), d_pre.dtype)).sum(0)
        return {"d_pre": ends(d_pre), "act": ends(act), "d_bias": sums.to(d_pre.dtype)}

    def judged(self, inputs: Inputs) -> Inputs:
        return {"d_out": ends(inputs["d_out"]), "weight": inputs["weight"], "pre": ends(inputs["pre"])}

    def formula(self, judged: Inputs) -> Results:
        pre = judged["pre"].detach().requires_grad_()
        with torch.enable_grad():
            act = F.gelu(pre, approximate="tanh")
        (d_pre,) = torch.autograd.grad(act, pre, judged["d_out"] @ judged["weight"])
        return {"d_pre": d_pre, "act": act.detach(), "d_bias": d_pre.sum(0)}


@dataclass(frozen=True)
class Modulations(_Gemm):
    """c W_i^T + b_i of all adaLN Linears."""

    operator: str = "modulations"

    def sizes(self, shape: Shape) -> tuple[int, int, int]:
        return shape.batch, (6 * (shape.layers - 1) + 2) * shape.width, shape.width

    def shapes(self, config: DiTConfig, batch: int) -> list[Shape]:
        return [Shape(batch, 1, config.hidden_size, layers=config.depth + 1)]

    def heuristic(self, shape: Shape, dtype: torch.dtype, target: Target) -> GemmConfig:
        tf32 = dtype == torch.float32
        return gemm.modulations_heuristic(shape.batch, dtype, dtype, target.major, tf32=tf32)

    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterator[GemmConfig]:
        heuristic = self.heuristic(shape, dtype, target)
        names: Any = tables.OPERATORS[self.operator][0]
        yield from (heuristic._replace(candidate=name) for name in names)
        for tile in spaces.MODULATIONS:
            if tile.block_m < 2 * max(shape.batch, 16):
                yield tile._replace(block_k=tile.block_k * 2 // dtype.itemsize)

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return draw_inputs(OPERATORS["modulations"], shape, dtype, device, seed=seed)

    def call(self, config: GemmConfig, inputs: Inputs) -> Any:
        c, (weights, biases) = inputs["c"], parameters(inputs)
        return modulations_plan((c, *weights, *biases), len(weights), c.dtype, config=config)(c, weights, biases)

    def results(self, config: GemmConfig, inputs: Inputs) -> Results:
        return _by_layer(split(self.call(config, inputs), parameters(inputs)[0]))

    def formula(self, judged: Inputs) -> Results:
        return _by_layer(OPERATORS["modulations"].formula(**judged))


def _by_layer(parts: Iterable[Tensor]) -> Results:
    return {f"layer {index}": part for index, part in enumerate(parts)}


def ends(x: Tensor, rows: int | None = None, tile: int = 1) -> Tensor:
    """The first and the last _END_ROWS rows of a matrix; all rows of a small one, or of one with a ragged last tile.

    Args:
        rows: of the matrix, if ``x`` has one row for each ``tile`` of them.
    """
    rows = len(x) if rows is None else rows
    if rows <= 2 * _END_ROWS or rows % 128:
        return x
    count = _END_ROWS // tile
    return torch.cat([x[:count], x[-count:]])
