"""Which implementation an operator runs: the one switch, and the choice behind it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor

from ..kernels.launch import gpu, gpu_index, interpreting, on_gpu
from ..reference.transforms import in_forward_mode, in_nested_gradients, in_second_order, in_trace, in_vmap
from .attention_implementations import AttentionBackend, machine_reason

Backend = Literal["auto", "triton", "torch"]

_PLAIN = (Tensor, torch.nn.Parameter)

NOT_TWICE = "its gradient has no derivative (torch.func.grad within another gradient)"

MAX_WIDTH = 8192  # elements of a row: a row kernel keeps one in registers

_backend: ContextVar[Backend] = ContextVar("ditfast_backend", default="auto")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Chooses the operators' implementation within a ``with`` block, for this thread or task.

    "auto" (the default) takes the fastest implementation that fits the tensors, "torch" the formula. "triton"
    demands the Triton kernel of every operator that has one, or raises; meta tensors trace the launches of a GPU
    under it (timestep_embedding and conditioning run their formulas under torch.compile). A compiled function keeps the
    choice made when it was traced.

    The kernels have first gradients. Forward-mode derivatives (``torch.func.jvp``), vmap, gradients of gradients within
    torch.func's transforms and ``torch.jit.trace`` take the formula under "auto", and are refused under "triton". A
    kernel's gradient, differentiated after all, raises, and names what to do.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def current_backend() -> Backend:
    """The backend in force here: what ``use_backend`` set, or "auto"."""
    return _backend.get()


# Dynamo cannot trace ContextVar.get; torch.compiler.assume_constant_result sets this mark too, but imports
# Dynamo and Triton first
current_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast casts to on a device type, or None where it is off (or unknown, as on meta)."""
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch 2.11's Dynamo refuses to trace it


def sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor; torch has the operators' sharding rules from then on."""
    if type(x) in _PLAIN or type(x).__name__ != "DTensor":  # by name: importing it takes half a second
        return False
    _register_sharding_rules()
    return True


@lru_cache(maxsize=1)
def _registered() -> None:
    from . import sharding

    sharding.register()


def _register_sharding_rules() -> None:
    _registered()  # Dynamo looks through a cache's wrapper and misses the mark below


def takes_triton(operator: str, x: Tensor, width: int, others: Iterable[Tensor | None] = ()) -> bool:
    """Whether an operator runs its Triton kernel for a tensor like x with rows of ``width`` elements.

    "auto" takes the kernel on a GPU that has it, "triton" also for CPU tensors in Triton's interpreter and for
    meta tensors, which trace the fused path. ``others`` are further tensors that may want a gradient: where that may be
    differentiated in turn, which a kernel's refuses, "auto" takes the formula.

    Raises:
        RuntimeError: a kernel was asked for by ``use_backend("triton")`` and cannot run, with the reason.
    """
    backend = current_backend()
    if backend == "torch" or (backend == "auto" and not on_gpu(x)):
        return False
    sharded(x)  # whose rules torch needs before a kernel's operator is called
    reason = triton_reason(x, width)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"ditfast.ops.{operator} cannot run its Triton kernel: {reason}")
    return reason is None and not (backend == "auto" and in_second_order(chain((x,), others)))


def triton_reason(x: Tensor, width: int) -> str | None:
    """Why no Triton kernel runs for a tensor like x with rows of ``width`` elements, or None."""
    reason = transform_reason()
    if reason is not None:
        reason = f"{reason}; use_backend(\"torch\") takes the formula"
    elif x.dtype == torch.float64:
        reason = "the kernels compute in fp32, and their input is fp64"
    elif width > MAX_WIDTH:
        reason = f"the kernels take rows of at most {MAX_WIDTH} elements, got {width}"
    elif on_gpu(x):
        reason = _gpu_unavailable(gpu_index(x) or 0)
    elif x.device.type == "cpu":
        reason = interpreter_unavailable()
    elif x.device.type != "meta":
        reason = f"there are no kernels for {x.device.type} tensors"
    return reason


def transform_reason() -> str | None:
    """Which of torch's transforms in force here a fused kernel does not serve, or None."""
    if in_forward_mode():
        return "it has no forward-mode derivative (torch.func.jvp)"
    if in_vmap():
        return "it has no rule for torch.vmap"
    if in_nested_gradients():
        return NOT_TWICE
    if in_trace():
        return "torch.jit.trace would not record its gradient"
    return None


def _gpu_unavailable(index: int) -> str | None:
    """Why the kernels cannot run on a GPU, or None."""
    return _gpu_reason(index)  # Dynamo looks through a cache's wrapper and misses the mark below


@lru_cache(maxsize=32)
def _gpu_reason(index: int) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    major, minor = gpu(index).capability
    return None if major >= 8 else f"the kernels need sm_80 or newer, the GPU is sm_{major}{minor}"


def interpreter_unavailable() -> str | None:
    """Why CPU tensors cannot run a kernel, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting():
        return None
    return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the process starts"


_register_sharding_rules._dynamo_marked_constant = True  # type: ignore[attr-defined]
_gpu_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
interpreter_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available_backends() -> list[tuple[str, str, str | None]]:
    """(operator family, backend, why it is unavailable or None), for ``ditfast info``."""
    current = torch.cuda.current_device() if torch.cuda.is_available() else None
    no_cuda = "it needs a CUDA GPU" if current is None else None
    adaln = interpreter_unavailable() if current is None else _gpu_unavailable(current)
    return [
        ("adaln", "torch", None),
        ("adaln", "triton", adaln),
        ("conditioning", "torch", None),
        ("conditioning", "triton", adaln),
        ("linear", "torch", None),
        ("linear", "cublaslt", no_cuda),
        ("linear", "triton", adaln),
        ("attention", "triton", adaln),
        *(
            ("attention", name, machine_reason(name, current))
            for name in get_args(AttentionBackend)
            if name != "triton"
        ),
    ]
