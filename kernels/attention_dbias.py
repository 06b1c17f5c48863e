"""The gradient of the attention's bias.

    d_bias = sum over the axes along which it was broadcast of p * (d_p - delta)

p, d_p and delta as in attention_bwd.py. One program owns a tile of the bias and walks over the samples and heads (and
rows, where the bias has one) that it was added to, in a fixed order: no (B, H, T, T) tensor, no atomics.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .attention import common_launch, less_delta, load_bias, load_tile, power
from .configs.attention import AttentionConfig


@triton.jit(do_not_specialize=["bias_heads", "bias_rows", "repeats_batch", "repeats_head", "repeats_row"])
def _attention_dbias_kernel(
    qkv_ptr, bias_ptr, d_out_ptr, stats_ptr, delta_ptr, d_bias_ptr,
    heads, tokens, bias_heads, bias_rows, repeats_batch, repeats_head, repeats_row,
    stride_batch, stride_row, stride_part, stride_head, stride_d_out_batch, stride_d_out_row,
    stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_col,
    scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EXACT: tl.constexpr,
    ALLOW_TF32: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """One tile of the bias; repeats_*: over how many samples, heads and tiles of rows it was broadcast."""
    PRECISION: tl.constexpr = "tf32" if ALLOW_TF32 else "ieee"
    MAIN: tl.constexpr = min(D, BLOCK_D)
    index = tl.program_id(0)
    tiles_row = tl.cdiv(bias_rows, BLOCK_M)
    tiles_col = tl.cdiv(tokens, BLOCK_N)
    keys = index % tiles_col * BLOCK_N + tl.arange(0, BLOCK_N)
    tile_row = index // tiles_col % tiles_row
    bias_head = (index // tiles_col // tiles_row % bias_heads).to(tl.int64)
    bias_batch = (index // tiles_col // tiles_row // bias_heads).to(tl.int64)
    stride = stride_row * ALIGN
    stride_d_out = stride_d_out_row * ALIGN
    part = stride_part * ALIGN
    bias_ptr += bias_batch * stride_bias_batch + bias_head * stride_bias_head

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for repeat in range(0, repeats_batch * repeats_head * repeats_row):
        head = bias_head + repeat // repeats_row % repeats_head
        batch = bias_batch + repeat // repeats_row // repeats_head
        rows = (tile_row + repeat % repeats_row) * BLOCK_M + tl.arange(0, BLOCK_M)
        q_ptr = qkv_ptr + (batch * stride_batch + head * stride_head) * ALIGN
        o_ptr = d_out_ptr + batch * stride_d_out_batch * ALIGN + head * D
        q = load_tile(q_ptr, rows, stride, tokens, BLOCK_D, MAIN, not EVEN_M, UPCAST)
        k = load_tile(q_ptr + part, keys, stride, tokens, BLOCK_D, MAIN, not EVEN_N, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        d_out = load_tile(o_ptr, rows, stride_d_out, tokens, BLOCK_D, MAIN, not EVEN_M, UPCAST)
        v = load_tile(q_ptr + 2 * part, keys, stride, tokens, BLOCK_D, MAIN, not EVEN_N, UPCAST)
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        if TAIL:
            q_t = load_tile(q_ptr + BLOCK_D, rows, stride, tokens, TAIL, D - BLOCK_D, not EVEN_M, UPCAST)
            k_t = load_tile(q_ptr + part + BLOCK_D, keys, stride, tokens, TAIL, D - BLOCK_D, not EVEN_N, UPCAST)
            s = tl.dot(q_t, tl.trans(k_t), s, input_precision=PRECISION)
            d_out_t = load_tile(o_ptr + BLOCK_D, rows, stride_d_out, tokens, TAIL, D - BLOCK_D, not EVEN_M, UPCAST)
            v_t = load_tile(q_ptr + 2 * part + BLOCK_D, keys, stride, tokens, TAIL, D - BLOCK_D, not EVEN_N, UPCAST)
            d_p = tl.dot(d_out_t, tl.trans(v_t), d_p, input_precision=PRECISION)
        statistics = (batch * heads + head) * tokens
        highest = tl.load(stats_ptr + 2 * statistics + rows, mask=rows < tokens, other=float("inf"))
        inverse = tl.load(stats_ptr + 2 * statistics + tokens + rows, mask=rows < tokens, other=0.0)
        own_delta_ptr = delta_ptr + (3 if SPLIT else 1) * statistics + rows
        delta = tl.load(own_delta_ptr, mask=rows < tokens, other=0.0)
        s = s * scale
        s += load_bias(bias_ptr, rows[:, None], keys[None, :], stride_bias_row, stride_bias_col, tokens, EVEN_N)
        if not EVEN_N:
            s = tl.where((keys < tokens)[None, :], s, float("-inf"))
        p = power(s - highest[:, None], EXACT) * inverse[:, None]
        if SPLIT:
            rest = tl.load(own_delta_ptr + tokens, mask=rows < tokens, other=0.0)
            rest_d = tl.load(own_delta_ptr + 2 * tokens, mask=rows < tokens, other=0.0)
            acc += p * less_delta(p, d_p, delta[:, None], rest[:, None], rest_d[:, None])
        else:
            acc += p * (d_p - delta[:, None])

    rows = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    d_bias_ptr += (bias_batch * bias_heads + bias_head) * bias_rows * tokens
    if ONE_ROW:
        acc = tl.sum(acc, axis=0, keep_dims=True)
        rows = tl.zeros([1], tl.int32)
    offsets = rows.to(tl.int64)[:, None] * tokens + keys[None, :]
    mask = (rows < bias_rows)[:, None] & (keys < tokens)[None, :]
    tl.store(d_bias_ptr + offsets, acc.to(d_bias_ptr.dtype.element_ty), mask=mask)


def dbias_launch(
    qkv: Tensor, bias: Tensor, scale: float, d_bias: Tensor, config: AttentionConfig, align: int, shared: dict[str, Any]
) -> tuple[Any, tuple[int], dict[str, Any]]:
    """(kernel, grid, arguments); ``shared`` holds d_out with its strides, stats and delta."""
    batch, tokens, _, heads, _ = qkv.shape
    bias_batch, bias_heads, bias_rows, _ = bias.shape
    tiles_row, tiles_col = triton.cdiv(tokens, config.block_m), triton.cdiv(tokens, config.block_n)
    one_row = bias_rows < tokens
    _, arguments = common_launch(qkv, bias, scale, config, align)
    arguments |= {
        **shared, "d_bias_ptr": d_bias, "bias_heads": bias_heads, "bias_rows": bias_rows,
        "repeats_batch": batch // bias_batch, "repeats_head": heads // bias_heads,
        "repeats_row": tiles_row if one_row else 1, "ONE_ROW": one_row,
    }  # fmt: skip
    grid = bias_batch * bias_heads * (1 if one_row else tiles_row) * tiles_col
    return _attention_dbias_kernel, (grid,), arguments
