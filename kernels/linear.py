"""Plans (launch.py) of the GEMMs with an epilogue (gemm.py), and GELU's gradient without a GEMM before it.

x (M, K), weight (N, K), out (M, N); bias (N,) or None. x and weight have contiguous last axes and any row stride.
K and N are positive multiples of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs.gemm import PORTABLE, GemmConfig, for_results, gemm_config, sum_rows
from .gemm import _gelu_gate, _gelu_slope, _gemm_kernel, _gemm_tma_kernel
from .launch import Launch, empty_like, gpu, gpu_index, interpreting, uses_tf32

_INTERPRETED_PROGRAMS = 3  # of the persistent kernel: few, so that each takes several tiles
_GRAD_COLS, _GRAD_CHUNK = 128, 16  # of GELU's gradient without a GEMM: 16 elements a thread at a time


class LinearGelu:
    """(gelu_tanh(pre), pre) of pre = x W^T + b in one launch; pre is None unless ``save``."""

    def __init__(self, tensors: Sequence[Any], save: bool, config: GemmConfig | None = None) -> None:
        """tensors: (x, weight, bias)."""
        x, weight, bias = tensors
        self._shape = x.shape[0], weight.shape[0]
        self._save = save
        operator = "linear_gelu_save" if save else "linear_gelu"
        config = config or gemm_config(operator, *self._shape, x.shape[1], x, True)
        self._gemm = _Gemm("gelu", (x, weight, bias, None, None), True, x.dtype, config)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = x.new_empty(self._shape)
        pre = empty_like(out) if self._save else None
        self._gemm(x, weight, bias, None, None, out, pre, None)
        return out, pre


class LinearGatedResidual:
    """(residual + gate * branch, branch) of branch = x W^T + b in one launch.

    gate (B, N), any row stride; residual (B, T, N), any strides, B T = M. branch (M, N) is None unless ``save``.
    """

    def __init__(self, tensors: Sequence[Any], save: bool, config: GemmConfig | None = None) -> None:
        """tensors: (x, weight, bias, gate, residual)."""
        x, weight, _, _, residual = tensors
        self._shape = x.shape[0], weight.shape[0]
        self._save = save
        operator = "linear_gated_residual_save" if save else "linear_gated_residual"
        config = config or gemm_config(operator, *self._shape, x.shape[1], x, True)
        self._gemm = _Gemm("gated_residual", tensors, True, residual.dtype, config)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        out = empty_like(residual)
        branch = x.new_empty(self._shape) if self._save else None
        self._gemm(x, weight, bias, gate, residual, out, branch, None)
        return out, branch


class LinearGeluBackward:
    """(d_pre, gelu_tanh(pre), partial sums) of d_pre = (d_out W) * gelu_tanh'(pre) in one launch.

    d_out (M, K); weight (K, N), of the Linear after the GELU; pre (M, N). The partial sums (1, n, N) in fp32 add up
    over n to the gradient of the bias before the GELU; None unless ``want_bias``.
    """

    def __init__(self, tensors: Sequence[Any], want_bias: bool, config: GemmConfig | None = None) -> None:
        """tensors: (d_out, weight, pre)."""
        d_out, weight, pre = tensors
        rows, columns = pre.shape
        config = config or gemm_config("linear_gelu_backward", rows, columns, weight.shape[0], d_out, True)
        self._sums = (1, triton.cdiv(rows, config.block_m), columns) if want_bias else None
        self._gemm = _Gemm("gelu_grad", (d_out, weight, None, None, pre), False, pre.dtype, config)

    def __call__(self, d_out: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        d_pre, act = empty_like(pre), empty_like(pre)
        sums = None if self._sums is None else pre.new_empty(self._sums, dtype=torch.float32)
        self._gemm(d_out, weight, None, None, pre, d_pre, act, sums)
        return d_pre, act, sums


class _Gemm:
    """A launch of either kernel; results are contiguous, and what does not lie as a kernel reads it is copied."""

    def __init__(
        self, epilogue: str, tensors: Sequence[Any], transposed: bool, dtype: torch.dtype, config: GemmConfig
    ) -> None:
        """tensors: (a, b, bias, gate, aux); dtype: of the results."""
        a, b, _, gate, _ = tensors
        (rows, inner), columns = a.shape, b.shape[0 if transposed else 1]
        tokens = rows // gate.shape[0] if gate is not None and rows else 1
        self._copies = [x is not None and x.stride(-1) != 1 for x in tensors[:4]]
        self._contiguous = tensors[4] is None or tensors[4].is_contiguous()
        stride_a, stride_b, stride_gate = (
            0 if x is None else x.stride(0) if x.stride(-1) == 1 else x.shape[1] for x in (a, b, gate)
        )
        if config.tma and not all(_takes_tma(*x) for x in ((a, stride_a), (b, stride_b))):
            config = _plain(config.block_m, a)
        # for tensors that begin elsewhere than at multiples of 16 bytes
        self._unaligned = (
            _Gemm(epilogue, tensors, transposed, dtype, _plain(config.block_m, a)) if config.tma else None
        )
        config = for_results(config, dtype)
        constants = (
            transposed, epilogue, tokens % config.block_m == 0,
            a.dtype in (torch.bfloat16, torch.float16) and not interpreting(),
            "tf32" if uses_tf32(a.dtype) else "ieee", a.dtype == torch.bfloat16 and interpreting(),
        )  # fmt: skip
        tile = config.block_m, config.block_n, config.block_k, config.group_m, config.parts
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if config.max_registers:
            options["maxnreg"] = config.max_registers
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
        if config.tma:
            index = gpu_index(a)
            programs = _INTERPRETED_PROGRAMS if index is None else config.tma * gpu(index).multiprocessors
            rest = rows, columns, inner, tokens, stride_gate, *constants, *tile, programs
            self._launch = Launch(a, _gemm_tma_kernel, (min(programs, tiles),), rest, **options)
            block_b = [config.block_n, config.block_k] if transposed else [config.block_k, config.block_n]
            part = [rows, columns], [columns, 1], [config.block_m, config.block_n // config.parts]
            self._described = (
                ([rows, inner], [stride_a, 1], [config.block_m, config.block_k]),
                (list(b.shape), [stride_b, 1], block_b),
                None, None, part, part, part, None,
            )  # fmt: skip
        else:
            even_k = inner % config.block_k == 0
            rest = rows, columns, inner, tokens, stride_a, stride_b, stride_gate, *constants, even_k, *tile
            self._launch = Launch(a, _gemm_kernel, (tiles,), rest, **options)
            self._described = None

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        aux: Tensor | None,
        out: Tensor,
        saved: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        if not out.numel():
            return
        if True in self._copies:
            a, b, bias, gate = (
                x.contiguous() if copied else x for x, copied in zip((a, b, bias, gate), self._copies, strict=True)
            )
        if not self._contiguous:
            aux = aux.contiguous()
        tensors = a, b, bias, gate, aux, out, saved, sums
        if self._described is None:
            self._launch(*tensors)
            return
        pairs = [*zip(tensors, self._described, strict=True)]
        if any(x is not None and layout is not None and x.data_ptr() % 16 for x, layout in pairs):
            self._unaligned(*tensors)
        else:
            described = (x if x is None or layout is None else TensorDescriptor(x, *layout) for x, layout in pairs)
            self._launch(*described)


def _takes_tma(x: Tensor, stride: int) -> bool:
    """Whether a matrix of such rows can be described to TMA: a 16-byte row stride, rows that do not overlap."""
    return stride * x.element_size() % 16 == 0 and stride >= x.shape[1]


def _plain(block_m: int, a: Tensor) -> GemmConfig:
    """Pointer loads with tiles of as many rows: the partial sums have one row a tile."""
    tile = next((tile for tile, _ in PORTABLE if tile.block_m == block_m), PORTABLE[-1][0])
    return tile._replace(block_m=block_m, block_k=tile.block_k * 2 // a.element_size())


@triton.jit(do_not_specialize=["M"])
def _gelu_bwd_kernel(
    d_act_ptr, pre_ptr, d_pre_ptr, act_ptr, sums_ptr, M, N, stride_d_act,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, COLS)
    tile_m = tl.program_id(0) // tiles_n
    offs_n = (tl.program_id(0) % tiles_n) * COLS + tl.arange(0, COLS)
    total = tl.zeros([CHUNK, COLS], tl.float32)
    for first in range(tile_m * ROWS, min(tile_m * ROWS + ROWS, M), CHUNK):
        offs_m = first + tl.arange(0, CHUNK)
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        offsets = rows * N + offs_n[None, :]
        d_act = tl.load(d_act_ptr + rows * stride_d_act + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        pre = tl.load(pre_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        s, slope = _gelu_gate(pre, FAST)
        d_pre = d_act * _gelu_slope(pre, s, slope)
        tl.store(d_pre_ptr + offsets, d_pre.to(d_pre_ptr.dtype.element_ty), mask=mask)
        if act_ptr is not None:
            tl.store(act_ptr + offsets, (pre * s).to(act_ptr.dtype.element_ty), mask=mask)
        total += d_pre
    if sums_ptr is not None:
        tl.store(sums_ptr + tile_m.to(tl.int64) * N + offs_n, tl.sum(total, axis=0), mask=offs_n < N)


class GeluBackward:
    """As :class:`LinearGeluBackward` without its GEMM: d_pre = d_act * gelu_tanh'(pre), in one launch.

    d_act (M, N); the activation is None unless ``want_act``.
    """

    def __init__(self, tensors: Sequence[Any], want_act: bool, want_bias: bool) -> None:
        """tensors: (d_act, pre)."""
        d_act, pre = tensors
        rows, columns = pre.shape
        self._want_act = want_act
        self._copies = d_act.stride(-1) != 1
        block = sum_rows(rows, pre.dtype)
        tiles = triton.cdiv(rows, block)
        self._sums = (1, tiles, columns) if want_bias else None
        stride = columns if self._copies else d_act.stride(0)
        fast = pre.dtype != torch.float32 and not interpreting()
        grid = tiles * triton.cdiv(columns, _GRAD_COLS)
        rest = rows, columns, stride, block, _GRAD_COLS, _GRAD_CHUNK, fast
        self._launch = Launch(pre, _gelu_bwd_kernel, (grid,), rest, num_warps=4)

    def __call__(self, d_act: Tensor, pre: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        d_pre = empty_like(pre)
        act = empty_like(pre) if self._want_act else None
        sums = None if self._sums is None else pre.new_empty(self._sums, dtype=torch.float32)
        if d_pre.numel():
            self._launch(d_act.contiguous() if self._copies else d_act, pre, d_pre, act, sums)
        return d_pre, act, sums
