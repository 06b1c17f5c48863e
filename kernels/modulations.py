"""All adaLN Linears of a model in one launch, their weights read where they lie.

    out[:, columns of i] = c W_i^T + b_i

c (M, K); W_i (N_i, K), b_i (N_i,); out (M, sum of N_i). K and every N_i are positive multiples of 8. The
table of addresses is the launch's own arguments, so nothing holds it between two calls, and a captured graph has its
own. A program selects its layer's addresses in scalar registers; the compiler knows of the selected ones what it knows
of all (alignment). Weights are converted to DTYPE in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs.gemm import GemmConfig, modulations_config
from .launch import Launch, interpreting, uses_tf32

MOST = 64  # Linears of a launch: each is an argument of it, and a selection in every program
_MOST_TILES = 65535  # of a grid's second axis
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _selected(candidates, index):
    """candidates[index], of an index known only when run."""
    chosen = candidates[0]
    for i in tl.static_range(1, len(candidates)):
        chosen = tl.where(index == i, candidates[i], chosen)
    return chosen


@triton.jit(do_not_specialize=["M"])
def _modulations_kernel(
    c_ptr, weights, biases, out_ptr, M, K, stride_c, stride_out,
    WIDTHS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # the row tiles of one column tile follow each other, so that they share its weights in L2
    tile = tl.program_id(1)
    layer, first, place, width = 0, 0, 0, 0
    tiles, columns = 0, 0  # of the layers before
    for i in tl.static_range(len(weights)):
        here = tile >= tiles
        layer = tl.where(here, i, layer)
        first = tl.where(here, tiles, first)
        place = tl.where(here, columns, place)
        width = tl.where(here, WIDTHS >> (32 * i) & 0xFFFFFFFF, width)
        tiles += ((WIDTHS >> (32 * i) & 0xFFFFFFFF) + BLOCK_N - 1) // BLOCK_N
        columns += WIDTHS >> (32 * i) & 0xFFFFFFFF
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_k = (tile - first) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < width)[None, :]
    c_ptrs = c_ptr + offs_m.to(tl.int64)[:, None] * stride_c + offs_k[None, :]
    weight_ptrs = _selected(weights, layer) + offs_n.to(tl.int64)[None, :] * K + offs_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(c_ptrs, mask=mask_m, other=0.0)
            b = tl.load(weight_ptrs, mask=mask_n, other=0.0)
        else:
            a = tl.load(c_ptrs, mask=mask_m & (offs_k < K - k)[None, :], other=0.0)
            b = tl.load(weight_ptrs, mask=mask_n & (offs_k < K - k)[:, None], other=0.0)
        a, b = a.to(DTYPE), b.to(DTYPE)
        if UPCAST:  # the interpreter multiplies the bits of bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        c_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if biases is not None:
        bias = tl.load(_selected(biases, layer) + offs_n, mask=offs_n < width, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_out + (place + offs_n)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m & mask_n)


def packed(widths: Sequence[int]) -> int:
    """32 bits each, the first lowest: as a tuple of them a kernel compiled ahead would have another key in Triton's
    cache, for it is carried as JSON."""
    return sum(width << (32 * index) for index, width in enumerate(widths))


class _Part(NamedTuple):
    """Some Linears: which, their columns together, their tiles, and their packed widths."""

    part: slice
    columns: int
    tiles: int
    widths: int


def _parts(widths: Sequence[int], block_n: int, most: int, most_tiles: int) -> list[_Part]:
    """All, in launches of at most so many, and so many tiles."""
    groups: list[list[int]] = [[]]
    tiles = 0
    for index, width in enumerate(widths):
        count = triton.cdiv(width, block_n)
        if len(groups[-1]) == most or (groups[-1] and tiles + count > most_tiles):
            groups.append([])
            tiles = 0
        groups[-1].append(index)
        tiles += count
    parts = []
    for group in groups:
        part = slice(group[0], group[-1] + 1)
        columns = widths[part]
        blocks = sum(triton.cdiv(width, block_n) for width in columns)
        parts.append(_Part(part, sum(columns), blocks, packed(columns)))
    return parts


class Modulations:
    """c W_i^T + b_i side by side (M, sum of N_i), computed and returned in ``dtype``: a launch for each MOST of them.

    c (M, K), the weights and the biases (or none) are each of one dtype; what is not contiguous is copied.
    """

    def __init__(
        self,
        c: Tensor,
        widths: Sequence[int],
        stored: torch.dtype,
        dtype: torch.dtype,
        config: GemmConfig | None = None,
    ) -> None:
        """widths, stored: the rows of the weights and the dtype that they are stored in."""
        rows, inner = c.shape
        columns = sum(widths)
        self._shape, self._dtype = (rows, columns), dtype
        config = config or modulations_config(rows, columns, inner, c, dtype, stored, True)
        constants = (
            _TRITON[dtype], "tf32" if uses_tf32(dtype) else "ieee", dtype == torch.bfloat16 and interpreting(),
            inner % config.block_k == 0, config.block_m, config.block_n, config.block_k,
        )  # fmt: skip
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if config.max_registers:
            options["maxnreg"] = config.max_registers
        stride = c.stride(0) if c.stride(-1) == 1 else inner
        self._launches = []
        place = 0
        for part in _parts(widths, config.block_n, MOST, _MOST_TILES):
            grid = triton.cdiv(rows, config.block_m), part.tiles
            rest = rows, inner, stride, columns, part.widths, *constants
            launch = Launch(c, _modulations_kernel, grid, rest, **options)
            self._launches.append((launch, part.part, place))
            place += part.columns

    def __call__(self, c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        out = c.new_empty(self._shape, dtype=self._dtype)
        if not out.numel():
            return out
        c = c if c.stride(-1) == 1 else c.contiguous()
        weights, biases = (tuple([x.contiguous() for x in group]) for group in (weights, biases))
        for launch, part, place in self._launches:
            launch(c, weights[part], biases[part] or None, out[:, place:] if place else out)
        return out
