"""adaLN kernels: gated residual and modulated LayerNorm, apart or together, forward and backward.

    r = residual + gate * branch                  x_hat = (r - mean(r)) / sqrt(var(r) + eps)
    out = x_hat * (1 + scale) + shift
    g = d_out * (1 + scale);  d_r += (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var(r) + eps)
    d_residual = d_r;  d_branch = gate * d_r;  d_gate = sum_t d_r * branch;  d_bias = sum_bt d_branch
    d_shift = sum_t d_out;  d_scale = sum_t d_out * x_hat

residual, branch, out: (B, T, D), last axis contiguous, any other strides; gate, shift, scale: (B, D), any row
stride. One program owns a slab of rows of ONE sample, so its modulation is read once and its share of the sums
over t stays in fp32 registers; its partial sums are added up in a second launch (sums.py). bias is that of the
Linear which made the branch: its gradient falls off here without another read. Saved for backward: r, mean and
1 / sqrt(var + eps), both (B, T) fp32; out is not saved, the backward writes it again for whoever multiplied it. A row
is BLOCK + TAIL lanes wide: 1152 is 1024 + 128, not 2048.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs.rows import RowConfig, row_config
from .launch import on_device
from .sums import sum_partials

MAX_REGISTERS = 128  # of a thread in the backward: four blocks of four warps on a multiprocessor


@triton.jit
def _load(ptr, cols, mask):
    """A piece of a row in fp32, zero outside the row."""
    return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, cols, mask, value):
    tl.store(ptr + cols, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_branch(
    x_ptr, branch_ptr, r_ptr, offset_x, offset_branch, offset_r, cols, mask, gate, HAS_BRANCH: tl.constexpr
):
    """A piece of r in fp32, rounded to the stream's dtype and stored where there is a branch to add."""
    x = _load(x_ptr + offset_x, cols, mask)
    if HAS_BRANCH:
        rounded = (x + gate * _load(branch_ptr + offset_branch, cols, mask)).to(r_ptr.dtype.element_ty)
        tl.store(r_ptr + offset_r + cols, rounded, mask=mask)
        x = rounded.to(tl.float32)
    return x


@triton.jit(do_not_specialize=["tokens", "slabs", "rows"])
def _adaln_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, r_ptr, out_ptr, mean_ptr, rstd_ptr,
    tokens, slabs, rows,
    stride_x_batch, stride_x_row, stride_branch_batch, stride_branch_row,
    stride_gate_batch, stride_shift_batch, stride_scale_batch,
    eps,
    D: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // slabs).to(tl.int64)
    first = (tl.program_id(0) % slabs) * rows
    count = min(rows, tokens - first)
    first = first.to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    if TAIL:
        cols_t = BLOCK + tl.arange(0, TAIL)
        mask_t = cols_t < D
    gate = 0.0
    gate_t = 0.0
    if HAS_BRANCH:
        gate = _load(gate_ptr + batch * stride_gate_batch, cols, mask)
        if TAIL:
            gate_t = _load(gate_ptr + batch * stride_gate_batch, cols_t, mask_t)
    if HAS_NORM:
        shift = _load(shift_ptr + batch * stride_shift_batch, cols, mask)
        scale = 1.0 + _load(scale_ptr + batch * stride_scale_batch, cols, mask)
        if TAIL:
            shift_t = _load(shift_ptr + batch * stride_shift_batch, cols_t, mask_t)
            scale_t = 1.0 + _load(scale_ptr + batch * stride_scale_batch, cols_t, mask_t)

    row = batch * tokens + first
    offset_x = batch * stride_x_batch + first * stride_x_row
    offset_branch = batch * stride_branch_batch + first * stride_branch_row
    for _ in range(0, count):
        r = _add_branch(
            x_ptr, branch_ptr, r_ptr, offset_x, offset_branch, row * D, cols, mask, gate, HAS_BRANCH
        )
        if TAIL:
            r_t = _add_branch(
                x_ptr, branch_ptr, r_ptr, offset_x, offset_branch, row * D, cols_t, mask_t, gate_t, HAS_BRANCH
            )
        if HAS_NORM:
            total = tl.sum(r, axis=0)
            if TAIL:
                total += tl.sum(r_t, axis=0)
            mean = total / D
            centred = tl.where(mask, r - mean, 0.0)
            squares = tl.sum(centred * centred, axis=0)
            if TAIL:
                centred_t = tl.where(mask_t, r_t - mean, 0.0)
                squares += tl.sum(centred_t * centred_t, axis=0)
            rstd = 1.0 / tl.sqrt_rn(squares / D + eps)
            tl.store(mean_ptr + row, mean)
            tl.store(rstd_ptr + row, rstd)
            out = centred * rstd * scale + shift
            _store(out_ptr + row * D, cols, mask, out)
            if TAIL:
                out_t = centred_t * rstd * scale_t + shift_t
                _store(out_ptr + row * D, cols_t, mask_t, out_t)
        row += 1
        offset_x += stride_x_row
        offset_branch += stride_branch_row


