"""Under which of torch's transforms a call runs: fused kernels, torch's own among them, have first gradients only.

The rest runs on plain formulas, or is refused by name: derivatives in forward mode (dual numbers,
``torch.func.jvp``), of second order, ``torch.func.vmap`` and ``torch.jit.trace``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.autograd.function import Function


def in_forward_mode() -> bool:
    """Whether tangents may be about: within ``dual_level`` or ``torch.func.jvp``, ``jacfwd``, ``linearize``."""
    return forward_ad._current_level >= 0


def in_trace() -> bool:
    """Whether torch.jit.trace records."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def carries_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether any may carry one: a level is in force in all threads, also in one that differentiates something else."""
    if not in_forward_mode() or functorch.maybe_current_level() is not None:
        return in_forward_mode()
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def in_vmap() -> bool:
    """Whether torch.func.vmap is in force, so that tensors may be batches."""
    return _vmaps_and_gradients()[0] > 0


def in_nested_gradients() -> bool:
    """Whether one torch.func.grad runs within another; while compiling, whether any is in force."""
    gradients = _vmaps_and_gradients()[1]
    return gradients > 1 or (gradients == 1 and torch.compiler.is_compiling())  # Dynamo tells no levels of tensors


def in_second_order(tensors: Iterable[Tensor | None]) -> bool:
    """Whether gradients of gradients are recorded within torch.func.grad: within another one, or by plain autograd, for
    tensors that want one at either level. (Nothing tells ahead that a plain backward will be differentiated.)"""
    if _vmaps_and_gradients()[1] == 0 or in_nested_gradients():
        return in_nested_gradients()
    return len({level for tensor in tensors if tensor is not None for level in _levels(tensor)}) > 1


def beyond_gradients(*tensors: Tensor | None) -> bool:
    """Whether a function of these tensors needs derivatives that only formulas have."""
    return in_forward_mode() or in_second_order(tensors)


def makes_plain_tensors(device: torch.device) -> bool:
    """Whether later calls may read what is made on a device: not a transform's, fake, traced, or a CUDA graph's."""
    if torch.compiler.is_compiling() or in_trace() or in_forward_mode():
        return False
    if functorch.maybe_current_level() is not None or torch._C._len_torch_dispatch_stack():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _vmaps_and_gradients() -> tuple[int, int]:
    """How many of torch.func's vmap and grad are in force here, one within the other."""
    if functorch.maybe_current_level() is None:  # a tenth of the stack's cost
        return 0, 0
    kinds = [item.key() for item in functorch.get_interpreter_stack() or ()]
    return kinds.count(functorch.TransformType.Vmap), kinds.count(functorch.TransformType.Grad)


# Dynamo enters the transforms that it traces, and guards those around what it compiles
in_forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]
_vmaps_and_gradients._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _levels(tensor: Tensor) -> list[int]:
    """At which levels of torch.func.grad, 0 for plain autograd, a tensor wants a gradient."""
    levels = []
    while True:
        level = functorch.maybe_get_level(tensor)
        inner = functorch.is_functorch_wrapped_tensor(tensor)
        if tensor.requires_grad:
            levels.append(level if inner else 0)
        if not inner:
            return levels
        tensor = functorch.get_unwrapped(tensor)


def refuse_second_order(out: Tensor, node: str, message: str) -> None:
    """Makes the gradient of a node of autograd raise the message where it is differentiated in turn.

    Args:
        out: the node's output; nothing is done for another node's, or within transforms.
        node: part of the node's name.
    """
    if torch.compiler.is_compiling() or not out.requires_grad or functorch.maybe_current_level() is not None:
        return
    if out.grad_fn is not None and node in out.grad_fn.name():
        out.grad_fn.register_hook(
            lambda gradients, _: refuse_derivatives(message, gradients, gradients) if torch.is_grad_enabled() else None
        )


class _Refused(Function):
    """(message, count, *tensors) -> the first ``count`` tensors; differentiated, the message is raised."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(ctx.message)


def refuse_derivatives(
    message: str, gradients: Sequence[Tensor | None], of: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients, which depend on the tensors ``of``, so that differentiating them raises the message."""
    present = [gradient for gradient in gradients if gradient is not None]
    sources = [tensor for tensor in of if tensor is not None and tensor.requires_grad]
    if not present or not sources:
        return tuple(gradients)
    refused = iter(_Refused.apply(message, len(present), *present, *sources))  # type: ignore[no-untyped-call]
    return tuple(None if gradient is None else next(refused) for gradient in gradients)
