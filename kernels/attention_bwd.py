"""Softmax attention on the packed projection, backward.

    p = exp(s - max) / sum;  delta = sum_d d_out * out;  d_p = d_out v^T;  d_s = p * (d_p - delta)
    d_q = scale * d_s k;  d_k = scale * d_s^T q;  d_v = p^T d_out;  d_bias = sum over its broadcast axes of d_s

Shapes as in attention.py; d_qkv: (B, T, 3, H, D), each part written in place by the program that owns its rows. One
launch owns queries (delta and d_q), one owns keys (d_k and d_v) and reads delta, and one owns tiles of the bias and
walks over what it was broadcast to. p is made again from stats; d_s and p are rounded to the input's dtype before
their dots. ``sums`` are column sums of what a program writes, in fp32 before rounding, one row a program: no program
adds to another's memory.

Where one key has nearly all of a row's softmax, d_p - delta is what is left of two numbers that are all but equal.
Launches of at most SPLIT_TOKENS tokens take delta = sum of p * d_p, and keep a key with p > 5/8, of which a row has one
at most, apart: with rest and rest_d the sums of p and p * d_p over the other keys, its d_p - delta is
rest * d_p - rest_d, right whatever the order in which each launch sums d_p. Longer rows take the flash form's delta
above, as every flash kernel does, whose error where logits have a deviation of 50 to 200 is in 16 bits up to twice
the rule's bound with torch's MATH attention as the yardstick (more where few rows are not saturated, as at 1000), in
fp32 within it; torch's own flash kernel on a CPU errs as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    alignment,
    common_launch,
    last_contiguous,
    less_delta,
    load_bias,
    load_tile,
    power,
    split_heads,
    store_tile,
)
from .attention_dbias import dbias_launch
from .configs.attention import SPLIT_TOKENS, AttentionConfig, launch_config, sum_slots
from .launch import Launch, empty_like

OPERATORS = ("attention_dq", "attention_dkv", "attention_dbias")  # of the launches, in order


@triton.jit
def _store_sums(ptr, tile, tiles, slots, stride, value, WIDTH: tl.constexpr, VALID: tl.constexpr):
    """Column sums into slot ``tile`` (rows past the tokens are 0); slots past the last tile are zeroed on the way."""
    cols = tl.arange(0, WIDTH)
    total = tl.sum(value, axis=0)
    for slot in range(tile, slots, tiles):
        tl.store(ptr + slot * stride + cols, tl.where(slot == tile, total, 0.0), mask=cols < VALID)


@triton.jit
def _own_sums(p, d_p):
    """(delta, rest, rest_d) of a tile."""
    apart = p > 0.625
    product = p * d_p
    rest, rest_d = tl.where(apart, 0.0, p), tl.where(apart, 0.0, product)
    return tl.sum(product, axis=1), tl.sum(rest, axis=1), tl.sum(rest_d, axis=1)


@triton.jit(do_not_specialize=["slots"])
def _attention_dq_kernel(
    qkv_ptr, bias_ptr, out_ptr, d_out_ptr, stats_ptr, delta_ptr, d_qkv_ptr, sums_ptr,
    heads, tokens, slots,
    stride_batch, stride_row, stride_part, stride_head, stride_d_out_batch, stride_d_out_row,
    stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_col,
    scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EXACT: tl.constexpr,
    ALLOW_TF32: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """PASSES over the keys: two where SPLIT and a row's keys lie in more than one tile, the first for its sums."""
    PRECISION: tl.constexpr = "tf32" if ALLOW_TF32 else "ieee"
    MAIN: tl.constexpr = min(D, BLOCK_D)
    tiles = tl.cdiv(tokens, BLOCK_M)
    index = tl.program_id(0)
    head = (index // tiles % heads).to(tl.int64)
    batch = (index // tiles // heads).to(tl.int64)
    rows = index % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    stride = stride_row * ALIGN
    stride_d_out = stride_d_out_row * ALIGN
    q_ptr = qkv_ptr + (batch * stride_batch + head * stride_head) * ALIGN
    k_ptr = q_ptr + stride_part * ALIGN
    v_ptr = k_ptr + stride_part * ALIGN
    d_out_ptr += batch * stride_d_out_batch * ALIGN + head * D
    out_ptr += (batch * tokens * heads + head) * D
    statistics = (batch * heads + head) * tokens
    if bias_ptr is not None:
        bias_ptr += batch * stride_bias_batch + head * stride_bias_head

    d_out = load_tile(d_out_ptr, rows, stride_d_out, tokens, BLOCK_D, MAIN, not EVEN_M, UPCAST)
    if not SPLIT:
        out = load_tile(out_ptr, rows, heads * D, tokens, BLOCK_D, MAIN, not EVEN_M, UPCAST)
        delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
    q = load_tile(q_ptr, rows, stride, tokens, BLOCK_D, MAIN, not EVEN_M, UPCAST)
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if TAIL:
        d_out_t = load_tile(d_out_ptr + BLOCK_D, rows, stride_d_out, tokens, TAIL, D - BLOCK_D, not EVEN_M, UPCAST)
        if not SPLIT:
            out_t = load_tile(out_ptr + BLOCK_D, rows, heads * D, tokens, TAIL, D - BLOCK_D, not EVEN_M, UPCAST)
            delta += tl.sum(d_out_t.to(tl.float32) * out_t.to(tl.float32), axis=1)
        q_t = load_tile(q_ptr + BLOCK_D, rows, stride, tokens, TAIL, D - BLOCK_D, not EVEN_M, UPCAST)
        d_q_t = tl.zeros([BLOCK_M, TAIL], tl.float32)
    delta_ptr += (3 if SPLIT else 1) * statistics
    if SPLIT:
        delta = tl.zeros([BLOCK_M], tl.float32)
        rest = tl.zeros([BLOCK_M], tl.float32)
        rest_d = tl.zeros([BLOCK_M], tl.float32)
        inverse = tl.load(stats_ptr + 2 * statistics + tokens + rows, mask=rows < tokens, other=0.0)
    else:
        tl.store(delta_ptr + rows, delta, mask=rows < tokens)
    # +inf: p is 0 in rows that do not exist
    highest = tl.load(stats_ptr + 2 * statistics + rows, mask=rows < tokens, other=float("inf"))
    for turn in tl.static_range(PASSES):
        for start in range(0, tokens, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            k = load_tile(k_ptr, keys, stride, tokens, BLOCK_D, MAIN, not EVEN_N, UPCAST)
            v = load_tile(v_ptr, keys, stride, tokens, BLOCK_D, MAIN, not EVEN_N, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            if TAIL:
                k_t = load_tile(k_ptr + BLOCK_D, keys, stride, tokens, TAIL, D - BLOCK_D, not EVEN_N, UPCAST)
                v_t = load_tile(v_ptr + BLOCK_D, keys, stride, tokens, TAIL, D - BLOCK_D, not EVEN_N, UPCAST)
                s = tl.dot(q_t, tl.trans(k_t), s, input_precision=PRECISION)
                d_p = tl.dot(d_out_t, tl.trans(v_t), d_p, input_precision=PRECISION)
            s = s * (scale if EXACT else scale_log2)
            if bias_ptr is not None:
                s += load_bias(bias_ptr, rows[:, None], keys[None, :], stride_bias_row, stride_bias_col, tokens, EVEN_N)
            if not EVEN_N:
                s = tl.where((keys < tokens)[None, :], s, float("-inf"))
            p = power(s - highest[:, None], EXACT)
            if SPLIT and turn == 0:
                sums = _own_sums(p * inverse[:, None], d_p)
                delta += sums[0]
                rest += sums[1]
                rest_d += sums[2]
            if turn == PASSES - 1:
                if SPLIT:
                    p *= inverse[:, None]
                    d_s = p * less_delta(p, d_p, delta[:, None], rest[:, None], rest_d[:, None])
                else:  # the row's sum divides d_q, once
                    d_s = p * (d_p - delta[:, None])
                d_s = d_s.to(k.dtype)
                d_q = tl.dot(d_s, k, d_q, input_precision=PRECISION)
                if TAIL:
                    d_q_t = tl.dot(d_s, k_t, d_q_t, input_precision=PRECISION)
    if SPLIT:
        tl.store(delta_ptr + rows, delta, mask=rows < tokens)
        tl.store(delta_ptr + tokens + rows, rest, mask=rows < tokens)
        tl.store(delta_ptr + 2 * tokens + rows, rest_d, mask=rows < tokens)

    width = heads * D
    d_qkv_ptr += batch * tokens * 3 * width + head * D
    factor = scale
    if not SPLIT:
        factor = (scale * tl.load(stats_ptr + 2 * statistics + tokens + rows, mask=rows < tokens, other=0.0))[:, None]
    d_q *= factor
    store_tile(d_qkv_ptr, rows, 3 * width, tokens, d_q, BLOCK_D, MAIN, UPCAST)
    if TAIL:
        d_q_t *= factor
        store_tile(d_qkv_ptr + BLOCK_D, rows, 3 * width, tokens, d_q_t, TAIL, D - BLOCK_D, UPCAST)
    if sums_ptr is not None:
        tile = (index % tiles).to(tl.int64)
        sums_ptr += batch * slots * 3 * width + head * D
        _store_sums(sums_ptr, tile, tiles, slots, 3 * width, d_q, BLOCK_D, MAIN)
        if TAIL:
            sums_ptr += BLOCK_D
            _store_sums(sums_ptr, tile, tiles, slots, 3 * width, d_q_t, TAIL, D - BLOCK_D)


@triton.jit(do_not_specialize=["slots"])
def _attention_dkv_kernel(
    qkv_ptr, bias_ptr, d_out_ptr, stats_ptr, delta_ptr, d_qkv_ptr, sums_ptr,
    heads, tokens, slots,
    stride_batch, stride_row, stride_part, stride_head, stride_d_out_batch, stride_d_out_row,
    stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_col,
    scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EXACT: tl.constexpr,
    ALLOW_TF32: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M keys are owned, BLOCK_N queries walked over; s, p and d_s are transposed: keys down, queries across."""
    PRECISION: tl.constexpr = "tf32" if ALLOW_TF32 else "ieee"
    MAIN: tl.constexpr = min(D, BLOCK_D)
    tiles = tl.cdiv(tokens, BLOCK_M)
    index = tl.program_id(0)
    head = (index // tiles % heads).to(tl.int64)
    batch = (index // tiles // heads).to(tl.int64)
    keys = index % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    stride = stride_row * ALIGN
    stride_d_out = stride_d_out_row * ALIGN
    q_ptr = qkv_ptr + (batch * stride_batch + head * stride_head) * ALIGN
    k_ptr = q_ptr + stride_part * ALIGN
    v_ptr = k_ptr + stride_part * ALIGN
    d_out_ptr += batch * stride_d_out_batch * ALIGN + head * D
    stats_ptr += (batch * heads + head) * 2 * tokens
    delta_ptr += (batch * heads + head) * (3 if SPLIT else 1) * tokens
    if bias_ptr is not None:
        bias_ptr += batch * stride_bias_batch + head * stride_bias_head

    k = load_tile(k_ptr, keys, stride, tokens, BLOCK_D, MAIN, not EVEN_M, UPCAST)
    v = load_tile(v_ptr, keys, stride, tokens, BLOCK_D, MAIN, not EVEN_M, UPCAST)
    d_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if TAIL:
        k_t = load_tile(k_ptr + BLOCK_D, keys, stride, tokens, TAIL, D - BLOCK_D, not EVEN_M, UPCAST)
        v_t = load_tile(v_ptr + BLOCK_D, keys, stride, tokens, TAIL, D - BLOCK_D, not EVEN_M, UPCAST)
        d_k_t = tl.zeros([BLOCK_M, TAIL], tl.float32)
        d_v_t = tl.zeros([BLOCK_M, TAIL], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        q = load_tile(q_ptr, rows, stride, tokens, BLOCK_D, MAIN, not EVEN_N, UPCAST)
        d_out = load_tile(d_out_ptr, rows, stride_d_out, tokens, BLOCK_D, MAIN, not EVEN_N, UPCAST)
        if EVEN_N:
            highest = tl.load(stats_ptr + rows)
            inverse = tl.load(stats_ptr + tokens + rows)
            delta = tl.load(delta_ptr + rows)
        else:
            # +inf: p is 0 in rows that do not exist
            highest = tl.load(stats_ptr + rows, mask=rows < tokens, other=float("inf"))
            inverse = tl.load(stats_ptr + tokens + rows, mask=rows < tokens, other=0.0)
            delta = tl.load(delta_ptr + rows, mask=rows < tokens, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if TAIL:
            q_t = load_tile(q_ptr + BLOCK_D, rows, stride, tokens, TAIL, D - BLOCK_D, not EVEN_N, UPCAST)
            s = tl.dot(k_t, tl.trans(q_t), s, input_precision=PRECISION)
        s = s * (scale if EXACT else scale_log2)
        if bias_ptr is not None:
            s += load_bias(bias_ptr, rows[None, :], keys[:, None], stride_bias_row, stride_bias_col, tokens, EVEN_M)
        if not EVEN_M:
            s = tl.where((keys < tokens)[:, None], s, float("-inf"))
        p = power(s - highest[None, :], EXACT) * inverse[None, :]
        p_rounded = p.to(q.dtype)
        d_v = tl.dot(p_rounded, d_out, d_v, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        if TAIL:
            d_out_t = load_tile(
                d_out_ptr + BLOCK_D, rows, stride_d_out, tokens, TAIL, D - BLOCK_D, not EVEN_N, UPCAST
            )
            d_v_t = tl.dot(p_rounded, d_out_t, d_v_t, input_precision=PRECISION)
            d_p = tl.dot(v_t, tl.trans(d_out_t), d_p, input_precision=PRECISION)
        if SPLIT:
            rest = tl.load(delta_ptr + tokens + rows, mask=rows < tokens, other=0.0)
            rest_d = tl.load(delta_ptr + 2 * tokens + rows, mask=rows < tokens, other=0.0)
            d_s = (p * less_delta(p, d_p, delta[None, :], rest[None, :], rest_d[None, :])).to(q.dtype)
        else:
            d_s = (p * (d_p - delta[None, :])).to(q.dtype)
        d_k = tl.dot(d_s, q, d_k, input_precision=PRECISION)
        if TAIL:
            d_k_t = tl.dot(d_s, q_t, d_k_t, input_precision=PRECISION)

    width = heads * D
    d_qkv_ptr += batch * tokens * 3 * width + width + head * D
    d_k *= scale
    store_tile(d_qkv_ptr, keys, 3 * width, tokens, d_k, BLOCK_D, MAIN, UPCAST)
    store_tile(d_qkv_ptr + width, keys, 3 * width, tokens, d_v, BLOCK_D, MAIN, UPCAST)
    if TAIL:
        d_k_t *= scale
        store_tile(d_qkv_ptr + BLOCK_D, keys, 3 * width, tokens, d_k_t, TAIL, D - BLOCK_D, UPCAST)
        store_tile(d_qkv_ptr + width + BLOCK_D, keys, 3 * width, tokens, d_v_t, TAIL, D - BLOCK_D, UPCAST)
    if sums_ptr is not None:
        tile = (index % tiles).to(tl.int64)
        sums_ptr += batch * slots * 3 * width + width + head * D
        _store_sums(sums_ptr, tile, tiles, slots, 3 * width, d_k, BLOCK_D, MAIN)
        _store_sums(sums_ptr + width, tile, tiles, slots, 3 * width, d_v, BLOCK_D, MAIN)
        if TAIL:
            sums_ptr += BLOCK_D
            _store_sums(sums_ptr, tile, tiles, slots, 3 * width, d_k_t, TAIL, D - BLOCK_D)
            _store_sums(sums_ptr + width, tile, tiles, slots, 3 * width, d_v_t, TAIL, D - BLOCK_D)


class AttentionBackward:
    """Two launches, three with the bias's gradient: (d_qkv, d_bias, sums), the last two None where not wanted.

    d_bias has the bias's shape and dtype. sums: (n, 3 * H * D) fp32, whose sum over n is that of d_qkv over samples
    and tokens. configs: of OPERATORS, in the place of :func:`launch_config`.
    """

    def __init__(
        self,
        tensors: Sequence[Any],
        num_heads: int,
        scale: float,
        want_bias: bool = False,
        want_sums: bool = False,
        configs: Sequence[AttentionConfig] | None = None,
    ) -> None:
        """tensors: (d_out, qkv, out, stats, bias); d_out and out (B, T, H * D)."""
        d_out, qkv, bias = last_contiguous(tensors[0]), last_contiguous(tensors[1]), tensors[4]
        self._copies = d_out is not tensors[0] or qkv is not tensors[1]
        heads = split_heads(qkv, num_heads)
        batch, tokens, _, _, head_dim = heads.shape
        # a constant on every key leaves the softmax as it is: a bias of one column has the gradient 0
        self._vanishes = want_bias and (qkv.numel() == 0 or bias.shape[3] == 1)
        self._wants_bias = want_bias
        configs = configs or [launch_config(operator, heads, bias is not None) for operator in OPERATORS]
        slots = sum_slots(tokens, head_dim, qkv.dtype, bias is not None)
        if want_sums and any(triton.cdiv(tokens, config.block_m) > slots for config in configs[:2]):
            raise ValueError(f"the tiles must have as many rows as a row of sums stands for, got {configs[:2]}")
        self._sums = (batch * slots, qkv.shape[2]) if want_sums else None
        split = tokens <= SPLIT_TOKENS
        self._delta = batch, num_heads, 3 if split else 1, tokens
        launches = bwd_launches(
            d_out, heads, None, None, scale, bias, None,
            bias if want_bias and not self._vanishes else None, slots if want_sums else 0, configs,
        ) if qkv.numel() and tokens > 1 else []  # fmt: skip
        self._launches = [Launch.named(qkv, *launch) for launch in launches]

    def __call__(
        self, d_out: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self._copies:
            d_out, qkv = last_contiguous(d_out), last_contiguous(qkv)
        d_qkv = empty_like(qkv)
        sums = None if self._sums is None else qkv.new_empty(self._sums, dtype=torch.float32)
        d_bias = None
        if bias is not None and self._wants_bias:
            d_bias = bias.new_zeros(bias.shape) if self._vanishes else empty_like(bias)
        if self._launches:
            delta = stats.new_empty(self._delta)
            dq, dkv, *dbias = self._launches
            dq(qkv, bias, out, d_out, stats, delta, d_qkv, sums)
            dkv(qkv, bias, d_out, stats, delta, d_qkv, sums)
            for launch in dbias:
                launch(qkv, bias, d_out, stats, delta, d_bias)
        elif qkv.numel():
            _one_token(d_out, stats, d_qkv, sums)
        return d_qkv, d_bias, sums


def _one_token(d_out: Tensor, stats: Tensor, d_qkv: Tensor, sums: Tensor | None) -> None:
    """p is 1 and d_s is 0, where the kernels would leave rounding errors; all 0 where the one logit is -inf."""
    d_q, d_k, d_v = split_heads(d_qkv, stats.shape[1]).unbind(2)
    d_q.zero_()
    d_k.zero_()
    empty = (stats[:, :, 0].mT == float("inf")).unsqueeze(-1)
    d_v.copy_(d_out.reshape(d_v.shape).masked_fill(empty, 0))
    if sums is not None:
        sums.copy_(d_qkv.flatten(1))


def bwd_launches(
    d_out: Tensor, qkv: Tensor, out: Tensor | None, stats: Tensor | None, scale: float, bias: Tensor | None,
    d_qkv: Tensor | None, d_bias: Tensor | None, slots: int, configs: Sequence[AttentionConfig],
    delta: Tensor | None = None, sums: Tensor | None = None,
) -> list[tuple[Any, tuple[int], dict[str, Any]]]:  # fmt: skip
    """(kernel, grid, arguments) of each launch, in order; qkv (B, T, 3, H, D)."""
    align = alignment(qkv, d_out)
    split = qkv.shape[1] <= SPLIT_TOKENS
    shared = {
        "d_out_ptr": d_out, "stats_ptr": stats, "SPLIT": split, "delta_ptr": delta,
        "stride_d_out_batch": d_out.stride(0) // align, "stride_d_out_row": d_out.stride(1) // align,
    }  # fmt: skip
    written = {**shared, "d_qkv_ptr": d_qkv, "sums_ptr": sums, "slots": slots}
    grid, arguments = common_launch(qkv, bias, scale, configs[0], align)
    passes = 2 if split and qkv.shape[1] > configs[0].block_n else 1
    launches = [(_attention_dq_kernel, grid, {**arguments, **written, "out_ptr": out, "PASSES": passes})]
    grid, arguments = common_launch(qkv, bias, scale, configs[1], align)
    launches.append((_attention_dkv_kernel, grid, {**arguments, **written}))
    if d_bias is not None:
        launches.append(dbias_launch(qkv, bias, scale, d_bias, configs[2], align, shared))
    return launches
