"""The numerics rule: errors against the fp64 oracle, judged by the reference's own error in the working dtype.

err(a) = ||a - oracle|| / ||oracle|| over the whole tensor, finiteness checked first. An operator or gradient
passes when err <= 2 * err(yardstick) + eps(dtype) / 2; a whole model when
err <= 1.25 * err(yardstick) + eps(dtype) / 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["operator", "model"]
Tensors = Tensor | Sequence[Tensor]

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


def relative_error(actual: Tensors, oracle: Tensors) -> float:
    """||actual - oracle|| / ||oracle|| in fp64; inf where ``actual`` is not finite, 0 for empty tensors.

    Several tensors count as one that holds all their values.

    Raises:
        ValueError: the shapes differ.
    """
    pairs = list(zip(_each(actual), _each(oracle), strict=True))
    for x, y in pairs:
        if x.shape != y.shape:
            raise ValueError(f"actual must have the oracle's shape {tuple(y.shape)}, got {tuple(x.shape)}")
    if not all(bool(torch.isfinite(x).all()) for x, _ in pairs):
        return math.inf
    exact = [y.detach().double() for _, y in pairs]
    differences = [x.detach().to(y) - y for (x, _), y in zip(pairs, exact, strict=True)]
    distance, norm = (math.hypot(*(torch.linalg.vector_norm(x).item() for x in xs)) for xs in (differences, exact))
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / norm


def _each(tensors: Tensors) -> Sequence[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else tensors


def judge(
    kind: Kind, actual: Tensors, yardstick: Tensors, oracle: Tensors, dtype: torch.dtype, slack: float = 1
) -> Verdict:
    """Applies the rule to one tensor, or to several together.

    Args:
        kind: "operator" (also for gradients of operators) or "model" (outputs and parameter gradients).
        actual: the result in question.
        yardstick: the reference's result, run eagerly in the working dtype.
        oracle: the reference's result in fp64.
        dtype: the working dtype.
        slack: a further factor on the yardstick's error, where rounding is a matter of chance.
    """
    factor, share = _RULES[kind]
    reference_error = relative_error(yardstick, oracle)
    bound = slack * factor * reference_error + share * torch.finfo(dtype).eps
    return Verdict(relative_error(actual, oracle), reference_error, bound if math.isfinite(bound) else 0.0)
