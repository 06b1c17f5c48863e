"""Switching fp32 matmuls between full precision and TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_precision(mode: str) -> Iterator[None]:
    """fp32 matmuls in "highest" (fp32) or "high" (TF32) precision within a ``with`` block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
