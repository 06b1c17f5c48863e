"""The adaLN kernels as torch operators (schema, fake, registration) and their autograd.

One pair serves the three public operators: what an operator does not have is None on the way in and an empty
tensor on the way out.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._library import library, register

library.define(
    "adaln_forward(Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, float eps)"
    " -> (Tensor r, Tensor out, Tensor mean, Tensor rstd)"
)
library.define(
    "adaln_backward(Tensor? d_r, Tensor? d_out, Tensor r, Tensor? branch, Tensor? gate, Tensor? scale, Tensor? mean,"
    " Tensor? rstd, bool want_x, bool want_branch, bool want_gate, bool want_modulation)"
    " -> (Tensor d_x, Tensor d_branch, Tensor d_vectors)"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.adaln import adaln_fwd  # imports triton

    return adaln_fwd(*args)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
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
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    want_x: bool,
    want_branch: bool,
    want_gate: bool,
    want_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    like = cast(Tensor, gate if gate is not None else scale)
    d_x = r.new_empty(r.shape if want_x else 0)
    d_branch = like.new_empty(r.shape if want_branch else 0)
    return d_x, d_branch, like.new_empty((want_gate + 2 * want_modulation, r.shape[0], r.shape[2]))


register("adaln_forward", _forward, _forward_fake)
register("adaln_backward", _backward, _backward_fake)


class _AdaLN(torch.autograd.Function):
    """(x, branch, gate, shift, scale, eps) -> (r, out, mean, rstd); mean and rstd are for the backward only."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", torch.ops.ditfast.adaln_forward.default(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, branch, gate, _, scale, _ = inputs
        r, _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        # r is read by the norm's gradient alone, branch by the gate's
        normed = None if scale is None else x if branch is None else r
        ctx.save_for_backward(normed, branch if ctx.needs_input_grad[2] else None, gate, scale, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_r: Tensor | None, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        r, branch, gate, scale, mean, rstd = ctx.saved_tensors
        want_x, want_branch, want_gate, want_shift, want_scale, _ = ctx.needs_input_grad
        # a compiled backward gives zeros, not None, for the outputs that an operator does not have
        d_r = None if gate is None else d_r
        d_out = None if scale is None else d_out
        if d_r is None and d_out is None:
            return (None,) * 6
        normed = d_out is not None
        wants_modulation = normed and (want_shift or want_scale)
        if not normed and not (want_branch or want_gate):
            return (d_r, *(None,) * 5)  # the gradient of a sum
        d_x, d_branch, d_vectors = torch.ops.ditfast.adaln_backward.default(
            d_r,
            d_out,
            r if normed else d_r,
            branch,
            gate,
            scale if normed else None,
            mean if normed else None,
            rstd if normed else None,
            want_x and normed,
            want_branch,
            want_gate,
            wants_modulation,
        )
        vectors = list(d_vectors.unbind(0))
        d_gate = vectors.pop(0) if want_gate else None
        d_shift, d_scale = vectors if wants_modulation else (None, None)
        return (
            (d_x if normed else d_r) if want_x else None,
            d_branch if want_branch else None,
            d_gate,
            d_shift if want_shift else None,
            d_scale if want_scale else None,
            None,
        )


def adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(r, out) by the kernels, differentiable. Without branch and gate r is empty; without shift and scale, out."""
    r, out, _, _ = _AdaLN.apply(x, branch, gate, shift, scale, eps)  # type: ignore[no-untyped-call]
    return r, out
