"""Softmax attention on the packed projection, forward.

    s = scale * q k^T + bias;  p = exp(s - max(s)) / sum(exp(s - max(s)));  out = p v

qkv: (B, T, 3, H, D), last axis contiguous, any other strides; bias: None or (1 | B, 1 | H, 1 | T, 1 | T), any
strides; out: (B, T, H * D). One program owns BLOCK_M queries of one head of one sample and walks over the keys,
BLOCK_N at a time, with the running maximum and sum in fp32. A head is BLOCK_D + TAIL lanes wide, two dots for q k^T
and two accumulators for p v: 72 is 64 + 16, not 128.

Saved for backward is the log-sum-exp in its two parts, stats (B, H, 2, T) fp32: a row's maximum, and 1 / sum(exp(s -
max)), so that p = exp(s - max) / sum. In one number the sum would drown in a large maximum. The maximum is +inf where
every logit is -inf, a row whose output is 0. 16-bit inputs without a bias count logits in base 2, which saves a
multiplication an element; EXACT ones keep their unit, in which no finite bias overflows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs.attention import AttentionConfig, head_lanes, launch_config
from .launch import Launch, interpreting, uses_tf32


@triton.jit
def load_tile(
    ptr, rows, stride, tokens, WIDTH: tl.constexpr, VALID: tl.constexpr, RAGGED: tl.constexpr, UPCAST: tl.constexpr
):
    """(rows, WIDTH) of which VALID columns exist, 0 elsewhere. RAGGED: rows may lie past the tokens."""
    cols = tl.arange(0, WIDTH)
    # offsets first, then the pointer: on sm_90 this order costs the fewest registers
    pointers = ptr + (rows.to(tl.int64)[:, None] * stride + cols[None, :])
    if RAGGED and VALID < WIDTH:
        tile = tl.load(pointers, mask=(rows < tokens)[:, None] & (cols < VALID)[None, :], other=0.0)
    elif RAGGED:
        tile = tl.load(pointers, mask=(rows < tokens)[:, None], other=0.0)
    elif VALID < WIDTH:
        tile = tl.load(pointers, mask=(cols < VALID)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    # the interpreter multiplies bf16 as raw bits
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def store_tile(ptr, rows, stride, tokens, value, WIDTH: tl.constexpr, VALID: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        # the interpreter truncates to bf16: rounded to the nearest here, ties to even
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    cols = tl.arange(0, WIDTH)
    pointers = ptr + (rows.to(tl.int64)[:, None] * stride + cols[None, :])
    mask = (rows < tokens)[:, None] & (cols < VALID)[None, :]
    tl.store(pointers, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(ptr, rows, cols, stride_row, stride_col, tokens, COLS_EVEN: tl.constexpr):
    """bias[rows, cols] in fp32; rows and cols broadcast against each other, either way round.

    Rows past the tokens read the last one: a mask of both would cost a predicate an element.
    """
    rows = tl.minimum(rows, tokens - 1).to(tl.int64)
    pointers = ptr + (rows * stride_row + cols.to(tl.int64) * stride_col)
    bias = tl.load(pointers) if COLS_EVEN else tl.load(pointers, mask=cols < tokens, other=0.0)
    return bias.to(tl.float32)


@triton.jit
def power(x, EXACT: tl.constexpr):
    """exp(x) where EXACT, else 2^x."""
    # log2(e), written out: what a caller's kernel is looked up by in Triton's cache holds a module's constant or not,
    # depending on which kernel came first in the process
    return tl.exp2(x * 1.4426950408889634) if EXACT else tl.exp2(x)


@triton.jit
def less_delta(p, d_p, delta, rest, rest_d):
    """d_p - delta in launches that SPLIT (attention_bwd.py); delta, rest and rest_d broadcast along the keys."""
    # so little is lost in the formula's rounding, in fp64 too: its d_s is 0
    saturated = rest < 1e-14
    rest, rest_d = tl.where(saturated, 0.0, rest), tl.where(saturated, 0.0, rest_d)
    return tl.where(p > 0.625, rest * d_p - rest_d, d_p - delta)


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr, bias_ptr, out_ptr, stats_ptr,
    heads, tokens,
    stride_batch, stride_row, stride_part, stride_head,
    stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_col,
    scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, POSITIVE: tl.constexpr, EXACT: tl.constexpr,
    ALLOW_TF32: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    PRECISION: tl.constexpr = "tf32" if ALLOW_TF32 else "ieee"
    MAIN: tl.constexpr = min(D, BLOCK_D)
    tiles = tl.cdiv(tokens, BLOCK_M)
    index = tl.program_id(0)
    head = (index // tiles % heads).to(tl.int64)
    batch = (index // tiles // heads).to(tl.int64)
    rows = index % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    stride = stride_row * ALIGN
    q_ptr = qkv_ptr + (batch * stride_batch + head * stride_head) * ALIGN
    k_ptr = q_ptr + stride_part * ALIGN
    v_ptr = k_ptr + stride_part * ALIGN
    if bias_ptr is not None:
        bias_ptr += batch * stride_bias_batch + head * stride_bias_head

    q = load_tile(q_ptr, rows, stride, tokens, BLOCK_D, MAIN, True, UPCAST)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if TAIL:
        q_t = load_tile(q_ptr + BLOCK_D, rows, stride, tokens, TAIL, D - BLOCK_D, True, UPCAST)
        acc_t = tl.zeros([BLOCK_M, TAIL], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, stride, tokens, BLOCK_D, MAIN, not EVEN_N, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TAIL:
            k_t = load_tile(k_ptr + BLOCK_D, keys, stride, tokens, TAIL, D - BLOCK_D, not EVEN_N, UPCAST)
            s = tl.dot(q_t, tl.trans(k_t), s, input_precision=PRECISION)
        if EVEN_N and POSITIVE and not EXACT:
            # scaled within the subtraction: one fused multiply-add an element
            new = tl.maximum(highest, tl.max(s, axis=1) * scale_log2)
            base = new
            p = tl.exp2(s * scale_log2 - base[:, None])
        else:
            s = s * (scale if EXACT else scale_log2)
            if bias_ptr is not None:
                s += load_bias(bias_ptr, rows[:, None], keys[None, :], stride_bias_row, stride_bias_col, tokens, EVEN_N)
            if not EVEN_N:
                s = tl.where((keys < tokens)[None, :], s, float("-inf"))
            new = tl.maximum(highest, tl.max(s, axis=1))
            # -inf - -inf is NaN: a row of nothing but -inf so far counts from 0
            base = new if bias_ptr is None else tl.where(new == float("-inf"), 0.0, new)
            p = power(s - base[:, None], EXACT)
        rescale = power(highest - base, EXACT)
        highest = new
        total = total * rescale + tl.sum(p, axis=1)
        v = load_tile(v_ptr, keys, stride, tokens, BLOCK_D, MAIN, not EVEN_N, UPCAST)
        p = p.to(v.dtype)
        acc = tl.dot(p, v, acc * rescale[:, None], input_precision=PRECISION)
        if TAIL:
            v_t = load_tile(v_ptr + BLOCK_D, keys, stride, tokens, TAIL, D - BLOCK_D, not EVEN_N, UPCAST)
            acc_t = tl.dot(p, v_t, acc_t * rescale[:, None], input_precision=PRECISION)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    inverse = 1.0 / total
    out_ptr += (batch * tokens * heads + head) * D
    store_tile(out_ptr, rows, heads * D, tokens, acc * inverse[:, None], BLOCK_D, MAIN, UPCAST)
    if TAIL:
        store_tile(out_ptr + BLOCK_D, rows, heads * D, tokens, acc_t * inverse[:, None], TAIL, D - BLOCK_D, UPCAST)
    if stats_ptr is not None:
        stats_ptr += (batch * heads + head) * 2 * tokens
        tl.store(stats_ptr + rows, tl.where(empty, float("inf"), highest), mask=rows < tokens)
        tl.store(stats_ptr + tokens + rows, inverse, mask=rows < tokens)


class AttentionForward:
    """One launch, as ``config`` says or :func:`launch_config`: (out, stats), stats None unless ``save``. out is a
    matrix (B * T, H * D) where ``flat``, and qkv may be one too."""

    def __init__(
        self,
        tensors: Sequence[Any],
        num_heads: int,
        scale: float,
        save: bool = True,
        config: AttentionConfig | None = None,
        flat: bool = False,
    ) -> None:
        """tensors: (qkv, bias), qkv (B, T, 3 * H * D), bias None or of four axes."""
        qkv, bias = last_contiguous(tensors[0]), tensors[1]
        self._copies = qkv is not tensors[0]
        heads = split_heads(qkv, num_heads)
        batch, tokens, _, _, head_dim = heads.shape
        self._out = (batch * tokens, num_heads * head_dim) if flat else (batch, tokens, num_heads * head_dim)
        self._stats = (batch, num_heads, 2, tokens) if save else None
        config = config or launch_config("attention_fwd", heads, bias is not None)
        grid, arguments = fwd_launch(heads, bias, None, None, scale, config)
        self._launch = Launch.named(qkv, _attention_fwd_kernel, grid, arguments)

    def __call__(self, qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self._copies:
            qkv = last_contiguous(qkv)
        out = qkv.new_empty(self._out)
        stats = None if self._stats is None else qkv.new_empty(self._stats, dtype=torch.float32)
        if out.numel():
            self._launch(qkv, bias, out, stats)
        return out, stats


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, T, 3 * H * D) -> (B, T, 3, H, D), without a copy."""
    batch, tokens, width = qkv.shape
    return qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads))


