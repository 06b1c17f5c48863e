"""Tunes attention: the tiles of this project's kernels (kernels/attention.py), then the choice of the implementation.

Keys hold the head dim and the tokens, no batch: a sample's results must not change with its neighbours. Tiles come
first in the plan, and the choice uses them. Parity of a large batch is judged on its first and last samples, of a
launch over the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ditfast.config import DiTConfig
from ditfast.kernels import attention as forward_kernels
from ditfast.kernels import attention_bwd as backward_kernels
from ditfast.kernels.configs import tables
from ditfast.ops import attention_implementations as backends
from ditfast.ops.attention_implementations import AttentionBackend
from ditfast.reference import ops as formulas

from ...kernels.configs.attention import AttentionConfig, attention_config, fitted, launch_config, sum_slots
from ...ops import attention_implementations as choice
from ...ops.attention import attention
from ...testing.operators import Inputs, Shape
from ..cases.precision import float32_precision
from . import spaces
from .family import C, Family, Results, Target, normal

_END_SAMPLES = 4  # judged at either end


@dataclass(frozen=True)
class _Attention(Family[C]):
    """On the packed projection (B, T, 3, H, head_dim) without a bias; only at ``batch``."""

    operator: str = ""
    batch: int = 64

    def shapes(self, config: DiTConfig, batch: int) -> list[Shape]:
        return [Shape(self.batch, config.num_tokens, config.hidden_size, num_heads=config.num_heads)]

    def key(self, shape: Shape, dtype: torch.dtype) -> str:
        return tables.table_key(self.operator, dtype, (_head_dim(shape),), (shape.tokens,))

    def describe(self, shape: Shape) -> str:
        return f"B={shape.batch} T={shape.tokens} H={shape.num_heads} head_dim={_head_dim(shape)}"

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        like = torch.empty(0, dtype=dtype, device=device)
        sizes = (shape.batch, shape.tokens, 3, shape.num_heads, _head_dim(shape))
        return {"qkv": normal(sizes, like, seed)}

    def judged(self, inputs: Inputs) -> Inputs:
        return {name: ends(inputs[name]) for name in ("qkv", "d_out") if name in inputs}

    def formula(self, judged: Inputs) -> Results:
        qkv = judged["qkv"].flatten(2).detach()
        if "d_out" not in judged:
            return {"out": formulas.self_attention(qkv, judged["qkv"].shape[3])}
        qkv.requires_grad_()
        with torch.enable_grad():
            out = formulas.self_attention(qkv, judged["qkv"].shape[3])
        (d_qkv,) = torch.autograd.grad(out, qkv, judged["d_out"])
        return {"out": out.detach(), "d_qkv": d_qkv}

    def conditions(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        # in fp32 the tables are looked up under TF32 alone
        return float32_precision("high") if dtype == torch.float32 else nullcontext()


@dataclass(frozen=True)
class AttentionForward(_Attention[AttentionConfig]):
    """The forward kernel's tiles."""

    operator: str = "attention_fwd"

    def heuristic(self, shape: Shape, dtype: torch.dtype, target: Target) -> AttentionConfig:
        return attention_config(self.operator, _head_dim(shape), shape.tokens, dtype, (target.major, 0))

    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterator[AttentionConfig]:
        for tile in spaces.ATTENTION[self.operator]:
            yield fitted(tile, _head_dim(shape), shape.tokens)

    def fields(self, config: AttentionConfig) -> tables.Fields:
        return config._asdict()

    def label(self, config: AttentionConfig) -> str:
        return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"

    def call(self, config: AttentionConfig, inputs: Inputs) -> Any:
        return _forward(inputs["qkv"], False, config)

    def results(self, config: AttentionConfig, inputs: Inputs) -> Results:
        return {"out": ends(self.call(config, inputs)[0])}


