"""adaLN (the modulated norm, the gated residual, both at once): public functions, torch.library operators, autograd."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.launch import Layouts, keep, kept, planned
from ..reference import ops as formulas
from . import check
from .backend import Kernel, apply, direct_layouts, library, register, run, takes_triton, wants_gradient


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
    tensors = x, None, None, shift, scale
    key = _key(tensors, eps)
    if (plan := kept(key)) is not None:
        return cast(Tensor, plan(*tensors)[1])
    check.tensor("x", x, 3)
    _check_norm(x, "x", shift, scale, eps)
    if takes_triton("layer_norm_modulate", x, x.shape[2], (shift, scale)):
        return _checked(key, *tensors, eps)[1]
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
    tensors = residual, branch, gate, None, None
    key = _key(tensors, 0.0)
    if (plan := kept(key)) is not None:
        return cast(Tensor, plan(*tensors)[0])
    _check_residual(residual, branch, gate)
    if takes_triton("gated_residual", residual, residual.shape[2], (branch, gate)):
        return _checked(key, *tensors, 0.0)[0]
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
    tensors = residual, branch, gate, shift, scale
    key = _key(tensors, eps)
    if (plan := kept(key)) is not None:
        r, out, _, _ = plan(*tensors)
        return r, out
    _check_residual(residual, branch, gate)
    _check_norm(residual, "residual", shift, scale, eps)
    check.same_dtype("shift", shift, "branch", branch)
    if takes_triton("gated_residual_layer_norm_modulate", residual, residual.shape[2], tensors[1:]):
        return _checked(key, *tensors, eps)
    return formulas.gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps)


def _key(tensors: Sequence[Tensor | None], eps: float) -> Hashable:
    """Of the plan of a public operator's calls, without gradients, whose tensors were checked; None of other calls."""
    layouts = direct_layouts(*tensors)  # type: ignore[arg-type]
    if layouts is None or type(eps) is not float or wants_gradient(*tensors):
        return None
    return "adaln", eps, layouts


