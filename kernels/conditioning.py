"""Conditioning kernels, for inference: the timestep sinusoid, and SiLU of the summed embeddings.

    sinusoid[b] = [cos(t_b w), sin(t_b w)],  w_i = max_period ** (-i / (half - freq_shift)),  i < half
    c[b] = silu(t_emb[b] + table[y_b])

t, y: (B,); sinusoid: (B, 2 * half); t_emb: (B, D); table: (rows, D), last axes contiguous. Each takes the place of
a handful of launches on (B, D) tensors. The sinusoid is computed in fp64: its argument reaches 999, where fp32
values are 6e-5 apart. A label outside the table gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, empty_like

_BLOCK = 256


@triton.jit
def _sinusoid_kernel(t_ptr, out_ptr, STEP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    mask = index < HALF
    # STEP is a constexpr because a run-time float would arrive in fp32
    turns = tl.load(t_ptr + row).to(tl.float64) * tl.exp2(index.to(tl.float64) * STEP) * 0.15915494309189535
    # a quarter of the angle, reduced to [-pi/4, pi/4]: Taylor to 1e-10, then doubled twice (libdevice's sine
    # brings a slow path with local memory for huge arguments)
    x = (turns - tl.floor(turns + 0.5)) * 1.5707963267948966
    xx = x * x
    sine = x * (1 + xx * (-1 / 6 + xx * (1 / 120 + xx * (-1 / 5040 + xx * (1 / 362880 - xx / 39916800)))))
    cosine = 1 + xx * (-1 / 2 + xx * (1 / 24 + xx * (-1 / 720 + xx * (1 / 40320 - xx / 3628800))))
    for _ in tl.static_range(2):
        sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
    # through fp32: the interpreter has no cast from fp64 to bf16
    out_row = out_ptr + row * 2 * HALF + index
    tl.store(out_row, cosine.to(tl.float32).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_row + HALF, sine.to(tl.float32).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["labels"])
def _conditioning_kernel(
    t_emb_ptr, y_ptr, table_ptr, out_ptr, labels, stride_t_emb, stride_table, D: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    label = tl.load(y_ptr + row).to(tl.int64)
    known = (label >= 0) & (label < labels)
    c = tl.load(t_emb_ptr + row * stride_t_emb + cols, mask=mask, other=0.0).to(tl.float32)
    c += tl.load(table_ptr + label * stride_table + cols, mask=mask & known, other=float("nan")).to(tl.float32)
    tl.store(out_ptr + row * D + cols, (c / (1.0 + tl.exp(-c))).to(out_ptr.dtype.element_ty), mask=mask)


class TimestepEmbedding:
    """t (B,) -> (B, dim) in ``dtype``."""

    def __init__(
        self, tensors: Sequence[Tensor], dim: int, freq_shift: float, dtype: torch.dtype, max_period: float = 10000.0
    ) -> None:
        """tensors: (t,)."""
        [t] = tensors
        self._shape, self._dtype = (t.shape[0], dim), dtype
        half = dim // 2
        step = -math.log2(max_period) / (half - freq_shift)
        rest = step, half, triton.next_power_of_2(half)
        self._launch = Launch(t, _sinusoid_kernel, (t.shape[0],), rest, num_warps=4)

    def __call__(self, t: Tensor) -> Tensor:
        out = t.new_empty(self._shape, dtype=self._dtype)
        if t.numel():
            self._launch(t.contiguous(), out)
        return out


class Conditioning:
    """silu(t_emb + table[y]) (B, D), in the wider of the two dtypes."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: (t_emb, y, table)."""
        t_emb, _, table = tensors
        batch, width = t_emb.shape
        self._dtype = torch.promote_types(t_emb.dtype, table.dtype)
        strides = (x.stride(0) if x.stride(1) == 1 else width for x in (t_emb, table))
        rest = table.shape[0], *strides, width, _BLOCK
        self._launch = Launch(t_emb, _conditioning_kernel, (batch, triton.cdiv(width, _BLOCK)), rest, num_warps=1)

    def __call__(self, t_emb: Tensor, y: Tensor, table: Tensor) -> Tensor:
        out = empty_like(t_emb, self._dtype)
        t_emb, table = (x if x.stride(1) == 1 else x.contiguous() for x in (t_emb, table))
        if out.numel():
            self._launch(t_emb, y.contiguous(), table, out)
        return out
