"""The numerics rule: errors against the fp64 oracle, judged by the reference's own error in the working dtype.

err(a) = ||a - oracle|| / ||oracle|| over the whole tensor, finiteness checked first. An operator or gradient
passes when err <= 2 * err(yardstick) + eps(dtype) / 2; a whole model when
err <= 1.25 * err(yardstick) + eps(dtype) / 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["operator", "model"]

#: Ends of the names of parameters whose gradient vanishes exactly, so that no relative error exists: a constant
#: on every key leaves the softmax as it is.
VANISHING = ("cross_attn.k.bias", "k_norm.bias")

# kind -> (factor on the yardstick's error, share of eps(dtype) granted beside it)
_RULES: dict[Kind, tuple[float, float]] = {"operator": (2.0, 0.5), "model": (1.25, 0.25)}


@dataclass(frozen=True)
class Verdict:
    """The error of a result, the yardstick's error, and the bound that follows from it."""

    error: float
    yardstick: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """||actual - oracle|| / ||oracle|| in fp64; inf where ``actual`` is not finite, 0 for empty tensors.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != oracle.shape:
        raise ValueError(f"actual must have the oracle's shape {tuple(oracle.shape)}, got {tuple(actual.shape)}")
    if not bool(torch.isfinite(actual).all()):
        return math.inf
    reference = oracle.detach().double()
    distance = torch.linalg.vector_norm(actual.detach().to(reference) - reference).item()
    norm = torch.linalg.vector_norm(reference).item()
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return float(distance / norm)


def judge(kind: Kind, actual: Tensor, yardstick: Tensor, oracle: Tensor, dtype: torch.dtype) -> Verdict:
    """Applies the rule to one tensor.

    Args:
        kind: "operator" (also for gradients of operators) or "model" (outputs and parameter gradients).
        actual: the result in question.
        yardstick: the reference's result, run eagerly in the working dtype.
        oracle: the reference's result in fp64.
        dtype: the working dtype.
    """
    factor, share = _RULES[kind]
    reference_error = relative_error(yardstick, oracle)
    bound = factor * reference_error + share * torch.finfo(dtype).eps
    return Verdict(relative_error(actual, oracle), reference_error, bound if math.isfinite(bound) else 0.0)
