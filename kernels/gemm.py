"""GEMMs with an epilogue: bias, GELU, the gated residual, and GELU's gradient.

    acc = A B (fp32);  A (M, K) row-major;  B the transpose of a Linear's weight (N, K), or (K, N) as it lies
    gelu:           pre = acc + bias;  out = gelu_tanh(pre)                                 may store pre
    gated_residual: branch = acc + bias;  out = residual + gate[row // tokens] * branch     may store branch
    gelu_grad:      out = acc * gelu_tanh'(pre);  stores gelu_tanh(pre) and, on demand, each tile's column sums of out

Two kernels share one epilogue: pipelined pointer loads for any GPU from sm_80 on, and for Hopper a persistent one
with TMA (host descriptors) and wgmma. Ragged M, N and K are masked; K and N are positive multiples of 8 (16-byte
rows). Where ``pre`` is stored, the activation is taken of the rounded value, so that the backward computes the same
again.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu_gate(x, FAST: tl.constexpr):
    """(s, s (1 - s)) with gelu_tanh(x) = x * s and s = (1 + tanh(z)) / 2 = sigmoid(2 z)."""
    z = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    if FAST:  # one instruction, right to 2^-11: enough for 16-bit results
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)
        s = 0.5 * t + 0.5
        slope = 0.25 - 0.25 * t * t
    else:
        e = tl.exp(-2.0 * tl.abs(z))  # never overflows, and 1 - s does not cancel
        r = 1.0 / (1.0 + e)
        s = tl.where(z >= 0, r, e * r)
        slope = e * r * r
    return s, slope


@triton.jit
def _gelu_slope(x, s, slope):
    """gelu_tanh'(x), from what _gelu_gate gives for x."""
    return s + 2.0 * x * slope * (0.7978845608028654 * (1.0 + 3 * 0.044715 * x * x))


@triton.jit
def _laid_out_as(x, other):
    """x in the registers of other: else the compiler may keep x in those it was loaded to as well, and do whatever is
    computed of it twice."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f,f", [x, other], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _load_tile(source, row, col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """A tile of a contiguous matrix, zero outside: by its descriptor, or by its pointer."""
    if TMA:
        tile = source.load([row, col])
    else:
        offs_row, offs_col = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        tile = tl.load(source + offs_row.to(tl.int64)[:, None] * cols + offs_col[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _store_tile(target, value, row, col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """Stores a tile of a contiguous matrix, in its dtype."""
    if TMA:
        target.store([row, col], value.to(target.dtype))
    else:
        offs_row, offs_col = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        offsets = offs_row.to(tl.int64)[:, None] * cols + offs_col[None, :]
        tl.store(target + offsets, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _load_gate(
    gate_ptr, row, col, M, N, tokens, stride_gate, ROWS: tl.constexpr, COLS: tl.constexpr, ONE: tl.constexpr
):
    """The gates of a tile's rows: one vector where the tile lies in ONE sample, else each row its own sample's."""
    offs_col = col + tl.arange(0, COLS)
    if ONE:
        sample = (row // tokens).to(tl.int64)
        gate = tl.load(gate_ptr + sample * stride_gate + offs_col, mask=offs_col < N, other=0.0)[None, :]
    else:
        offs_row = row + tl.arange(0, ROWS)
        offsets = (offs_row // tokens).to(tl.int64)[:, None] * stride_gate + offs_col[None, :]
        gate = tl.load(gate_ptr + offsets, mask=(offs_row < M)[:, None] & (offs_col < N)[None, :], other=0.0)
    return gate.to(tl.float32)


@triton.jit
def _epilogue(
    acc, row, col, tile_m,
    bias_ptr, gate_ptr, aux, out, saved, sums_ptr,
    M, N, tokens, stride_gate,
    EPILOGUE: tl.constexpr, ONE_SAMPLE: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Finishes a tile, or a part of its columns. aux is the residual, or the stored pre-activation."""
    offs_col = col + tl.arange(0, COLS)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_col, mask=offs_col < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "gelu":
        if saved is not None:
            rounded = acc.to(saved.dtype if TMA else saved.dtype.element_ty)
            _store_tile(saved, rounded, row, col, M, N, ROWS, COLS, TMA)
            acc = rounded.to(tl.float32)
        s, _ = _gelu_gate(acc, FAST)
        acc = acc * s
    elif EPILOGUE == "gated_residual":
        if saved is not None:
            _store_tile(saved, acc, row, col, M, N, ROWS, COLS, TMA)
        gate = _load_gate(gate_ptr, row, col, M, N, tokens, stride_gate, ROWS, COLS, ONE_SAMPLE)
        residual = _load_tile(aux, row, col, M, N, ROWS, COLS, TMA)
        acc = residual.to(tl.float32) + gate * acc
    elif EPILOGUE == "gelu_grad":
        pre = _load_tile(aux, row, col, M, N, ROWS, COLS, TMA).to(tl.float32)
        if TMA and FAST:
            pre = _laid_out_as(pre, acc)
        s, slope = _gelu_gate(pre, FAST)
        _store_tile(saved, pre * s, row, col, M, N, ROWS, COLS, TMA)
        acc = acc * _gelu_slope(pre, s, slope)
        if sums_ptr is not None:  # rows past M hold zeros
            tl.store(sums_ptr + tile_m.to(tl.int64) * N + offs_col, tl.sum(acc, axis=0), mask=offs_col < N)
    _store_tile(out, acc, row, col, M, N, ROWS, COLS, TMA)


