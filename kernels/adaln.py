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

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs.rows import RowConfig, row_config
from .launch import Launch, empty_like
from .sums import SumPartials


class Wants(NamedTuple):
    """Which results of the backward are wanted; ``modulation``: d_shift and d_scale, ``out``: the modulated norm."""

    x: bool = False
    branch: bool = False
    gate: bool = False
    modulation: bool = False
    bias: bool = False
    out: bool = False


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
            if mean_ptr is not None:
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
    d_x_ptr, d_branch_ptr, out_ptr, sums_ptr, sum_bias_ptr,
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

    if WANT_GATE or WANT_MODULATION:
        sums_ptr += slab * D
        # a row a program; known to be a multiple of what D is one of
        stride_sums = tl.num_programs(0).to(tl.int64) * D
    if WANT_GATE:
        _store(sums_ptr, cols, mask, sum_gate)
        if TAIL:
            _store(sums_ptr, cols_t, mask_t, sum_gate_t)
        sums_ptr += stride_sums
    if WANT_MODULATION:
        _store(sums_ptr, cols, mask, sum_shift)
        _store(sums_ptr + stride_sums, cols, mask, sum_scale)
        if TAIL:
            _store(sums_ptr, cols_t, mask_t, sum_shift_t)
            _store(sums_ptr + stride_sums, cols_t, mask_t, sum_scale_t)
    if WANT_BIAS:
        _store(sum_bias_ptr + slab * D, cols, mask, gate * sum_bias)
        if TAIL:
            _store(sum_bias_ptr + slab * D, cols_t, mask_t, gate_t * sum_bias_t)


class AdaLNForward:
    """One launch: (r, out, mean, rstd), None where there is none: r without a branch, the others without shift and
    scale, mean and rstd unless ``save``. out is a matrix (B * T, D) where ``flat``."""

    def __init__(
        self,
        tensors: Sequence[Any],
        eps: float,
        save: bool = True,
        config: RowConfig | None = None,
        flat: bool = False,
    ) -> None:
        """tensors: (x, branch, gate, shift, scale), None in pairs."""
        x, branch, gate, shift, scale = map(_rows, tensors)
        batch, tokens, width = x.shape
        self._dtype = None if shift is None else shift.dtype
        self._is_contiguous = x.is_contiguous()
        self._out = (batch * tokens, width) if flat else None
        self._saves = save and shift is not None
        self._copies = any(map(operator.is_not, (x, branch, gate, shift, scale), tensors))
        config = config or row_config("adaln_fwd", width, tokens, batch, x)
        slabs = triton.cdiv(tokens, config.rows)
        self._launch = Launch(
            x, _adaln_fwd_kernel, (batch * slabs,),
            (
                tokens, slabs, config.rows,
                *_strides(x, 2), *_strides(branch, 2), *_strides(gate, 1), *_strides(shift, 1), *_strides(scale, 1),
                eps, width, config.block, config.tail, branch is not None, shift is not None,
            ),
            num_warps=config.num_warps,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if self._copies:
            x, branch, gate, shift, scale = map(_rows, (x, branch, gate, shift, scale))
        r = None
        if branch is not None:
            r = torch.empty_like(x) if self._is_contiguous else empty_like(x)  # the first is the faster one
        if self._out is not None:
            out = x.new_empty(self._out, dtype=self._dtype)
        else:
            out = None if self._dtype is None else empty_like(x, self._dtype)
        mean, rstd = None, None
        if self._saves:
            mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
        if x.numel():
            self._launch(x, branch, gate, shift, scale, r, out, mean, rstd)
        return r, out, mean, rstd


class AdaLNBackward:
    """At most two launches: (d_x, d_branch, out, d_vectors, d_bias, sums), the first five None where not wanted.

    ``r`` is read where ``d_out`` is given, and only gives the shape and dtype elsewhere; ``shift`` is read for
    ``out``. ``d_vectors`` (n, B, D) holds d_gate where wanted, then d_shift and d_scale where wanted; d_bias is (D,).
    ``partials``, at most two of sum_partials' (1, n, W) from other kernels, are added up beside its own.
    """

    def __init__(self, tensors: Sequence[Any], wants: Wants, config: RowConfig | None = None) -> None:
        """tensors: those of the call, in order."""
        d_r, d_out, r, branch, gate, shift, scale = map(_rows, tensors[:7])
        partials = tensors[9:]
        batch, tokens, width = r.shape
        self._wants = wants
        self._dtype = next(x for x in (gate, scale) if x is not None).dtype
        self._copies = any(map(operator.is_not, (d_r, d_out, r, branch, gate, shift, scale), tensors))
        config = config or row_config("adaln_bwd", width, tokens, batch, r)
        slabs = triton.cdiv(tokens, config.rows)
        self._launch = Launch(
            r, _adaln_bwd_kernel, (batch * slabs,),
            (
                tokens, slabs, config.rows,
                *_strides(d_r, 2), *_strides(d_out, 2), *_strides(r, 2), *_strides(branch, 2),
                *_strides(gate, 1), *_strides(shift, 1), *_strides(scale, 1),
                width, config.block, config.tail, d_out is not None, d_r is not None,
                wants.x, wants.branch, wants.gate, wants.modulation, wants.bias, wants.out,
            ),
            num_warps=config.num_warps, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        vectors = wants.gate + 2 * wants.modulation
        self._vectors = (vectors * batch, slabs, width) if vectors else None
        self._bias = (1, batch * slabs, width) if wants.bias else None
        own = [r.new_empty(shape, dtype=torch.float32) for shape in (self._vectors, self._bias) if shape is not None]
        self._sum = SumPartials([*own, *partials], self._dtype) if own or partials else None

    def __call__(
        self, d_r: Tensor | None, d_out: Tensor | None, r: Tensor, branch: Tensor | None, gate: Tensor | None,
        shift: Tensor | None, scale: Tensor | None, mean: Tensor | None, rstd: Tensor | None, *partials: Tensor,
    ) -> tuple[Any, ...]:  # fmt: skip
        wants = self._wants
        if self._copies:
            d_r, d_out, r, branch, gate, shift, scale = map(_rows, (d_r, d_out, r, branch, gate, shift, scale))
        d_x = empty_like(r) if wants.x else None
        d_branch = empty_like(r, self._dtype) if wants.branch else None
        out = empty_like(r, self._dtype) if wants.out else None
        vectors = None if self._vectors is None else r.new_empty(self._vectors, dtype=torch.float32)
        bias = None if self._bias is None else r.new_empty(self._bias, dtype=torch.float32)
        if r.numel():
            self._launch(d_r, d_out, r, branch, gate, shift, scale, mean, rstd, d_x, d_branch, out, vectors, bias)
        sums = [] if self._sum is None else self._sum(*(x for x in (vectors, bias) if x is not None), *partials)
        d_vectors = None if vectors is None else sums.pop(0).view(wants.gate + 2 * wants.modulation, *r.shape[::2])
        d_bias = None if bias is None else sums.pop(0).view(-1)
        return d_x, d_branch, out, d_vectors, d_bias, sums


def _rows(x: Any) -> Any:
    """x with a contiguous last axis; a copy only where it has none."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]
