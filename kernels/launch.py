"""Where kernels run: which GPU a tensor is on, what that GPU is, and launches that go there.

Kernels and operators learn about a GPU only here, so that a rehearsal (rehearsal/) can replace torch.cuda's answers.
Importing this needs no triton.

Triton compiles a kernel once more where an integer argument becomes 1, or a multiple of 16. Those that change with the
batch or the tokens and gain nothing by it are kept out of this (do_not_specialize, at each kernel).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gpu(NamedTuple):
    """A GPU as far as a launch depends on it.

    Attributes:
        name: as its driver gives it.
        capability: major and minor.
        multiprocessors: their number.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int


#: while kernels are rehearsed: (index, GPU) that CPU tensors are taken to be on
rehearsed: tuple[int, Gpu] | None = None


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a CUDA device."""
    return x.is_cuda or (rehearsed is not None and x.is_cpu)


def gpu_index(x: Tensor) -> int | None:
    """x's CUDA device, or None."""
    if x.is_cuda:
        return x.get_device()
    return rehearsed[0] if rehearsed is not None and x.is_cpu else None


def gpu_exists() -> bool:
    """Whether there is any; a fake tensor may be on one all the same."""
    return rehearsed is not None or torch.cuda.is_available()


def gpu(index: int) -> Gpu:
    """The GPU of this index."""
    return rehearsed[1] if rehearsed is not None and rehearsed[0] == index else _cuda_gpu(index)


@lru_cache(maxsize=64)
def _cuda_gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launches within go to x's GPU, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: decided by TRITON_INTERPRET when they were defined."""
    import triton

    return bool(triton.knobs.runtime.interpret)
