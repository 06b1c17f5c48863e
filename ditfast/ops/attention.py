"""Self-attention on the packed qkv projection: public functions, torch.library operators, autograd."""

from __future__ import annotations

from typing import Any, cast, get_args

import torch
from torch import Tensor

from ..kernels.launch import Layouts, gpu_exists, gpu_index, planned, uses_tf32
from ..reference.transforms import in_second_order
from . import check
from .attention_implementations import (
    MAX_HEAD_DIM,
    AttentionBackend,
    Case,
    choose,
    library_reason,
    run_library,
)
from .backend import (
    NOT_TWICE,
    Kernel,
    apply,
    current_backend,
    library,
    register,
    run,
    sharded,
    takes_triton,
    transform_reason,
    triton_reason,
    wants_gradient,
)
from .linear import working_dtype


def self_attention(
    qkv: Tensor,
    num_heads: int,
    scale: float | None = None,
    bias: Tensor | None = None,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v, read from the packed projection as strided views without a copy.

    Args:
        qkv: (B, T, 3D), the last axis [q; k; v], each head-major.
        num_heads: H, a divisor of D.
        scale: of the logits; head_dim ** -0.5 by default.
        bias: added to the logits, broadcasting to (B, H, T, T), in qkv's dtype.
        backend: None chooses (:func:`attention_backend`). Else one of

            - "triton", this project's kernels: head dims up to 128, a deterministic backward, trainable biases;
            - "sdpa", torch's scaled_dot_product_attention, which itself chooses among its kernels;
            - "cudnn", "flash" (FlashAttention 2), "efficient": that kernel of scaled_dot_product_attention, on CUDA;
            - "flash_attn", "flash_attn_3", "flash_attn_4": FlashAttention's packages (2; 3, for Hopper; 4, for Hopper
              without gradients and for later GPUs) with their deterministic backward, in bf16 or fp16 and
              without a bias.

    Where the softmax is saturated (logits in the hundreds), the gradient of the kernels here is as accurate as that of
    an eager softmax up to 128 tokens; beyond, in 16 bits, as any flash kernel's (kernels/attention_bwd.py).

    Returns:
        (B, T, D) in qkv's dtype (autocast's where it is on).

    Raises:
        TypeError, ValueError: an argument does not fit, naming it; or the backend asked for cannot run, with
            the reason.
    """
    check.tensor("qkv", qkv, 3)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {num_heads!r}")
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"num_heads must divide a third of qkv's last axis {qkv.shape[2]}, got {num_heads}")
    dtype = working_dtype(qkv)
    if bias is not None:
        bias = _checked_bias(bias, qkv, num_heads, dtype)
    qkv = qkv.to(dtype)
    head_dim = qkv.shape[2] // (3 * num_heads)
    in_shards = sharded(qkv)
    if backend is None:
        chosen = attention_backend(qkv, qkv.shape[1], head_dim, bias)
        if chosen != "triton" and not qkv.numel():
            chosen = "sdpa"  # the only one that takes empty tensors
    elif backend not in get_args(AttentionBackend):
        raise ValueError(f"backend must be None or one of {', '.join(get_args(AttentionBackend))}, got {backend!r}")
    else:
        asked_later = in_shards and backend != "triton"
        reason = None if asked_later else _unavailable(backend, qkv, num_heads, bias)
        if reason is not None:
            raise ValueError(f'backend "{backend}" cannot run: {reason}')
        chosen = backend
    if chosen == "triton":
        return attention(qkv, bias, num_heads, max(head_dim, 1) ** -0.5 if scale is None else float(scale))
    if in_shards:  # the libraries take no DTensors, and torch has no sharding rule for its own backward on a CPU
        return _by_samples(qkv, num_heads, scale, bias, backend)
    return run_library(chosen, qkv, num_heads, scale, bias, alone=backend is not None)


def _by_samples(
    qkv: Tensor, num_heads: int, scale: float | None, bias: Tensor | None, backend: AttentionBackend | None
) -> Tensor:
    from .sharding import by_samples

    def attend(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return self_attention(qkv, num_heads, scale, bias, backend)

    return by_samples(attend, qkv, bias)


def attention_backend(
    like: Tensor,
    tokens: int,
    head_dim: int,
    bias: Tensor | None = None,
    training: bool | None = None,
) -> AttentionBackend:
    """The implementation that self_attention takes with ``backend=None``.

    Under ``use_backend("auto")`` that is "sdpa" for tensors that no kernel runs on. On a GPU it is what its tuned table
    says of the shape; else this project's kernels for head dims that the libraries pad (72) and in training, where
    gradients land in the packed projection and sums keep their order; else FlashAttention 3 (Hopper) or 4 (later) where
    installed, or SDPA.

    Args:
        like: a tensor with qkv's dtype and device.
        tokens, head_dim: of the packed projection; the batch does not count.
        bias: of four axes, where there is one.
        training: whether a gradient will be wanted; by default whether ``like`` or the bias wants one.

    Raises:
        RuntimeError: the kernels were asked for by ``use_backend("triton")`` and cannot run, with the reason.
    """
    if not takes_triton("self_attention", like, 1, (bias,)):
        return "sdpa"
    return chosen_backend(like, tokens, head_dim, bias, wants_gradient(like, bias) if training is None else training)


def chosen_backend(
    like: Tensor, tokens: int, head_dim: int, bias: Tensor | None, training: bool
) -> AttentionBackend:
    """:func:`attention_backend` for tensors on which kernels run."""
    reason = _unfit(head_dim, bias)
    if current_backend() == "triton":
        if reason is not None:
            raise RuntimeError(f"ditfast.ops.self_attention cannot run its Triton kernel: {reason}")
        return "triton"
    case = Case(tokens, head_dim, like.dtype, bias is not None, training)
    chosen = choose(case, gpu_index(like) if gpu_exists() else None)
    return "sdpa" if chosen == "triton" and reason is not None else chosen


def attention_backends(qkv: Tensor, num_heads: int, bias: Tensor | None = None) -> dict[str, str | None]:
    """Each backend of self_attention -> why it cannot take these tensors, or None where it can.

    Args:
        qkv: (B, T, 3D); its values are not read.
        num_heads: H, a divisor of D.
        bias: of four axes, where there is one.
    """
    return {backend: _unavailable(backend, qkv, num_heads, bias) for backend in get_args(AttentionBackend)}


def _unfit(head_dim: int, bias: Tensor | None) -> str | None:
    """Why the kernels do not take such heads, or None."""
    if head_dim > MAX_HEAD_DIM:
        return f"the kernels take head dims of at most {MAX_HEAD_DIM}, got {head_dim}"
    if bias is not None and bias.dtype == torch.float64:
        return "the kernels compute in fp32, and bias is fp64"
    return None


def _unavailable(backend: AttentionBackend, qkv: Tensor, num_heads: int, bias: Tensor | None) -> str | None:
    """Why an implementation cannot take these tensors, or None."""
    if backend == "triton":
        return triton_reason(qkv, 1) or _unfit(qkv.shape[2] // (3 * num_heads), bias)
    if backend != "sdpa":
        reason = NOT_TWICE if in_second_order((qkv, bias)) else transform_reason()
        if reason is not None:
            return f'{reason}; backend "sdpa" has'
    return library_reason(backend, qkv, num_heads, bias, wants_gradient(qkv, bias))


def _checked_bias(bias: Tensor, qkv: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """The bias with four axes, in the dtype in which qkv is taken."""
    check.tensor("bias", bias)
    check.same_device("bias", bias, qkv)
    if dtype == qkv.dtype:
        check.same_dtype("bias", bias, "qkv", qkv)
    full = (qkv.shape[0], num_heads, qkv.shape[1], qkv.shape[1])
    padded = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if len(padded) != 4 or any(have not in (1, want) for have, want in zip(padded, full, strict=True)):
        raise ValueError(f"bias must broadcast to (B, H, T, T) = {full}, got {tuple(bias.shape)}")
    return bias.reshape(padded).to(dtype)


library.define(
    "attention_forward(Tensor qkv, int num_heads, float scale, Tensor? bias, bool save) -> (Tensor out, Tensor stats)"
)
library.define(
    "attention_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor stats, int num_heads, float scale, Tensor? bias,"
    " bool want_bias, bool want_sums) -> (Tensor d_qkv, Tensor d_bias, Tensor sums)"
)


def attention_forward(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """(out, stats): by torch's operator, where something looks at it."""
    return cast("tuple[Tensor, Tensor]", run("attention_forward", (qkv, bias), qkv, num_heads, scale, bias, save))


