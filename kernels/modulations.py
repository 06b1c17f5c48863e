"""All adaLN Linears of a model in one launch, their weights read where they lie.

    out[:, columns of i] = c W_i^T + b_i

c (M, K); W_i (N_i, K), b_i (N_i,); out (M, sum of N_i). K and every N_i are positive multiples of 8. The
table of addresses is the launch's own arguments, so nothing holds it between two calls, and a captured graph has its
own. A program selects its layer's addresses in scalar registers; the compiler knows of the selected ones what it knows
of all (alignment). Weights are converted to DTYPE in registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm_config import GemmConfig, modulations_config, uses_tf32
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


def _launches(tiles: list[int]) -> Iterator[tuple[slice, int]]:
    """(the Linears of each launch, their tiles together) of the tiles of each Linear."""
    first, total = 0, 0
    for index, count in enumerate(tiles):
        if index - first == MOST or total + count > _MOST_TILES:
            yield slice(first, index), total
            first, total = index, 0
        total += count
    yield slice(first, len(tiles)), total


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
    widths = [len(weight) for weight in weights]
    out = c.new_empty((rows, sum(widths)), dtype=dtype)
    if not out.numel():
        return out
    config = config or modulations_config(rows, sum(widths), inner, c, dtype, weights[0].dtype, True)
    c = c if c.stride(-1) == 1 else c.contiguous()
    place = 0
    with on_device(c):
        for part, tiles in _launches([triton.cdiv(width, config.block_n) for width in widths]):
            _modulations_kernel[(triton.cdiv(rows, config.block_m), tiles)](
                c,
                tuple(weight.contiguous() for weight in weights[part]),
                tuple(bias.contiguous() for bias in biases[part]) or None,
                out[:, place:],
                rows, inner, c.stride(0), out.stride(0),
                WIDTHS=packed(widths[part]),
                DTYPE=_TRITON[dtype],
                PRECISION="tf32" if dtype == torch.float32 and uses_tf32() else "ieee",
                UPCAST=dtype == torch.bfloat16 and interpreting(),
                EVEN_K=inner % config.block_k == 0,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                num_warps=config.num_warps, num_stages=config.num_stages,
                **({"maxnreg": config.max_registers} if config.max_registers else {}),
            )  # fmt: skip
            place += sum(widths[part])
    return out