def fwd_launch(
    qkv: Tensor, bias: Tensor | None, out: Tensor | None, stats: Tensor | None, scale: float, config: AttentionConfig
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the arguments of the forward's launch."""
    grid, arguments = common_launch(qkv, bias, scale, config, alignment(qkv))
    return grid, {**arguments, "out_ptr": out, "stats_ptr": stats, "POSITIVE": scale > 0}


def common_launch(
    qkv: Tensor, bias: Tensor | None, scale: float, config: AttentionConfig, align: int
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of programs that own config.block_m rows each, and what every attention kernel is given."""
    batch, tokens, _, heads, head_dim = qkv.shape
    stride_batch, stride_row, stride_part, stride_head = (stride // align for stride in qkv.stride()[:4])
    # a broadcast axis is read again and again in place
    bias_strides = (0, 0, 0, 0) if bias is None else (
        0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)
    )  # fmt: skip
    names = ("stride_bias_batch", "stride_bias_head", "stride_bias_row", "stride_bias_col")
    block, tail = head_lanes(head_dim)
    return (batch * heads * triton.cdiv(tokens, config.block_m),), {
        "qkv_ptr": qkv, "bias_ptr": bias, "heads": heads, "tokens": tokens,
        "stride_batch": stride_batch, "stride_row": stride_row,
        "stride_part": stride_part, "stride_head": stride_head,
        **dict(zip(names, bias_strides, strict=True)),
        "scale": float(scale), "scale_log2": scale * math.log2(math.e),
        "EXACT": bias is not None or qkv.dtype == torch.float32,
        "D": head_dim, "BLOCK_D": block, "TAIL": tail, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "ALIGN": align, "EVEN_M": tokens % config.block_m == 0, "EVEN_N": tokens % config.block_n == 0,
        "ALLOW_TF32": uses_tf32(qkv.dtype),
        "UPCAST": qkv.dtype == torch.bfloat16 and interpreting(),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def alignment(*tensors: Tensor) -> int:
    """8 where every stride but the last is a multiple of 8: 16-byte accesses to heads of 72, no multiple of 16.

    The kernels are given strides in this unit. Past 2^31 it is 1, so that a stride is an int64 from the start.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    return 8 if all(stride % 8 == 0 and stride < 1 << 31 for stride in strides) else 1


def last_contiguous(x: Tensor) -> Tensor:
    """x with a contiguous last axis; a copy only where it has none."""
    return x if x.stride(-1) == 1 else x.contiguous()