def _forward(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, save: bool, key: Layouts | None
) -> tuple[Tensor, Tensor | None]:
    from ..kernels.attention import AttentionForward  # imports triton

    tf32 = uses_tf32(qkv.dtype)
    out, stats = planned(AttentionForward, (qkv, bias), num_heads, scale, save, key=key, tf32=tf32)(qkv, bias)
    return out, qkv.new_empty(0, dtype=torch.float32) if key is None and stats is None else stats


def attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    num_heads: int,
    scale: float,
    bias: Tensor | None,
    want_bias: bool,
    want_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_qkv, d_bias, sums), as :func:`attention_forward`."""
    arguments = d_out, qkv, out, stats, num_heads, scale, bias, want_bias, want_sums
    results = run("attention_backward", (d_out, qkv, out, stats, bias), *arguments)
    return cast("tuple[Tensor, Tensor, Tensor]", results)


def _backward(*arguments: Any, key: Layouts | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from ..kernels.attention_bwd import AttentionBackward

    d_out, qkv, out, stats, num_heads, scale, bias, want_bias, want_sums = arguments
    tensors = d_out, qkv, out, stats, bias
    tf32 = uses_tf32(qkv.dtype)
    plan = planned(AttentionBackward, tensors, num_heads, scale, want_bias, want_sums, key=key, tf32=tf32)
    d_qkv, d_bias, sums = plan(*tensors)
    if key is None:
        d_bias = qkv.new_empty(0) if d_bias is None else d_bias
        sums = qkv.new_empty(0, dtype=torch.float32) if sums is None else sums
    return d_qkv, d_bias, sums


def _forward_fake(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    stats = qkv.new_empty((batch, num_heads, 2, tokens) if save else 0, dtype=torch.float32)
    return qkv.new_empty((batch, tokens, width // 3)), stats


def _backward_fake(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    num_heads: int,
    scale: float,
    bias: Tensor | None,
    want_bias: bool,
    want_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.configs.attention import sum_slots

    batch, tokens, width = qkv.shape
    d_bias = cast(Tensor, bias).new_empty(cast(Tensor, bias).shape) if want_bias else qkv.new_empty(0)
    slots = sum_slots(tokens, width // (3 * num_heads), qkv.dtype, bias is not None)
    sums = qkv.new_empty((batch * slots, width) if want_sums else 0, dtype=torch.float32)
    return qkv.new_empty(qkv.shape), d_bias, sums


register("attention_forward", _forward, _forward_fake)
register("attention_backward", _backward, _backward_fake)


class _Attention(Kernel):
    """(qkv, bias, num_heads, scale) -> (out, stats)."""

    operator = "self_attention"

    @staticmethod
    def forward(qkv: Tensor, bias: Tensor | None, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
        return attention_forward(qkv, num_heads, scale, bias, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, bias, ctx.num_heads, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, bias, *output)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 4
        qkv, bias, out, stats = saved
        want_qkv, want_bias, _, _ = ctx.needs_input_grad
        d_qkv, d_bias, _sums = attention_backward(
            d_out, qkv, out, stats, ctx.num_heads, ctx.scale, bias, want_bias, False
        )
        return d_qkv if want_qkv else None, d_bias if want_bias else None, None, None


def attention(qkv: Tensor, bias: Tensor | None, num_heads: int, scale: float) -> Tensor:
    """(B, T, D) by the kernels, differentiable; bias None or of four axes that broadcast to (B, H, T, T)."""
    if not wants_gradient(qkv, bias):
        return attention_forward(qkv, num_heads, scale, bias, False)[0]
    return cast(Tensor, apply("_Attention", qkv, bias, num_heads, scale)[0])
