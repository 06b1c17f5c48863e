"""The adaLN kernels as torch operators (schema, fake, registration) and their autograd.

One pair serves the three public operators: what an operator does not have is None on the way in and an empty
tensor on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .library import Kernel, apply, library, register

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


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.adaln import adaln_fwd  # imports triton

    return adaln_fwd(*args)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    from ..kernels.adaln import adaln_bwd

    return adaln_bwd(*args)


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
    """What :func:`norm_backward` wants saved; ``shift`` only for a norm that is to be computed again."""
    # r is read by the norm's gradient alone, branch by the gate's
    normed = None if scale is None else x if branch is None else r
    return normed, branch if ctx.needs_input_grad[2] else None, gate, shift, scale, mean, rstd


def norm_backward(
    saved: Sequence[Tensor | None],
    d_r: Tensor | None,
    d_out: Tensor | None,
    needs: Sequence[bool],
    want_out: bool = False,
    partials: Sequence[Tensor] = (),
) -> tuple[list[Tensor | None], Tensor, list[Tensor]]:
    """What every Function with an adaLN operator at its beginning does in its backward.

    Args:
        saved: (r, branch, gate, shift, scale, mean, rstd), as saved by :func:`norm_saved`.
        d_r, d_out: the incoming gradients, None where nothing came or the operator has no such output.
        needs: whether x, branch, gate, bias, shift and scale want a gradient.
        want_out: whether the modulated norm is computed again.
        partials: further sums to add up in the same launch.

    Returns:
        (their gradients or None, the modulated norm, the sums).
    """
    r, branch, gate, shift, scale, mean, rstd = saved
    want_x, want_branch, want_gate, want_bias, want_shift, want_scale = needs
    normed = d_out is not None
    wants_modulation = normed and (want_shift or want_scale)
    if not normed and not (want_branch or want_gate or want_bias):
        return [d_r if want_x else None, *(None,) * 5], cast(Tensor, r), []  # the gradient of a sum
    d_x, d_branch, out, d_vectors, d_bias, sums = torch.ops.ditfast.adaln_backward.default(
        d_r,
        d_out,
        r if normed else d_r,
        branch,
        gate,
        shift if want_out else None,
        scale if normed else None,
        mean if normed else None,
        rstd if normed else None,
        want_x and normed,
        want_branch,
        want_gate,
        wants_modulation,
        want_bias,
        want_out,
        partials,
    )
    vectors: list[Tensor | None] = list(d_vectors.unbind(0))
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

    bias is only there to be given its gradient: the branch has it already.
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
        result = torch.ops.ditfast.adaln_forward.default(x, branch, gate, shift, scale, eps)
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, branch, gate, _, _, scale, _ = inputs
        r, _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
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

    ``bias`` (D,) gets the gradient of the bias of the Linear that made the branch, which must have taken it detached.
    """
    r, out, _, _ = apply("_AdaLN", x, branch, gate, bias, shift, scale, eps)
    return r, out