@triton.jit(do_not_specialize=["tokens", "slabs", "rows"])
def _adaln_bwd_kernel(
    d_r_ptr, d_out_ptr, r_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, mean_ptr, rstd_ptr,
    d_x_ptr, d_branch_ptr, out_ptr, sum_gate_ptr, sum_shift_ptr, sum_scale_ptr, sum_bias_ptr,
    tokens, slabs, rows,
    stride_d_r_batch, stride_d_r_row, stride_d_out_batch, stride_d_out_row,
    stride_r_batch, stride_r_row, stride_branch_batch, stride_branch_row,
    stride_gate_batch, stride_shift_batch, stride_scale_batch,
    D: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_D_R: tl.constexpr,
    WANT_X: tl.constexpr, WANT_BRANCH: tl.constexpr, WANT_GATE: tl.constexpr, WANT_MODULATION: tl.constexpr,
    WANT_BIAS: tl.constexpr, WANT_OUT: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(0).to(tl.int64)
    batch = slab // slabs
    first = (tl.program_id(0) % slabs).to(tl.int64) * rows
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    sum_gate = tl.zeros([BLOCK], tl.float32)
    sum_shift = tl.zeros([BLOCK], tl.float32)
    sum_scale = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    if TAIL:
        cols_t = BLOCK + tl.arange(0, TAIL)
        mask_t = cols_t < D
        sum_gate_t = tl.zeros([TAIL], tl.float32)
        sum_shift_t = tl.zeros([TAIL], tl.float32)
        sum_scale_t = tl.zeros([TAIL], tl.float32)
        sum_bias_t = tl.zeros([TAIL], tl.float32)
    if WANT_BRANCH or WANT_BIAS:
        gate = _load(gate_ptr + batch * stride_gate_batch, cols, mask)
        if TAIL:
            gate_t = _load(gate_ptr + batch * stride_gate_batch, cols_t, mask_t)
    if HAS_NORM:
        scale = 1.0 + _load(scale_ptr + batch * stride_scale_batch, cols, mask)
        if TAIL:
            scale_t = 1.0 + _load(scale_ptr + batch * stride_scale_batch, cols_t, mask_t)

    for token in range(first, min(first + rows, tokens)):
        row = batch * tokens + token
        d_r = tl.zeros([BLOCK], tl.float32)
        if TAIL:
            d_r_t = tl.zeros([TAIL], tl.float32)
        if HAS_D_R:
            d_r_row = d_r_ptr + batch * stride_d_r_batch + token * stride_d_r_row
            d_r = _load(d_r_row, cols, mask)
            if TAIL:
                d_r_t = _load(d_r_row, cols_t, mask_t)
        if WANT_GATE:
            branch_row = branch_ptr + batch * stride_branch_batch + token * stride_branch_row
            branch = _load(branch_row, cols, mask)
            if TAIL:
                branch_t = _load(branch_row, cols_t, mask_t)
        if HAS_NORM:
            d_out_row = d_out_ptr + batch * stride_d_out_batch + token * stride_d_out_row
            r_row = r_ptr + batch * stride_r_batch + token * stride_r_row
            mean = tl.load(mean_ptr + row)
            rstd = tl.load(rstd_ptr + row)
            d_out = _load(d_out_row, cols, mask)
            x_hat = tl.where(mask, (_load(r_row, cols, mask) - mean) * rstd, 0.0)
            g = d_out * scale
            mean_g = tl.sum(g, axis=0)
            mean_g_x_hat = tl.sum(g * x_hat, axis=0)
            if TAIL:
                d_out_t = _load(d_out_row, cols_t, mask_t)
                x_hat_t = tl.where(mask_t, (_load(r_row, cols_t, mask_t) - mean) * rstd, 0.0)
                g_t = d_out_t * scale_t
                mean_g += tl.sum(g_t, axis=0)
                mean_g_x_hat += tl.sum(g_t * x_hat_t, axis=0)
            mean_g = mean_g / D
            mean_g_x_hat = mean_g_x_hat / D
            d_r += rstd * (g - mean_g - x_hat * mean_g_x_hat)
            if TAIL:
                d_r_t += rstd * (g_t - mean_g - x_hat_t * mean_g_x_hat)
            if WANT_OUT:
                shift_row = shift_ptr + batch * stride_shift_batch
                _store(out_ptr + row * D, cols, mask, x_hat * scale + _load(shift_row, cols, mask))
                if TAIL:
                    _store(out_ptr + row * D, cols_t, mask_t, x_hat_t * scale_t + _load(shift_row, cols_t, mask_t))
            if WANT_MODULATION:
                sum_shift += d_out
                sum_scale += d_out * x_hat
                if TAIL:
                    sum_shift_t += d_out_t
                    sum_scale_t += d_out_t * x_hat_t
        if WANT_X:
            _store(d_x_ptr + row * D, cols, mask, d_r)
            if TAIL:
                _store(d_x_ptr + row * D, cols_t, mask_t, d_r_t)
        if WANT_BRANCH:
            _store(d_branch_ptr + row * D, cols, mask, gate * d_r)
            if TAIL:
                _store(d_branch_ptr + row * D, cols_t, mask_t, gate_t * d_r_t)
        if WANT_GATE:
            sum_gate += d_r * branch
            if TAIL:
                sum_gate_t += d_r_t * branch_t
        if WANT_BIAS:
            sum_bias += d_r
            if TAIL:
                sum_bias_t += d_r_t

    if WANT_GATE:
        _store(sum_gate_ptr + slab * D, cols, mask, sum_gate)
        if TAIL:
            _store(sum_gate_ptr + slab * D, cols_t, mask_t, sum_gate_t)
    if WANT_MODULATION:
        _store(sum_shift_ptr + slab * D, cols, mask, sum_shift)
        _store(sum_scale_ptr + slab * D, cols, mask, sum_scale)
        if TAIL:
            _store(sum_shift_ptr + slab * D, cols_t, mask_t, sum_shift_t)
            _store(sum_scale_ptr + slab * D, cols_t, mask_t, sum_scale_t)
    if WANT_BIAS:
        _store(sum_bias_ptr + slab * D, cols, mask, gate * sum_bias)
        if TAIL:
            _store(sum_bias_ptr + slab * D, cols_t, mask_t, gate_t * sum_bias_t)


def adaln_fwd(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One launch: (r, out, mean, rstd), where r is empty without a branch and the others without shift and scale."""
    batch, tokens, width = x.shape
    r = x.new_empty(x.shape if branch is not None else 0)
    out = x.new_empty(x.shape, dtype=shift.dtype) if shift is not None else x.new_empty(0)
    mean, rstd = (x.new_empty((batch, tokens) if shift is not None else 0, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return r, out, mean, rstd
    x, branch = _rows(x), _rows(branch)
    gate, shift, scale = _rows(gate), _rows(shift), _rows(scale)
    config = config or row_config("adaln_fwd", width, tokens, batch, x)
    slabs = triton.cdiv(tokens, config.rows)
    with on_device(x):
        _adaln_fwd_kernel[(batch * slabs,)](
            x, branch, gate, shift, scale, r, out, mean, rstd,
            tokens, slabs, config.rows,
            *_strides(x, 2), *_strides(branch, 2), *_strides(gate, 1), *_strides(shift, 1), *_strides(scale, 1),
            eps,
            D=width, BLOCK=config.block, TAIL=config.tail,
            HAS_BRANCH=branch is not None, HAS_NORM=shift is not None,
            num_warps=config.num_warps,
        )  # fmt: skip
    return r, out, mean, rstd


def adaln_bwd(
    d_r: Tensor | None, d_out: Tensor | None, r: Tensor, branch: Tensor | None, gate: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    want_x: bool, want_branch: bool, want_gate: bool, want_modulation: bool, want_bias: bool, want_out: bool,
    partials: Sequence[Tensor] = (), config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """At most two launches: (d_x, d_branch, out, d_vectors, d_bias, sums), empty where not wanted.

    ``r`` is read where ``d_out`` is given, and only gives the shape and dtype elsewhere; ``shift`` is read for
    ``out``. ``d_vectors`` (n, B, D) holds d_gate where wanted, then d_shift and d_scale where wanted; d_bias is (D,).
    ``partials``, at most two of sum_partials' (1, n, W) from other kernels, are added up beside its own.
    """
    batch, tokens, width = r.shape
    like = next(tensor for tensor in (gate, scale) if tensor is not None)
    d_x = r.new_empty(r.shape if want_x else 0)
    d_branch = like.new_empty(r.shape if want_branch else 0)
    out = like.new_empty(r.shape if want_out else 0)
    config = config or row_config("adaln_bwd", width, tokens, batch, r)
    slabs = triton.cdiv(tokens, config.rows)
    vectors = want_gate + 2 * want_modulation
    buffer = r.new_empty(((vectors + want_bias) * batch, slabs, width), dtype=torch.float32)
    parts = list(buffer.view(-1, batch, slabs, width).unbind(0)) if r.numel() else []
    sum_gate = parts.pop(0) if want_gate and parts else None
    sum_shift, sum_scale = (parts.pop(0), parts.pop(0)) if want_modulation and parts else (None, None)
    sum_bias = parts.pop(0) if parts else None
    r, d_r, d_out, branch, gate, shift, scale = (_rows(x) for x in (r, d_r, d_out, branch, gate, shift, scale))
    if r.numel():
        with on_device(r):
            _adaln_bwd_kernel[(batch * slabs,)](
                d_r, d_out, r, branch, gate, shift, scale, mean, rstd,
                d_x, d_branch, out, sum_gate, sum_shift, sum_scale, sum_bias,
                tokens, slabs, config.rows,
                *_strides(d_r, 2), *_strides(d_out, 2), *_strides(r, 2), *_strides(branch, 2),
                *_strides(gate, 1), *_strides(shift, 1), *_strides(scale, 1),
                D=width, BLOCK=config.block, TAIL=config.tail,
                HAS_NORM=d_out is not None, HAS_D_R=d_r is not None,
                WANT_X=want_x, WANT_BRANCH=want_branch, WANT_GATE=want_gate, WANT_MODULATION=want_modulation,
                WANT_BIAS=want_bias, WANT_OUT=want_out,
                num_warps=config.num_warps, maxnreg=MAX_REGISTERS,
            )  # fmt: skip
    bias_sums = buffer[vectors * batch :].view(int(want_bias), batch * slabs, width)
    d_vectors, d_bias, *sums = sum_partials([buffer[: vectors * batch], bias_sums, *partials], like.dtype)
    return d_x, d_branch, out, d_vectors.view(vectors, batch, width), d_bias.view(-1), sums


def _rows(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last axis; a copy only where it has none."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]
