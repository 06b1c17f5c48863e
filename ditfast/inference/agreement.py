"""Whether two runs of a function gave the same results, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


def agree(actual: Any, expected: Any, bound: float = 0.0) -> bool:
    """Whether two pytrees have the same leaves, tensors within a relative distance; NaN and inf are like any value."""
    (leaves, spec), (other_leaves, other_spec) = tree_flatten(actual), tree_flatten(expected)
    return spec == other_spec and all(_alike(*pair, bound) for pair in zip(leaves, other_leaves, strict=True))


def rounding(tensors: Iterable[Tensor]) -> float:
    """How far apart two runs may be by their kernels' rounding: half the digits of the coarsest dtype at work."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.bfloat16)
    return math.sqrt(max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0))


def is_whole(tensor: Tensor) -> bool:
    """Whether its values are integers or booleans."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def _alike(actual: Any, expected: Any, bound: float) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return type(actual) is type(expected) and bool(actual == expected)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if is_whole(expected):
        return torch.equal(actual, expected)
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    others = [value.masked_fill(finite, 0).nan_to_num(12345.0) for value in (actual, expected)]
    distance, norm = (
        torch.linalg.vector_norm(value.masked_fill(~finite, 0)) for value in (actual - expected, expected)
    )
    return torch.equal(*others) and bool(distance <= bound * norm)
