"""Which implementation an operator runs: the one switch, and the choice behind it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]

_backend: ContextVar[Backend] = ContextVar("ditfast_backend", default="auto")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Chooses the operators' implementation within a ``with`` block, for this thread or task.

    "auto" (the default) takes the fastest implementation that fits the tensors, "torch" the formula,
    "triton" the Triton kernel or an error. A compiled function keeps the choice made when it was traced.

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


@torch.compiler.assume_constant_result  # Dynamo cannot trace ContextVar.get
def current_backend() -> Backend:
    """The backend in force here: what ``use_backend`` set, or "auto"."""
    return _backend.get()


def choose(operator: str) -> Literal["auto", "torch"]:
    """The choice for an operator that has no Triton kernel.

    Raises:
        RuntimeError: a kernel was asked for by ``use_backend("triton")``.
    """
    backend = current_backend()
    if backend == "triton":
        raise RuntimeError(
            f'{operator} has no Triton kernel in this version; use_backend("auto") or ("torch") runs its formula'
        )
    return backend


def flash_attn_unavailable() -> str | None:
    """Why flash-attn cannot be used in this process, or None where it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install ditfast[flash])"
    if not torch.cuda.is_available():
        return "flash-attn needs a CUDA GPU"
    return None


def available_backends() -> list[tuple[str, str, str | None]]:
    """(operator family, backend, why it is unavailable or None), for ``ditfast info``."""
    no_kernel = "no Triton kernel in this version"
    no_cuda = None if torch.cuda.is_available() else "needs a CUDA GPU"
    return [
        ("adaln", "torch", None),
        ("adaln", "triton", no_kernel),
        ("linear", "torch", None),
        ("linear", "cublaslt", no_cuda),
        ("linear", "triton", no_kernel),
        ("attention", "sdpa", None),
        ("attention", "flash_attn", flash_attn_unavailable()),
        ("attention", "triton", no_kernel),
    ]
