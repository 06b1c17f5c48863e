"""Which implementation a Linear with an epilogue takes, and how its GEMM is launched.

The heuristic follows the arithmetic: of each tile the useful share of its rows and columns, the share of the last
wave of programs that is filled, and the rate a tile reaches (larger tiles read each operand less often). A tuned
table overrides it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from .. import launch
from ..launch import gpu_index, uses_tf32
from .tables import tuned

Candidate = Literal["triton", "separate", "cublaslt"]


class GemmConfig(NamedTuple):
    """The implementation, and the tiles of the Triton one.

    Attributes:
        candidate: "triton"; "separate", the library's GEMM and pointwise kernels; "cublaslt", its own GELU epilogue.
        group_m: row tiles that pass all columns together.
        parts: of a tile's columns, in which the epilogue runs, for 16-bit results (see :func:`for_results`).
        max_registers: of a thread, so that two blocks share a multiprocessor; 0 leaves it to the compiler.
        tma: blocks of Hopper's persistent kernel that share a multiprocessor; 0 for the kernel with pointer loads.
    """

    candidate: Candidate
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    parts: int
    num_warps: int
    num_stages: int
    max_registers: int
    tma: int


# Hopper: one persistent block a multiprocessor, which overlaps the next tile's loads with a tile's epilogue, so that
# a short K (18 steps of 64 for 1152) does not drain the pipeline. (tile, rate beside the largest): 128 x 256 reads
# 24 KB a k-step for 4.2 MFLOP, 128 x 128 16 KB for 2.1, so its loads decide sooner.
HOPPER = (
    (GemmConfig("triton", 128, 256, 64, 8, 4, 8, 3, 0, 1), 1.0),
    (GemmConfig("triton", 128, 128, 64, 8, 4, 8, 4, 0, 1), 0.85),
    (GemmConfig("triton", 64, 128, 64, 8, 2, 4, 4, 0, 1), 0.65),
    (GemmConfig("triton", 64, 64, 64, 8, 1, 4, 5, 0, 1), 0.45),
)
# Elsewhere two blocks of 128 x 128 share a multiprocessor (128 registers a thread, 64 KB), so that one computes
# while the other is in its epilogue.
PORTABLE = (
    (GemmConfig("triton", 128, 128, 64, 8, 4, 8, 3, 128, 0), 1.0),
    (GemmConfig("triton", 64, 128, 64, 8, 4, 4, 3, 168, 0), 0.8),
    (GemmConfig("triton", 64, 64, 64, 8, 1, 4, 3, 0, 0), 0.55),
)
# fp32 by multiply-adds, where neither TF32 nor a library is wanted
IEEE = GemmConfig("triton", 64, 64, 16, 8, 1, 4, 2, 0, 0)
# all adaLN Linears in one launch: several blocks a multiprocessor, each with three k-steps of weights on their way
FEW_ROWS = (
    GemmConfig("triton", 16, 64, 64, 1, 1, 4, 4, 0, 0),
    GemmConfig("triton", 32, 64, 64, 1, 1, 4, 4, 0, 0),
    GemmConfig("triton", 64, 64, 64, 1, 1, 4, 4, 0, 0),
)
MANY_ROWS = GemmConfig("triton", 128, 128, 64, 1, 1, 8, 3, 128, 0)
_MOST_ROWS = 1024  # where reading the weights is a tenth of computing
_INTERPRETED = GemmConfig("triton", 64, 128, 64, 2, 2, 4, 1, 0, 0)  # each program and step costs milliseconds there
# compute capabilities with TMA, an asynchronous tensor core that feeds on shared memory, and 227 KB of it for a block:
# Hopper and datacenter Blackwell, not the consumers' sm_120 with 99 KB
PERSISTENT = (9, 10)
_LEAST_PART = 16  # columns: TMA moves 16 bytes or more, and 4-byte results halve a part
_LEAST_ROWS = 64  # below, reading the weight decides, and the libraries' split-K kernels win


def gemm_config(operator: str, rows: int, columns: int, inner: int, x: Tensor, demanded: bool) -> GemmConfig:
    """The configuration of ``operator`` for a GEMM of (rows, inner) by (inner, columns).

    Args:
        operator: a key of tables.OPERATORS.
        x: the operand whose dtype and device count.
        demanded: only the Triton kernel will do.
    """
    return _gemm_config(operator, rows, columns, inner, x.dtype, gpu_index(x), demanded, uses_tf32(x.dtype))


def modulations_config(
    rows: int, columns: int, inner: int, x: Tensor, dtype: torch.dtype, stored: torch.dtype, demanded: bool
) -> GemmConfig:
    """The configuration of all adaLN Linears in one launch.

    Args:
        columns: of all together.
        x: whose device counts.
        dtype: computed in.
        stored: the weights' own dtype.
        demanded: only the Triton kernel will do.
    """
    return _modulations_config(rows, columns, inner, dtype, stored, gpu_index(x), demanded, uses_tf32(dtype))


@lru_cache(maxsize=4096)
def _modulations_config(
    rows: int,
    columns: int,
    inner: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    gpu: int | None,
    demanded: bool,
    tf32: bool,
) -> GemmConfig:
    if gpu is None:
        return _INTERPRETED._replace(block_m=16)
    config = modulations_heuristic(rows, dtype, stored, launch.gpu(gpu).capability[0], demanded, tf32)
    chosen = config._replace(**tuned(gpu, "modulations", dtype, (columns, inner), (rows,)))
    inapplicable = (dtype == torch.float32 and not tf32) or stored != dtype or chosen.tma
    return config if inapplicable or (demanded and chosen.candidate != "triton") else chosen


def modulations_heuristic(
    rows: int, dtype: torch.dtype, stored: torch.dtype, major: int, demanded: bool = False, tf32: bool = False
) -> GemmConfig:
    """The choice from the arithmetic alone: few rows are bound by reading the weights, once and by many blocks; many
    by computing, where the libraries' own GEMMs are ahead."""
    ieee = dtype == torch.float32 and not tf32
    few = FEW_ROWS[:1] if ieee else FEW_ROWS
    config = next((tile for tile in few if rows <= tile.block_m), IEEE if ieee else MANY_ROWS)
    if config is MANY_ROWS:
        if major not in PERSISTENT:
            config = config._replace(block_k=32, num_stages=4)  # 64 spills
        elif stored == dtype:
            config = config._replace(max_registers=0)  # both operands stay in shared memory
    if stored.itemsize == 4 and config != IEEE:  # half the k-step for the same shared memory
        config = config._replace(block_k=config.block_k // 2)
    most = few[0].block_m if ieee else _MOST_ROWS
    return config if demanded or rows <= most else config._replace(candidate="separate")


@lru_cache(maxsize=4096)
def _gemm_config(
    operator: str, rows: int, columns: int, inner: int, dtype: torch.dtype, gpu: int | None, demanded: bool, tf32: bool
) -> GemmConfig:
    if gpu is None:
        return _INTERPRETED._replace(block_m=sum_rows(rows, dtype))
    _, (major, _), multiprocessors = launch.gpu(gpu)
    config = heuristic(operator, rows, columns, inner, dtype, major, multiprocessors, demanded, tf32)
    chosen = config._replace(**tuned(gpu, operator, dtype, (columns, inner), (rows,)))
    inapplicable = (
        (dtype == torch.float32 and (demanded or not tf32))  # a table is tuned with one setting of the switch
        or (demanded and chosen.candidate != "triton")
        or (operator == "linear_gelu_backward" and chosen.block_m != sum_rows(rows, dtype))
        or (chosen.tma and major not in PERSISTENT)
        or chosen.block_n < _LEAST_PART * chosen.parts
    )
    return config if inapplicable else chosen


def for_results(config: GemmConfig, dtype: torch.dtype) -> GemmConfig:
    """The configuration for results of ``dtype``: 4-byte ones, of fp32 operands or an fp32 stream beside 16-bit ones,
    take twice the parts, for the same shared memory and registers at a time."""
    if dtype != torch.float32:
        return config
    if config.max_registers == 128 and config.block_k == 64:
        config = config._replace(block_k=32, num_stages=4)  # 64 spills
    return config._replace(parts=2 * config.parts)


def sum_rows(rows: int, dtype: torch.dtype) -> int:
    """The rows of a tile of GELU's gradient: they decide how many partial sums its bias gradient has, which
    torch.compile must know whatever a table says."""
    return 128 if rows >= 4096 and dtype != torch.float32 else 64


def heuristic(
    operator: str,
    rows: int,
    columns: int,
    inner: int,
    dtype: torch.dtype,
    major: int,
    multiprocessors: int,
    demanded: bool = False,
    tf32: bool = False,
) -> GemmConfig:
    """The choice from the arithmetic alone.

    Args:
        major: of the compute capability.
        multiprocessors: of the GPU.
    """
    if dtype == torch.float32 and not tf32:
        # cuBLAS's fp32 GEMM is far ahead of a tile of multiply-adds; the epilogue is a small part of it
        return IEEE if demanded else IEEE._replace(candidate="separate")
    tiles = HOPPER if major in PERSISTENT else PORTABLE
    if operator == "linear_gelu_backward":
        tiles = tuple(entry for entry in tiles if entry[0].block_m == sum_rows(rows, dtype))

    def rate(entry: tuple[GemmConfig, float]) -> float:
        config, speed = entry
        down, across = -(-rows // config.block_m), -(-columns // config.block_n)
        useful = rows * columns / (down * config.block_m * across * config.block_n)
        slots = multiprocessors * (config.tma or 2)
        waves = down * across / slots
        return speed * useful * waves / -(-down * across // slots)

    config = max(tiles, key=rate)[0]
    if operator == "linear_gelu_backward" and config.max_registers == 128:
        config = config._replace(block_k=32, num_stages=4)  # 64 spills with triton 3.6
    if dtype == torch.float32:  # 4-byte operands: half the k-step for the same shared memory
        config = config._replace(block_k=32)
    candidate: Candidate = "triton"
    if not demanded:
        if operator == "linear_gelu":
            candidate = "cublaslt"  # its epilogue costs nothing, and its GEMM is the one to beat
        elif rows < _LEAST_ROWS:
            candidate = "separate"
    return cast(GemmConfig, config._replace(candidate=candidate))


#: what a changed table makes stale
CACHES = (_gemm_config, _modulations_config)