@dataclass(frozen=True)
class AttentionBackward(AttentionForward):
    """The tiles of one of the backward's two launches, timed together with the other as currently configured."""

    operator: str = "attention_dq"

    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterator[AttentionConfig]:
        slots = sum_slots(shape.tokens, _head_dim(shape), dtype, False)
        return (tile for tile in super().space(shape, dtype, target) if -(-shape.tokens // tile.block_m) <= slots)

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        qkv = super().draw(shape, dtype, device, seed)["qkv"]
        out, stats = _forward(qkv, True)
        return {"qkv": qkv, "out": out, "stats": stats, "d_out": normal(tuple(out.shape), out, -seed)}

    def call(self, config: AttentionConfig, inputs: Inputs) -> Any:
        qkv = inputs["qkv"]
        num_heads, head_dim = qkv.shape[3:]
        operators = backward_kernels.OPERATORS
        configs = [config if name == self.operator else launch_config(name, qkv, False) for name in operators]
        tensors = inputs["d_out"], qkv.flatten(2), inputs["out"], inputs["stats"], None
        constants = num_heads, head_dim**-0.5, False, True, configs
        return backward_kernels.AttentionBackward(tensors, *constants)(*tensors)

    def results(self, config: AttentionConfig, inputs: Inputs) -> Results:
        d_qkv, _, sums = self.call(config, inputs)
        sums = ends(sums.unflatten(0, (len(d_qkv), -1)))
        return {"d_qkv": ends(d_qkv), "d_bias": sums.sum((0, 1)).to(d_qkv.dtype)}

    def formula(self, judged: Inputs) -> Results:
        d_qkv = super().formula(judged)["d_qkv"]
        return {"d_qkv": d_qkv, "d_bias": d_qkv.sum((0, 1))}


class Choice(NamedTuple):
    candidate: AttentionBackend


@dataclass(frozen=True)
class AttentionChoice(_Attention[Choice]):
    """The implementation: of the forward alone, or with a backward whose gradients are the same in every run."""

    operator: str = "attention_inference"

    @property
    def training(self) -> bool:
        return self.operator == "attention_training"

    def heuristic(self, shape: Shape, dtype: torch.dtype, target: Target) -> Choice:
        case = choice.Case(shape.tokens, _head_dim(shape), dtype, False, self.training)
        return Choice(choice.heuristic(case, target.major, lambda name: self._fits(name, shape, dtype, target)))

    def space(self, shape: Shape, dtype: torch.dtype, target: Target) -> Iterator[Choice]:
        return (Choice(name) for name in get_args(AttentionBackend) if self._fits(name, shape, dtype, target))

    def _fits(self, name: AttentionBackend, shape: Shape, dtype: torch.dtype, target: Target) -> bool:
        """Whether an implementation is available and takes the shape; without a GPU, if its package is installed."""
        if name == "triton":
            return _head_dim(shape) <= choice.MAX_HEAD_DIM
        if backends.case_reason(name, _head_dim(shape), dtype, False, self.training, target.major) is not None:
            return False
        if torch.cuda.is_available():
            return backends.machine_reason(name, torch.cuda.current_device()) is None
        return name not in backends.PACKAGES

    def fields(self, config: Choice) -> tables.Fields:
        return config._asdict()

    def label(self, config: Choice) -> str:
        return config.candidate

    def draw(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = super().draw(shape, dtype, device, seed)
        if self.training:
            inputs["d_out"] = normal((shape.batch, shape.tokens, shape.width), inputs["qkv"], -seed)
        return inputs

    def call(self, config: Choice, inputs: Inputs) -> tuple[Tensor, ...]:
        qkv, num_heads = inputs["qkv"].flatten(2), inputs["qkv"].shape[3]
        if not self.training:
            return (_run(config.candidate, qkv, num_heads),)
        qkv.requires_grad_()
        with torch.enable_grad():
            out = _run(config.candidate, qkv, num_heads)
            return out.detach(), *torch.autograd.grad(out, qkv, inputs["d_out"])

    def results(self, config: Choice, inputs: Inputs) -> Results:
        tensors = self.call(config, inputs)
        for _ in range(2):
            if not all(map(torch.equal, self.call(config, inputs), tensors)):
                raise RuntimeError("two runs differ, and a choice is deterministic")
        return {name: ends(tensor) for name, tensor in zip(("out", "d_qkv"), tensors, strict=False)}


def _run(backend: AttentionBackend, qkv: Tensor, num_heads: int) -> Tensor:
    if backend == "triton":
        return attention(qkv, None, num_heads, (qkv.shape[2] // (3 * num_heads)) ** -0.5)
    return backends.run_library(backend, qkv, num_heads, None, None, alone=True)


def _forward(qkv: Tensor, save: bool, config: AttentionConfig | None = None) -> Any:
    """(out, stats) of a projection with five axes."""
    num_heads, head_dim = qkv.shape[3:]
    tensors = qkv.flatten(2), None
    return forward_kernels.AttentionForward(tensors, num_heads, head_dim**-0.5, save, config)(*tensors)


def _head_dim(shape: Shape) -> int:
    return shape.width // shape.num_heads


def ends(x: Tensor) -> Tensor:
    """The first and the last _END_SAMPLES samples; all samples of a small batch."""
    return x if len(x) <= 2 * _END_SAMPLES else torch.cat([x[:_END_SAMPLES], x[-_END_SAMPLES:]])
