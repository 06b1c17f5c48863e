"""The configurations that ``ditfast tune`` tries beside the heuristic's and the libraries', most promising first."""

from __future__ import annotations

from functools import partial

from ditfast.kernels.configs.gemm import GemmConfig

# GEMM tiles for 16-bit operands; for 4-byte ones block_k is half. With tma block_m is 64 or 128: a matrix that TMA
# cannot describe falls back to pointers with the same rows.
_tile = partial(GemmConfig, "triton")

# All compile within a block's shared memory and without spills for sm_90, the portable ones for sm_80 too (bf16; with
# triton 3.6 two of them spill 8 bytes there).
# Hopper: persistent, one block a multiprocessor; two, so that one computes while the other is in its epilogue; last,
# pointer loads with two blocks sharing one.
HOPPER = (
    _tile(128, 256, 64, 8, 4, 8, 3, 0, 1),
    _tile(128, 256, 64, 8, 8, 8, 4, 0, 1),
    _tile(128, 256, 64, 8, 8, 8, 3, 0, 1),
    _tile(128, 256, 64, 16, 4, 8, 3, 0, 1),
    _tile(128, 256, 64, 4, 4, 8, 3, 0, 1),
    _tile(128, 128, 64, 8, 4, 8, 4, 0, 1),
    _tile(128, 128, 64, 8, 4, 8, 5, 0, 1),
    _tile(128, 128, 64, 8, 4, 4, 4, 0, 1),
    _tile(128, 128, 128, 8, 4, 8, 2, 0, 1),
    _tile(64, 256, 64, 8, 4, 4, 4, 0, 1),
    _tile(64, 128, 64, 8, 2, 4, 4, 0, 1),
    _tile(64, 128, 128, 8, 2, 4, 3, 0, 1),
    _tile(64, 64, 64, 8, 1, 4, 5, 0, 1),
    _tile(64, 64, 128, 8, 1, 4, 4, 0, 1),
    _tile(128, 128, 64, 8, 8, 4, 3, 0, 2),
    _tile(128, 128, 64, 8, 4, 4, 3, 0, 2),
    _tile(64, 128, 64, 8, 2, 4, 3, 0, 2),
    _tile(128, 128, 64, 8, 4, 8, 3, 128, 0),
    _tile(64, 128, 64, 8, 4, 4, 3, 168, 0),
    _tile(64, 64, 64, 8, 1, 4, 4, 0, 0),
)
# Elsewhere two blocks or more share a multiprocessor.
PORTABLE = (
    _tile(128, 128, 64, 8, 4, 8, 3, 128, 0),
    _tile(128, 128, 64, 16, 4, 8, 3, 128, 0),
    _tile(128, 128, 32, 8, 4, 8, 4, 128, 0),
    _tile(128, 128, 64, 8, 4, 8, 3, 0, 0),
    _tile(128, 64, 64, 8, 2, 4, 3, 0, 0),
    _tile(64, 256, 32, 8, 4, 8, 3, 0, 0),
    _tile(64, 128, 64, 8, 4, 4, 3, 168, 0),
    _tile(64, 128, 32, 8, 4, 4, 4, 0, 0),
    _tile(64, 64, 64, 8, 1, 4, 3, 0, 0),
    _tile(64, 64, 64, 8, 1, 4, 4, 0, 0),
    _tile(64, 64, 128, 8, 1, 4, 3, 0, 0),
)

# All adaLN Linears in one launch: bound by reading the weights, so what counts is how much of them is on its way.
MODULATIONS = (
    _tile(16, 64, 64, 1, 1, 4, 4, 0, 0),
    _tile(16, 128, 64, 1, 1, 4, 4, 0, 0),
    _tile(16, 32, 128, 1, 1, 4, 4, 0, 0),
    _tile(16, 64, 128, 1, 1, 4, 3, 0, 0),
    _tile(16, 64, 64, 1, 1, 4, 6, 0, 0),
    _tile(32, 64, 64, 1, 1, 4, 4, 0, 0),
    _tile(64, 64, 64, 1, 1, 4, 4, 0, 0),
    _tile(64, 128, 64, 1, 1, 4, 3, 0, 0),
    _tile(128, 64, 64, 1, 1, 4, 3, 0, 0),
    _tile(128, 128, 64, 1, 1, 8, 3, 128, 0),
    _tile(128, 128, 32, 1, 1, 8, 4, 128, 0),
)

# Row kernels: warps of a program, while a lane holds so many elements of the row; rows of a backward's program.
WARPS = (4, 8, 2, 1, 16)
LANE_ELEMENTS = (4, 32)
BACKWARD_ROWS = (32, 16, 64, 8)

# Attention: (rows owned, rows walked over, warps, stages). On an Ampere some of the larger spill, which costs them the
# race. A backward's launches own at least as many rows as a row of sums stands for.
ATTENTION = {
    "attention_fwd": (
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 4, 3),
        (128, 32, 4, 3),
        (64, 64, 4, 3),
        (128, 128, 8, 2),
        (64, 32, 4, 3),
        (64, 128, 4, 2),
        (256, 64, 8, 2),
        (64, 64, 4, 2),
    ),
    "attention_dq": (
        (128, 64, 8, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 32, 4, 3),
        (128, 32, 8, 2),
        (128, 64, 8, 3),
        (128, 32, 4, 2),
        (64, 64, 4, 1),
        (128, 128, 8, 1),
    ),
    "attention_dkv": (
        (64, 64, 4, 2),
        (64, 32, 4, 2),
        (64, 32, 4, 3),
        (128, 64, 8, 2),
        (128, 32, 8, 2),
        (64, 64, 4, 1),
        (64, 64, 4, 3),
        (128, 64, 8, 1),
    ),
}
