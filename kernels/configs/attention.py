"""How the attention kernels are launched: a heuristic that works everywhere, overridden by tuned tables (tables.py)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import launch
from ..launch import gpu_index, uses_tf32
from .tables import tuned


class AttentionConfig(NamedTuple):
    """How an attention kernel is launched: rows the program owns, rows of the loop, warps, stages of its pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def head_lanes(head_dim: int) -> tuple[int, int]:
    """(block, tail) lanes of a head, powers of two of at least 16: 72 is 64 + 16, 120 is 128."""
    block = 1 << (head_dim.bit_length() - 1)
    tail = max(triton.next_power_of_2(head_dim - block), 16) if head_dim > block else 0
    return (max(block, 16), tail) if tail < block else (2 * block, 0)


def launch_config(operator: str, qkv: Tensor, biased: bool) -> AttentionConfig:
    """How a kernel is launched for a packed projection: as its GPU's table says, else by the heuristic.

    Tables are tuned without a bias, and in fp32 under TF32. Neither depends on the batch: a sample's results must not
    change with its neighbours.
    """
    _, tokens, _, _, head_dim = qkv.shape
    tunable = not biased and (qkv.dtype != torch.float32 or uses_tf32(qkv.dtype))
    return _launch_config(operator, head_dim, tokens, qkv.dtype, gpu_index(qkv), biased, tunable)


@lru_cache(maxsize=4096)
def _launch_config(
    operator: str,
    head_dim: int,
    tokens: int,
    dtype: torch.dtype,
    gpu: int | None,
    biased: bool,
    tunable: bool,
) -> AttentionConfig:
    capability = None if gpu is None else launch.gpu(gpu).capability
    config = attention_config(operator, head_dim, tokens, dtype, capability, biased)
    if operator == "attention_dbias":
        return config
    fields = tuned(gpu, operator, dtype, (head_dim,), (tokens,))
    tiles = -(-tokens // fields.get("block_m", config.block_m))
    if operator != "attention_fwd" and tiles > sum_slots(tokens, head_dim, dtype, biased):
        fields = {}  # they would not find room for their sums
    return config._replace(**fields) if tunable else config


def sum_slots(tokens: int, head_dim: int, dtype: torch.dtype, biased: bool) -> int:
    """Rows of the backward's ``sums`` a sample: no fewer than the tiles of either kernel in any configuration.

    It follows from the arguments alone, for torch.compile must know it.
    """
    return -(-tokens // (64 if dtype.itemsize == 2 and head_dim <= 96 and not biased else 32))


# operator -> ((lanes of a head up to which, configuration), ...). What decides: no spills with either triton (compiled
# ahead of time, see aot/attention.py), then two warps or more for each scheduler, then tall tiles, which read k and v
# (q and d_out for dkv) fewer times. Ampere: within the 99 KB of shared memory of its smaller kinds.
_AMPERE = {
    "attention_fwd": ((80, (128, 32, 4, 3)), (128, (128, 64, 8, 3))),
    "attention_dq": ((64, (64, 64, 4, 2)), (128, (64, 32, 4, 2))),
    "attention_dkv": ((32, (64, 64, 4, 2)), (96, (64, 32, 4, 2)), (128, (32, 32, 4, 2))),
    "attention_dbias": ((128, (32, 64, 4, 2)),),
}
_HOPPER = {
    "attention_fwd": ((128, (128, 64, 8, 3)),),
    "attention_dq": ((64, (128, 64, 8, 2)), (96, (64, 64, 4, 2)), (128, (128, 64, 8, 2))),
    "attention_dkv": ((96, (64, 64, 4, 2)), (128, (64, 32, 4, 2))),
    "attention_dbias": ((128, (64, 32, 4, 2)),),
}


@lru_cache(maxsize=4096)
def attention_config(
    operator: str,
    head_dim: int,
    tokens: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    bias: bool = False,
) -> AttentionConfig:
    """The heuristic for "attention_fwd", "attention_dq", "attention_dkv" or "attention_dbias"."""
    if capability is None:
        return AttentionConfig(32 if dtype == torch.float32 else 64, 32, 4, 2)
    lanes = sum(head_lanes(head_dim))
    hopper = capability[0] in (9, 10)
    table = _FP32 if dtype == torch.float32 else _HOPPER if hopper else _AMPERE
    config = next(config for limit, config in table[operator] if lanes <= limit)
    if bias and dtype != torch.float32 and operator != "attention_dbias" and (not hopper or tokens % 16):
        # the bias takes registers too, most where its rows are not aligned and each element is a load of its own
        config = (64, 32, 4, 2) if hopper or operator != "attention_dkv" else (32, 16, 4, 2)
        if operator == "attention_dq" and tokens <= SPLIT_TOKENS and not hopper:
            config = (32, 32, 4, 2)
    return fitted(config, head_dim, tokens)


def fitted(config: tuple[int, int, int, int], head_dim: int, tokens: int) -> AttentionConfig:
    """The configuration with tiles no larger than the tokens."""
    block_m, block_n = (min(block, max(triton.next_power_of_2(tokens), 16)) for block in config[:2])
    # as many rows a warp, but wide heads want their lanes spread
    warps = max(config[2] * block_m // config[0], 1 if sum(head_lanes(head_dim)) <= 64 else 4)
    return AttentionConfig(block_m, block_n, warps, config[3])


SPLIT_TOKENS = 128  # up to which the backward's launches split (attention_bwd.py): at most two tiles of 64 keys
# without TF32 the operands lie in registers too; the same for every architecture. Of some head dims the compiler spills
# 8 or 16 bytes here, to fit one more block on a multiprocessor
_FP32 = {
    "attention_fwd": ((128, (64, 32, 8, 2)),),
    "attention_dq": ((96, (64, 32, 8, 2)), (128, (32, 16, 4, 2))),
    "attention_dkv": ((128, (32, 16, 4, 2)),),
    "attention_dbias": ((128, (32, 32, 8, 2)),),
}
