"""All adaLN Linears of a model in one launch, their weights read where they lie.

    out[:, columns of i] = c W_i^T + b_i

c (M, K); W_i (N_i, K), b_i (N_i,); out (M, sum of N_i). K and every N_i are positive multiples of 8. The
table of addresses is the launch's own arguments, so nothing holds it between two calls, and a captured graph has its
own. A program selects its layer's addresses in scalar registers; the compiler knows of the selected ones what it knows
of all (alignment). Weights are converted to DTYPE in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs.gemm import GemmConfig, modulations_config, uses_tf32
from .launch import interpreting, on_device

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


class _Launch(NamedTuple):
    """Some Linears: which, their columns together, their tiles, and their packed widths."""

    part: slice
    columns: int
    tiles: int
    widths: int


@lru_cache(maxsize=256)
def _launches(widths: tuple[int, ...], block_n: int, most: int, most_tiles: int) -> list[_Launch]:
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
    launches = []
    for group in groups:
        part = slice(group[0], group[-1] + 1)
        columns = widths[part]
        blocks = sum(triton.cdiv(width, block_n) for width in columns)
        launches.append(_Launch(part, sum(columns), blocks, packed(columns)))
    return launches


def modulations(
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dtype: torch.dtype,
    config: GemmConfig | None = None,
) -> Tensor:
    """c W_i^T + b_i side by side (M, sum of N_i), computed and returned in ``dtype``: a launch for each MOST of them.

    c (M, K), the weights and the biases (or none) are each of one dtype; what is not contiguous is copied.
    """
    rows, inner = c.shape
    widths = tuple(weight.shape[0] for weight in weights)
    columns = sum(widths)
    out = c.new_empty((rows, columns), dtype=dtype)
    if not out.numel():
        return out
    config = config or modulations_config(rows, columns, inner, c, dtype, weights[0].dtype, True)
    c = c if c.stride(-1) == 1 else c.contiguous()
    weights, biases = (tuple(x if x.is_contiguous() else x.contiguous() for x in group) for group in (weights, biases))
    constants: dict[str, Any] = {
        "DTYPE": _TRITON[dtype],
        "PRECISION": "tf32" if dtype == torch.float32 and uses_tf32() else "ieee",
        "UPCAST": dtype == torch.bfloat16 and interpreting(),
        "EVEN_K": inner % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.max_registers:
        constants["maxnreg"] = config.max_registers
    place = 0
    with on_device(c):
        for launch in _launches(widths, config.block_n, MOST, _MOST_TILES):
            _modulations_kernel[(triton.cdiv(rows, config.block_m), launch.tiles)](
                c, weights[launch.part], biases[launch.part] or None, out[:, place:] if place else out,
                rows, inner, c.stride(0), columns,
                WIDTHS=launch.widths, **constants,
            )  # fmt: skip
            place += launch.columns
    return out
