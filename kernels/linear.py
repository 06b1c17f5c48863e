"""Launchers of the GEMMs with an epilogue (gemm.py), and GELU's gradient without a GEMM before it.

x (M, K), weight (N, K), out (M, N); bias (N,) or None. x and weight have contiguous last axes and any row stride.
K and N are positive multiples of 8.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs.gemm import PORTABLE, GemmConfig, for_results, gemm_config, sum_rows, uses_tf32
from .gemm import _gelu_gate, _gelu_slope, _gemm_kernel, _gemm_tma_kernel
from .launch import gpu, gpu_index, interpreting, on_device

_INTERPRETED_PROGRAMS = 3  # of the persistent kernel: few, so that each takes several tiles
_GRAD_COLS, _GRAD_CHUNK = 128, 16  # of GELU's gradient without a GEMM: 16 elements a thread at a time


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, save: bool, config: GemmConfig | None = None
) -> tuple[Tensor, Tensor]:
    """(gelu_tanh(pre), pre) of pre = x W^T + b in one launch; pre is empty unless ``save``."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    pre = torch.empty_like(out) if save else x.new_empty(0)
    operator = "linear_gelu_save" if save else "linear_gelu"
    _gemm(operator, "gelu", x, weight, True, bias, None, None, out, pre if save else None, None, config)
    return out, pre


def linear_gated_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    save: bool,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(residual + gate * branch, branch) of branch = x W^T + b in one launch.

    gate (B, N), any row stride; residual (B, T, N), any strides, B T = M. branch (M, N) is empty unless ``save``.
    """
    out = residual.new_empty(residual.shape)
    branch = x.new_empty((x.shape[0], weight.shape[0])) if save else x.new_empty(0)
    operator = "linear_gated_residual_save" if save else "linear_gated_residual"
    saved = branch if save else None
    _gemm(operator, "gated_residual", x, weight, True, bias, gate, residual, out, saved, None, config)
    return out, branch


def linear_gelu_backward(
    d_out: Tensor, weight: Tensor, pre: Tensor, want_bias: bool, config: GemmConfig | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_pre, gelu_tanh(pre), partial sums) of d_pre = (d_out W) * gelu_tanh'(pre) in one launch.

    d_out (M, K); weight (K, N), of the Linear after the GELU; pre (M, N). The partial sums (1, n, N) in fp32 add up
    over n to the gradient of the bias before the GELU; empty unless ``want_bias``.
    """
    rows, columns = pre.shape
    config = config or gemm_config("linear_gelu_backward", rows, columns, weight.shape[0], d_out, True)
    d_pre, act = torch.empty_like(pre), torch.empty_like(pre)
    tiles = triton.cdiv(rows, config.block_m)
    sums = pre.new_empty((1, tiles, columns) if want_bias else 0, dtype=torch.float32)
    partial = sums if want_bias else None
    _gemm("linear_gelu_backward", "gelu_grad", d_out, weight, False, None, None, pre, d_pre, act, partial, config)
    return d_pre, act, sums


def _gemm(
    operator: str,
    epilogue: str,
    a: Tensor,
    b: Tensor,
    transposed: bool,
    bias: Tensor | None,
    gate: Tensor | None,
    aux: Tensor | None,
    out: Tensor,
    saved: Tensor | None,
    sums: Tensor | None,
    config: GemmConfig | None,
) -> None:
    if out.numel() == 0:
        return
    (rows, inner), columns = a.shape, b.shape[0 if transposed else 1]
    config = config or gemm_config(operator, rows, columns, inner, a, True)
    tokens = rows // gate.shape[0] if gate is not None else 1
    a, b, gate, bias = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (a, b, gate, bias))
    out = out.view(rows, columns)
    aux = aux if aux is None else aux.contiguous().view(rows, columns)
    if config.tma and not all(_takes_tma(x) for x in (a, b, aux, out, saved) if x is not None):
        config = _plain(config.block_m, a)
    config = for_results(config, out.dtype)
    low = a.dtype in (torch.bfloat16, torch.float16)
    shared: dict[str, Any] = {
        "TRANSPOSED": transposed,
        "EPILOGUE": epilogue,
        "ONE_SAMPLE": tokens % config.block_m == 0,
        "FAST": low and not interpreting(),
        "PRECISION": "tf32" if a.dtype == torch.float32 and uses_tf32() else "ieee",
        "UPCAST": a.dtype == torch.bfloat16 and interpreting(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PARTS": config.parts,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.max_registers:
        shared["maxnreg"] = config.max_registers
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    stride_gate = 0 if gate is None else gate.stride(0)
    with on_device(a):
        if config.tma:
            index = gpu_index(a)
            programs = _INTERPRETED_PROGRAMS if index is None else config.tma * gpu(index).multiprocessors
            part = [config.block_m, config.block_n // config.parts]
            block_b = [config.block_n, config.block_k] if transposed else [config.block_k, config.block_n]
            _gemm_tma_kernel[(min(programs, tiles),)](
                _descriptor(a, [config.block_m, config.block_k]), _descriptor(b, block_b), bias, gate,
                *(None if x is None else _descriptor(x, part) for x in (aux, out, saved)), sums,
                rows, columns, inner, tokens, stride_gate,
                PROGRAMS=programs, **shared,
            )  # fmt: skip
        else:
            _gemm_kernel[(tiles,)](
                a, b, bias, gate, aux, out, saved, sums,
                rows, columns, inner, tokens, a.stride(0), b.stride(0), stride_gate,
                EVEN_K=inner % config.block_k == 0, **shared,
            )  # fmt: skip


def _takes_tma(x: Tensor) -> bool:
    """Whether a matrix can be described to TMA: 16-byte address and row stride, rows that do not overlap."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) >= x.shape[1]


def _plain(block_m: int, a: Tensor) -> GemmConfig:
    """Pointer loads with tiles of as many rows: the partial sums have one row a tile."""
    tile = next((tile for tile, _ in PORTABLE if tile.block_m == block_m), PORTABLE[-1][0])
    return tile._replace(block_m=block_m, block_k=tile.block_k * 2 // a.element_size())


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


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


def gelu_backward(d_act: Tensor, pre: Tensor, want_act: bool, want_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`linear_gelu_backward` without its GEMM: d_pre = d_act * gelu_tanh'(pre), in one launch.

    d_act (M, N); the activation is empty unless ``want_act``.
    """
    rows, columns = pre.shape
    d_pre = torch.empty_like(pre)
    act = torch.empty_like(pre) if want_act else pre.new_empty(0)
    block = sum_rows(rows, pre.dtype)
    tiles = triton.cdiv(rows, block)
    sums = pre.new_empty((1, tiles, columns) if want_bias else 0, dtype=torch.float32)
    if d_pre.numel():
        d_act = d_act if d_act.stride(-1) == 1 else d_act.contiguous()
        with on_device(pre):
            _gelu_bwd_kernel[(tiles * triton.cdiv(columns, _GRAD_COLS),)](
                d_act, pre, d_pre, act if want_act else None, sums if want_bias else None,
                rows, columns, d_act.stride(0),
                ROWS=block, COLS=_GRAD_COLS, CHUNK=_GRAD_CHUNK, FAST=pre.dtype != torch.float32 and not interpreting(),
                num_warps=4,
            )  # fmt: skip
    return d_pre, act, sums
