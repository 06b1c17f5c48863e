"""Kernels as torch operators, so that torch.compile, meta tensors and profilers see one call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("ditfast", "FRAGMENT")


def register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Gives a defined operator its kernel, for CUDA and for the CPU in Triton's interpreter, and its fake."""
    for key in ("CUDA", "CPU"):
        library.impl(name, kernel, key)
    torch.library.register_fake(f"ditfast::{name}", fake, lib=library)
