"""The second stage of every sum over rows: partial sums added up in a fixed order, several groups in one launch.

    out[s, w] = sum_r partial[s, r, w]

partial (S, R, W) contiguous in fp32, out (S, W). Gradients of modulations have many short groups (S = samples,
R = slabs of rows), those of biases one long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

MAX_GROUPS = 4
_SHALLOW, _DEEP = (16, 128), (128, 16)  # rows and columns of a block: a long group needs more programs
_DEEP_ROWS = 64


@triton.jit
def _sum_group(partial_ptr, out_ptr, program, rows, width, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK_W)
    segment = (program // blocks).to(tl.int64)
    cols = (program % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_W], tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (cols < width)[None, :]
        offsets = (segment * rows + row)[:, None] * width + cols[None, :]
        total += tl.sum(tl.load(partial_ptr + offsets, mask=mask, other=0.0), axis=0)
    tl.store(out_ptr + segment * width + cols, total.to(out_ptr.dtype.element_ty), mask=cols < width)


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2", "rows3", "end0", "end1", "end2"])
def _sum_kernel(
    partial0_ptr, out0_ptr, partial1_ptr, out1_ptr, partial2_ptr, out2_ptr, partial3_ptr, out3_ptr,
    rows0, width0, rows1, width1, rows2, width2, rows3, width3,
    end0, end1, end2,
    R0: tl.constexpr, W0: tl.constexpr, R1: tl.constexpr, W1: tl.constexpr,
    R2: tl.constexpr, W2: tl.constexpr, R3: tl.constexpr, W3: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < end0:
        _sum_group(partial0_ptr, out0_ptr, program, rows0, width0, R0, W0)
    if partial1_ptr is not None:  # noqa: SIM102 (known when compiled; whose turn it is, when run)
        if (program >= end0) & (program < end1):
            _sum_group(partial1_ptr, out1_ptr, program - end0, rows1, width1, R1, W1)
    if partial2_ptr is not None:  # noqa: SIM102
        if (program >= end1) & (program < end2):
            _sum_group(partial2_ptr, out2_ptr, program - end1, rows2, width2, R2, W2)
    if partial3_ptr is not None:  # noqa: SIM102
        if program >= end2:
            _sum_group(partial3_ptr, out3_ptr, program - end2, rows3, width3, R3, W3)


class SumPartials:
    """One launch: each (S, R, W) in fp32 -> (S, W) in ``dtype``; at most MAX_GROUPS of them."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        """tensors: the partial sums."""
        shapes = [tuple(x.shape) for x in tensors]
        self._shapes = [(segments, width) for segments, _, width in shapes]
        self._dtype = dtype
        sizes, ends, blocks, end = [], [], [], 0
        for segments, rows, width in [*shapes, *[(0, 0, 0)] * (MAX_GROUPS - len(shapes))]:
            block_r, block_w = (1, 1) if not width else _DEEP if rows > _DEEP_ROWS else _SHALLOW
            end += segments * triton.cdiv(width, block_w)
            ends.append(end)
            sizes += [rows, width]
            blocks += [block_r, block_w]
        self._absent = (None, None) * (MAX_GROUPS - len(shapes))
        rest = *sizes, *ends[:-1], *blocks
        self._launch = Launch(tensors[0], _sum_kernel, (end,), rest, num_warps=4) if end else None

    def __call__(self, *partials: Tensor) -> list[Tensor]:
        outs = [x.new_empty(shape, dtype=self._dtype) for x, shape in zip(partials, self._shapes, strict=True)]
        if self._launch is not None:
            self._launch(*chain.from_iterable(zip(partials, outs, strict=True)), *self._absent)
        return outs