def _checked(
    key: Hashable,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(r, out) of checked tensors, by a plan for the calls to come where there is a key."""
    if key is None:
        return adaln(x, branch, gate, shift, scale, eps)
    from ..kernels.adaln import AdaLNForward  # imports triton

    tensors = x, branch, gate, shift, scale
    r, out, _, _ = keep(key, AdaLNForward(tensors, eps, save=False))(*tensors)
    return cast("tuple[Tensor, Tensor]", (r, out))


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


library.define(
    "adaln_forward(Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, float eps)"
    " -> (Tensor r, Tensor out, Tensor mean, Tensor rstd)"
)
library.define(
    "adaln_backward(Tensor? d_r, Tensor? d_out, Tensor r, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale,"
    " Tensor? mean, Tensor? rstd, bool want_x, bool want_branch, bool want_gate, bool want_modulation,"
    " bool want_bias, bool want_out, Tensor[] partials)"
    " -> (Tensor d_x, Tensor d_branch, Tensor out, Tensor d_vectors, Tensor d_bias, Tensor[] sums)"
)


def adaln_forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, out, mean, rstd)."""
    tensors = x, branch, gate, shift, scale
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", run("adaln_forward", tensors, *tensors, eps))


def _forward(*args: Any, key: Layouts | None) -> tuple[Tensor | None, ...]:
    from ..kernels.adaln import AdaLNForward

    *tensors, eps = args
    outs = planned(AdaLNForward, tensors, eps, key=key)(*tensors)
    return outs if key is not None else tuple(args[0].new_empty(0) if out is None else out for out in outs)


def adaln_backward(
    d_r: Tensor | None,
    d_out: Tensor | None,
    r: Tensor,
    *others: Tensor | None,
    wants: Sequence[bool],
    partials: Sequence[Tensor],
) -> tuple[Any, ...]:
    """Arguments and results as torch's operator."""
    tensors = d_r, d_out, r, *others
    return cast("tuple[Any, ...]", run("adaln_backward", (r, *tensors, *partials), *tensors, *wants, partials))


def _backward(*args: Any, key: Layouts | None) -> tuple[Any, ...]:
    from ..kernels.adaln import AdaLNBackward, Wants

    *tensors, partials = *args[:9], args[-1]
    wants = Wants(*args[9:-1])
    *outs, sums = planned(AdaLNBackward, (*tensors, *partials), wants, key=key)(*tensors, *partials)
    if key is not None:
        return *outs, sums
    r, like = tensors[2], next(x for x in (tensors[4], tensors[6]) if x is not None)
    shapes = (0, 0, 0, (0, r.shape[0], r.shape[2]), 0)
    dtypes = (r.dtype, *(like.dtype,) * 4)
    outs = [
        r.new_empty(shape, dtype=dtype) if out is None else out
        for out, shape, dtype in zip(outs, shapes, dtypes, strict=True)
    ]
    return *outs, sums


def _forward_fake(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r = x.new_empty(x.shape if branch is not None else 0)
    out = x.new_empty(x.shape, dtype=shift.dtype) if shift is not None else x.new_empty(0)
    mean, rstd = (x.new_empty(x.shape[:2] if shift is not None else 0, dtype=torch.float32) for _ in range(2))
    return r, out, mean, rstd


def _backward_fake(
    d_r: Tensor | None,
    d_out: Tensor | None,
    r: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    want_x: bool,
    want_branch: bool,
    want_gate: bool,
    want_modulation: bool,
    want_bias: bool,
    want_out: bool,
    partials: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    like = cast(Tensor, gate if gate is not None else scale)
    batch, _, width = r.shape
    d_x = r.new_empty(r.shape if want_x else 0)
    d_branch, out = (like.new_empty(r.shape if wanted else 0) for wanted in (want_branch, want_out))
    d_vectors = like.new_empty((want_gate + 2 * want_modulation, batch, width))
    sums = [like.new_empty((partial.shape[0], partial.shape[2])) for partial in partials]
    return d_x, d_branch, out, d_vectors, like.new_empty(width if want_bias else 0), sums


register("adaln_forward", _forward, _forward_fake)
register("adaln_backward", _backward, _backward_fake)


def norm_saved(
    ctx: Any,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    r: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, ...]:
    """What :func:`norm_backward` needs saved; ``shift`` only where the norm will be computed again."""
    # r is read by the norm's gradient alone, branch by the gate's
    branch_of_gate = branch if ctx.needs_input_grad[2] else None
    if scale is None:  # torch's operator gives empty tensors: as many are saved on both paths, for checkpointing
        return None, branch_of_gate, gate, shift, None, None, None
    return x if branch is None else r, branch_of_gate, gate, shift, scale, mean, rstd


def norm_backward(
    saved: Sequence[Tensor | None],
    d_r: Tensor | None,
    d_out: Tensor | None,
    needs: Sequence[bool],
    want_out: bool = False,
    partials: Sequence[Tensor] = (),
) -> tuple[list[Tensor | None], Tensor, list[Tensor]]:
    """The backward of every Function that begins with an adaLN operator.

    Args:
        saved: (r, branch, gate, shift, scale, mean, rstd), as saved by :func:`norm_saved`.
        d_r, d_out: the incoming gradients, None where there is none or the operator has no such output.
        needs: whether x, branch, gate, bias, shift and scale want a gradient.
        want_out: whether the modulated norm is computed again.
        partials: further sums to add up in the same launch.

    Returns:
        (the gradients of ``needs``, or None, the modulated norm, the sums).
    """
    r, branch, gate, shift, scale, mean, rstd = saved
    r = cast(Tensor, r if d_out is not None else d_r)
    want_x, want_branch, want_gate, want_bias, want_shift, want_scale = needs
    normed = d_out is not None
    wants_modulation = normed and (want_shift or want_scale)
    if not normed and not (want_branch or want_gate or want_bias):
        return [d_r if want_x else None, *(None,) * 5], r, []  # the gradient of a sum
    d_x, d_branch, out, d_vectors, d_bias, sums = adaln_backward(
        d_r,
        d_out,
        r,
        branch,
        gate,
        shift if want_out else None,
        scale if normed else None,
        mean if normed else None,
        rstd if normed else None,
        wants=(want_x and normed, want_branch, want_gate, wants_modulation, want_bias, want_out),
        partials=partials,
    )
    vectors: list[Tensor | None] = [] if d_vectors is None else list(d_vectors.unbind(0))
    d_gate = vectors.pop(0) if want_gate else None
    d_shift, d_scale = vectors if wants_modulation else [None, None]
    gradients = [
        (d_x if normed else d_r) if want_x else None,
        d_branch if want_branch else None,
        d_gate,
        d_bias if want_bias else None,
        d_shift if want_shift else None,
        d_scale if want_scale else None,
    ]
    return gradients, out, sums


class _AdaLN(Kernel):
    """(x, branch, gate, bias, shift, scale, eps) -> (r, out, mean, rstd); mean and rstd are for the backward only.

    bias is an input only to get its gradient: the branch contains it already.
    """

    operator = "layer_norm_modulate and gated_residual"

    @staticmethod
    def forward(
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        bias: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return adaln_forward(x, branch, gate, shift, scale, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, branch, gate, _, _, scale, _ = inputs
        r, _, mean, rstd = output
        ctx.mark_non_differentiable(*(x for x in (mean, rstd) if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*norm_saved(ctx, x, branch, gate, None, scale, r, mean, rstd))

    @staticmethod
    def gradients(
        ctx: Any, saved: tuple[Any, ...], d_r: Tensor | None, d_out: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        gate, scale = saved[2], saved[4]
        # a compiled backward gives zeros, not None, for the outputs that an operator does not have
        d_r = None if gate is None else d_r
        d_out = None if scale is None else d_out
        if d_r is None and d_out is None:
            return (None,) * 7
        return (*norm_backward(saved, d_r, d_out, ctx.needs_input_grad[:6])[0], None)


def adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(r, out) by the kernels, differentiable. Without branch and gate r is empty; without shift and scale, out.

    ``bias`` (D,) is of the Linear that computed the branch, which takes it detached: its gradient comes from here.
    """
    r, out, _, _ = apply("_AdaLN", x, branch, gate, bias, shift, scale, float(eps))
    return r, out