@triton.jit
def _finish(
    acc, row, col, tile_m,
    bias_ptr, gate_ptr, aux, out, saved, sums_ptr,
    M, N, tokens, stride_gate,
    EPILOGUE: tl.constexpr, ONE_SAMPLE: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The epilogue in PARTS (a power of two) of the columns: less shared memory and fewer registers at a time."""
    if PARTS == 1:
        _epilogue(
            acc, row, col, tile_m, bias_ptr, gate_ptr, aux, out, saved, sums_ptr,
            M, N, tokens, stride_gate,
            EPILOGUE, ONE_SAMPLE, FAST, ROWS, COLS, TMA,
        )  # fmt: skip
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLS // 2)), (0, 2, 1)))
        _finish(
            left, row, col, tile_m, bias_ptr, gate_ptr, aux, out, saved, sums_ptr,
            M, N, tokens, stride_gate,
            EPILOGUE, ONE_SAMPLE, FAST, ROWS, COLS // 2, TMA, PARTS // 2,
        )  # fmt: skip
        _finish(
            right, row, col + COLS // 2, tile_m, bias_ptr, gate_ptr, aux, out, saved, sums_ptr,
            M, N, tokens, stride_gate,
            EPILOGUE, ONE_SAMPLE, FAST, ROWS, COLS // 2, TMA, PARTS // 2,
        )  # fmt: skip


@triton.jit
def _tile(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile_m, tile_n): GROUP_M row tiles go through all columns together, so that both operands stay in L2."""
    group = index // (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    within = index % (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows, within // rows


@triton.jit(do_not_specialize=["M", "tokens"])
def _gemm_kernel(
    a_ptr, b_ptr, bias_ptr, gate_ptr, aux_ptr, out_ptr, saved_ptr, sums_ptr,
    M, N, K, tokens, stride_a, stride_b, stride_gate,
    TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, ONE_SAMPLE: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    offs_m, offs_n, offs_k = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
    a_ptrs = a_ptr + offs_m.to(tl.int64)[:, None] * stride_a + offs_k[None, :]
    if TRANSPOSED:  # b is (N, K)
        b_ptrs = b_ptr + offs_n.to(tl.int64)[None, :] * stride_b + offs_k[:, None]
        step_b = BLOCK_K
    else:  # b is (K, N)
        b_ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * stride_b + offs_n[None, :]
        step_b = BLOCK_K * stride_b
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=mask_m, other=0.0)
            b = tl.load(b_ptrs, mask=mask_n, other=0.0)
        else:
            a = tl.load(a_ptrs, mask=mask_m & (offs_k < K - k)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_n & (offs_k < K - k)[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies the bits of bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += step_b
    _finish(
        acc, row, col, tile_m, bias_ptr, gate_ptr, aux_ptr, out_ptr, saved_ptr, sums_ptr,
        M, N, tokens, stride_gate,
        EPILOGUE, ONE_SAMPLE, FAST, BLOCK_M, BLOCK_N, False, PARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "tokens"])
def _gemm_tma_kernel(
    a_desc, b_desc, bias_ptr, gate_ptr, aux_desc, out_desc, saved_desc, sums_ptr,
    M, N, K, tokens, stride_gate,
    TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, ONE_SAMPLE: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)  # else the whole epilogue is compiled a second time, for an empty sum
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        tile_m, tile_n = _tile(index, tiles_m, tiles_n, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([row, k])
            b = b_desc.load([col, k]).T if TRANSPOSED else b_desc.load([k, col])
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        _finish(
            acc, row, col, tile_m, bias_ptr, gate_ptr, aux_desc, out_desc, saved_desc, sums_ptr,
            M, N, tokens, stride_gate,
            EPILOGUE, ONE_SAMPLE, FAST, BLOCK_M, BLOCK_N, True, PARTS,
        )  # fmt: skip
