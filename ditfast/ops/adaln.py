"""adaLN: the modulated norm, the gated residual, and both at once."""

from __future__ import annotations

from torch import Tensor

from ..reference import ops as formulas
from . import check
from .adaln_library import adaln
from .backend import takes_triton


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift, the norm without affine parameters.

    Source: Peebles & Xie, section 3.2, "Adaptive layer norm (adaLN) block".

    Args:
        x: (B, T, D); shift's dtype, or fp32 beside bf16 and fp16.
        shift, scale: (B, D), of one dtype; any row stride (chunks of a (B, 6D) modulation are used as they are).
        eps: added to the variance.

    Returns:
        (B, T, D) in shift's dtype.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, naming the argument.
    """
    check.tensor("x", x, 3)
    _check_norm(x, "x", shift, scale, eps)
    if takes_triton("layer_norm_modulate", x, x.shape[2], (shift, scale)):
        return adaln(x, None, None, shift, scale, eps)[1]
    return formulas.layer_norm_modulate(x, shift, scale, eps)


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """residual + gate * branch.

    Source: Peebles & Xie, section 3.2, "adaLN-Zero block".

    Args:
        residual: (B, T, D); branch's dtype, or fp32 beside bf16 and fp16.
        branch: (B, T, D).
        gate: (B, D) in branch's dtype; any row stride.

    Returns:
        (B, T, D) in residual's dtype.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, naming the argument.
    """
    _check_residual(residual, branch, gate)
    if takes_triton("gated_residual", residual, residual.shape[2], (branch, gate)):
        return adaln(residual, branch, gate, None, None)[0]
    return formulas.gated_residual(residual, branch, gate)


def gated_residual_layer_norm_modulate(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The gated residual, then its modulated norm: the border between two halves of a block, or two blocks.

    Args:
        residual: (B, T, D); branch's dtype, or fp32 beside bf16 and fp16.
        branch: (B, T, D).
        gate, shift, scale: (B, D) in branch's dtype; any row stride.
        eps: added to the variance.

    Returns:
        (residual + gate * branch in residual's dtype, its modulated norm in shift's dtype), both (B, T, D).

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, naming the argument.
    """
    _check_residual(residual, branch, gate)
    _check_norm(residual, "residual", shift, scale, eps)
    check.same_dtype("shift", shift, "branch", branch)
    others = (branch, gate, shift, scale)
    if takes_triton("gated_residual_layer_norm_modulate", residual, residual.shape[2], others):
        return adaln(residual, branch, gate, shift, scale, eps)
    return formulas.gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps)


def _check_norm(x: Tensor, name: str, shift: Tensor, scale: Tensor, eps: float) -> None:
    check.modulation("shift", shift, x)
    check.modulation("scale", scale, x)
    check.same_dtype("scale", scale, "shift", shift)
    check.stream(name, x, "shift", shift)
    check.epsilon(eps)


def _check_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> None:
    check.tensor("residual", residual, 3)
    check.tensor("branch", branch, 3)
    check.shape("branch", branch, tuple(residual.shape))
    check.same_device("branch", branch, residual)
    check.modulation("gate", gate, residual)
    check.same_dtype("gate", gate, "branch", branch)
    check.stream("residual", residual, "branch", branch)
