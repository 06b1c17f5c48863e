"""Kernels as torch operators, so that torch.compile, meta tensors and profilers see one call each; their autograd.

A :class:`Kernel` is an autograd Function whose gradient runs kernels: it has no derivative of its own, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.utils._pytree import tree_leaves, tree_map

from ..reference.transforms import carries_tangents, refuse_derivatives

library = torch.library.Library("ditfast", "FRAGMENT")


def register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Gives a defined operator its kernel, for CUDA and for the CPU in Triton's interpreter, its fake, and a rule for
    batches of gradients: one after another, as torch.func.jacrev and autograd's ``is_grads_batched`` ask for them."""
    for key in ("CUDA", "CPU"):
        library.impl(name, kernel, key)
    torch.library.register_fake(f"ditfast::{name}", fake, lib=library)

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        out = _each(name, info.batch_size, args, in_dims)
        return out, tree_map(lambda _: 0, out)

    torch.library.register_vmap(f"ditfast::{name}", one_by_one, lib=library)
    library.impl(name, partial(_of_legacy_batches, name), "Batched")


def _each(name: str, count: int, args: Sequence[Any], dims: Sequence[Any]) -> Any:
    """The operator's results for each of ``count`` slices of the arguments that have such an axis, stacked."""
    operator = getattr(torch.ops.ditfast, name).default
    results = [operator(*_picked(args, dims, index)) for index in range(count)]
    return tree_map(lambda *each: torch.stack(each), *results)


def _picked(args: Sequence[Any], dims: Sequence[Any], index: int) -> list[Any]:
    return [
        _picked(arg, dim, index)
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple))
        else arg
        if dim is None
        else arg.select(dim, index)
        for arg, dim in zip(args, dims, strict=True)
    ]


def _of_legacy_batches(name: str, *args: Any) -> Any:
    """An operator of the batched tensors of ``is_grads_batched``, which are not torch.func's."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()

    def batched(x: Any) -> bool:
        return isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x)

    plain = tree_map(lambda x: torch._remove_batch_dim(x, level, 1, 0) if batched(x) else x, args)
    dims = tree_map(lambda x: 0 if batched(x) else None, args)
    count = next(len(x) for x, dim in zip(tree_leaves(plain), tree_leaves(tree_map(batched, args)), strict=True) if dim)
    return tree_map(lambda x: torch._add_batch_dim(x, 0, level), _each(name, count, plain, dims))


class Kernel(Function):
    """Base of the Functions: a subclass has ``forward``, ``setup_context`` and ``gradients`` in backward's place.

    What the gradients depend on must be saved, besides what came in: their derivative is looked for there.

    Attributes:
        operator: the public operators it belongs to, for messages.
        gradients: static, (ctx, saved, *incoming) -> those of all inputs; saved are ctx.saved_tensors, which activation
            checkpointing lets one look at once.
    """

    operator: str
    gradients: Callable[..., Sequence[Tensor | None]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _KERNELS[cls.__name__] = cls
        # no classmethod: compiled autograd takes none
        cls.backward = staticmethod(_backward(cls.gradients, cls.operator))  # type: ignore[method-assign]


def _backward(gradients: Callable[..., Sequence[Tensor | None]], operator: str) -> Callable[..., Any]:
    """The Function's backward: its gradients, which refuse to be differentiated in turn."""
    message = (
        f"ditfast: the gradient of {operator} has no derivative where kernels computed it; compute the forward under "
        'ditfast.ops.use_backend("torch"), and attention also under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)'
    )

    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return tuple(gradients(ctx, saved, *incoming))
        if carries_tangents((*saved, *incoming)):
            raise RuntimeError(message)
        if not torch.is_grad_enabled():
            return tuple(gradients(ctx, saved, *incoming))
        with torch.no_grad():
            found = gradients(ctx, saved, *incoming)
        return refuse_derivatives(message, found, (*saved, *incoming))

    return backward


_KERNELS: dict[str, type[Kernel]] = {}


def apply(name: str, *inputs: Any) -> Any:
    """``apply`` of the :class:`Kernel` of this name. torch.compile puts the call into its graph as it is: where Dynamo
    looks into a Function, dynamic shapes break it, and so does a tensor that is given twice."""
    if torch.compiler.is_compiling():
        _allow_in_graph()
    return _apply(name, *inputs)


def _apply(name: str, *inputs: Any) -> Any:
    return _KERNELS[name].apply(*inputs)  # type: ignore[no-untyped-call]


def _allow_in_graph() -> None:
    torch.compiler.allow_in_graph(_apply)  # imports Dynamo


_allow_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]
