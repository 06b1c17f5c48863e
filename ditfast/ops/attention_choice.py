"""Which implementation self_attention takes: what the GPU's tuned table says, else a heuristic.

A table (kernels/configs/tables.py) holds the choice as "attention_inference" and "attention_training", keyed by head
dim and tokens. An entry is used only if its backend is available. The batch never counts: a sample's results must not
change with its neighbours. What is compiled takes this project's kernels or SDPA's own choice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from ..kernels import launch
from .attention_implementations import AttentionBackend, case_reason, machine_reason

MAX_HEAD_DIM = 128  # of this project's kernels: a head's accumulators stay in registers


class Case(NamedTuple):
    """What the choice depends on besides the GPU; ``training``: whether a gradient will be wanted."""

    tokens: int
    head_dim: int
    dtype: torch.dtype
    biased: bool
    training: bool


# what a GPU's table says: (training, dtype, head_dim, tokens at most, backend) of each entry
_Entries = tuple[tuple[bool, torch.dtype, int, int, AttentionBackend], ...]


def choose(case: Case, gpu: int | None) -> AttentionBackend:
    """The implementation "auto" takes on a CUDA device that runs the Triton kernels.

    Args:
        gpu: its index; None for a fake one, which has neither packages nor a table.
    """
    return _choose(case, gpu) if torch.compiler.is_compiling() else _chosen_before(case, gpu)


def _choose(case: Case, gpu: int | None) -> AttentionBackend:
    major, entries = _gpu_facts(gpu)
    for training, dtype, head_dim, tokens, backend in () if case.biased else entries:
        # a bucket ends at its power of two and begins behind the one before
        same = (training, dtype, head_dim) == (case.training, case.dtype, case.head_dim)
        if same and tokens < 2 * max(case.tokens, 1) <= 2 * tokens and _applies(backend, case, major, gpu):
            return backend
    return heuristic(case, major, lambda package: _applies(package, case, major, gpu))


_chosen_before = lru_cache(maxsize=4096)(_choose)


def _applies(backend: AttentionBackend, case: Case, major: int, gpu: int | None) -> bool:
    if backend == "triton":
        return case.head_dim <= MAX_HEAD_DIM
    if backend == "sdpa" or torch.compiler.is_compiling():
        return backend == "sdpa"
    refused = case_reason(backend, case.head_dim, case.dtype, case.biased, case.training, major)
    return gpu is not None and refused is None and machine_reason(backend, gpu) is None


def heuristic(
    case: Case, major: int, has: Callable[[AttentionBackend], bool] = lambda package: False
) -> AttentionBackend:
    """The choice without a table.

    This project's kernels take head dims that the libraries pad (72 runs as 80 here, as 96 or 128 there), and
    training, where their gradients land in the packed projection and SDPA's are copied twice. What is left is
    inference at 64 and 128: FlashAttention's package for the architecture where there is one (by its authors' and
    others' figures ahead of the rest there), else SDPA, which takes FlashAttention 2, or cuDNN on Hopper with a recent
    one.

    Args:
        major: of the compute capability.
        has: whether a package of FlashAttention is there and takes the case.
    """
    # rows of other head dims are no multiples of 16 bytes
    fits = case.head_dim % 8 == 0 and case.head_dim <= MAX_HEAD_DIM
    if fits and (case.training or case.head_dim & (case.head_dim - 1) != 0):
        return "triton"
    package: AttentionBackend = "flash_attn_3" if major == 9 else "flash_attn_4"
    return package if major >= 9 and has(package) else "sdpa"


def _gpu_facts(gpu: int | None) -> tuple[int, _Entries]:
    """A GPU's major capability and its table: constant while a process runs (but for tuning), and so for Dynamo, which
    unpacks no NamedTuple that it is given as a constant."""
    return _facts(gpu)


_gpu_facts._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=32)
def _facts(gpu: int | None) -> tuple[int, _Entries]:
    if gpu is None:
        return 8, ()
    from ..kernels.configs import tables  # imports triton

    entries = []
    for key, fields in tables.load(launch.gpu(gpu).name).items():
        operator, dtype, *sizes = key.split("/")
        if operator in ("attention_inference", "attention_training") and len(sizes) == 2 and "candidate" in fields:
            head_dim, tokens = map(int, sizes)
            training = operator == "attention_training"
            entries.append((training, getattr(torch, dtype), head_dim, tokens, fields["candidate"]))
    return launch.gpu(gpu).capability[0], tuple(entries)


def forget() -> None:
    """Has the tables read again at the next choice."""
    _facts.cache_clear()
    _chosen_before.cache_clear()
