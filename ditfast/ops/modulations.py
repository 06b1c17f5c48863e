"""All adaLN Linears of a model in one launch, which reads their weights in place and keeps no copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..kernels.launch import Layouts, keep, kept, planned, uses_tf32
from ..reference import ops as formulas
from . import check
from .backend import (
    Kernel,
    apply,
    autocast_dtype,
    current_backend,
    direct_layouts,
    library,
    register,
    run,
    wants_gradient,
)
from .linear import Gradients, autocast, takes_gemm, weight_gradient, working_dtype

if TYPE_CHECKING:
    from ..kernels.configs.gemm import GemmConfig

library.define(
    "modulations(Tensor c, Tensor[] weights, Tensor[] biases, ScalarType dtype, bool demanded) -> Tensor"
)

# what a kernel may read by its address
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


def modulations(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """c W_i^T + b_i of many Linears, side by side.

    Source: Peebles & Xie, section 3.2: each block's regression of its modulation from the condition.

    Args:
        c: (B, D), through its SiLU.
        weights: one or more, (N_i, D) in c's dtype; under autocast in any one dtype, converted in registers.
        biases: (N_i,) in c's dtype, or None, one for each weight.

    One launch serves up to 64 Linears; many samples run on the library's GEMMs. Both need weights that are plain
    tensors of one dtype on a GPU, all with a bias or all without; otherwise the formula runs.

    Returns:
        (B, sum of N_i) in c's dtype (autocast's where it is on).

    Raises:
        TypeError, ValueError: a number, dtype, shape or device does not fit, naming the argument.
    """
    check.tensor("c", c, 2)
    if not weights or len(weights) != len(biases):
        raise ValueError(f"weights and biases must be as many, one or more, got {len(weights)} and {len(biases)}")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check.linear(c, (f"weights[{i}]", f"biases[{i}]"), weight, bias, c.shape[1], "c")
    if not takes_modulations(c, weights, biases):
        return formulas.modulations(c, weights, biases)
    if not wants_gradient(c, *weights, *biases):
        return modulations_of(c, weights, biases)
    count = len(weights)
    c, *parameters = autocast(c, *weights, *biases)
    packed = modulations_of(c, parameters[:count], parameters[count:])
    parts = []
    for weight, bias, part in zip(parameters[:count], parameters[count:], split(packed, weights), strict=True):
        part, c = attached(c, weight, bias, part)
        parts.append(part)
    return torch.cat(parts, dim=1)


def takes_modulations(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether these Linears are computed together.

    Raises:
        RuntimeError: the kernels were asked for by ``use_backend("triton")`` and cannot run, with the reason.
    """
    present = [bias for bias in biases if bias is not None]
    if any(type(x) not in _PLAIN for x in (c, *weights, *present)) or len(present) not in (0, len(biases)):
        return False
    if any(x.dtype != group[0].dtype or x.device != c.device for group in (weights, present) for x in group):
        return False
    if any(weight.shape[1:] != c.shape[1:] for weight in weights):  # also parameters that sharding has flattened
        return False
    if autocast_dtype(c.device.type) is None and {weights[0].dtype, *(b.dtype for b in present[:1])} != {c.dtype}:
        return False
    if any(x.dtype == torch.float64 for x in (weights[0], *present[:1])):
        return False
    widths = (c.shape[1], *(weight.shape[0] for weight in weights))
    return takes_gemm("modulations", c, widths, (*weights, *biases))


def modulations_of(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """:func:`modulations` that :func:`takes_modulations`, without gradients."""
    present = [bias for bias in biases if bias is not None]
    demanded = current_backend() == "triton"
    with torch.no_grad():
        arguments = list(weights), present, working_dtype(c), demanded
        return cast(Tensor, run("modulations", (c, *weights, *present), c, *arguments))


def modulations_together(c: Tensor, parameters: Sequence[Tensor | None]) -> Tensor | None:
    """:func:`modulations` without gradients, or None where each Linear is computed on its own.

    Args:
        parameters: weight and bias of each Linear, in turn.
    """
    layouts = None if torch._C._is_any_autocast_enabled() else direct_layouts(c, *parameters)
    key = None if layouts is None else ("modulations", layouts, current_backend(), uses_tf32(c.dtype))
    weights, biases = cast("Sequence[Tensor]", parameters[::2]), parameters[1::2]
    plan = kept(key)
    if plan is None:
        if not takes_modulations(c, weights, biases):
            return None
        if key is None:
            return modulations_of(c, weights, biases)
        present = [bias for bias in biases if bias is not None]
        demanded = current_backend() == "triton"
        plan = keep(key, modulations_plan((c, *weights, *present), len(weights), c.dtype, demanded))
    with torch.no_grad():
        return cast(Tensor, plan(c, weights, () if biases[0] is None else biases))


def split(packed: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each weight's part, a view (B, N_i)."""
    return packed.split_with_sizes([weight.shape[0] for weight in weights], dim=1)


class _Attached(Kernel):
    """(c, weight, bias, y or None) -> (y = c W^T + b, c): c goes on to the next, so that its gradient is one addmm
    a Linear."""

    operator = "modulations"

    @staticmethod
    def forward(c: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return F.linear(c, weight, bias) if y is None else y.view_as(y), c.view_as(c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], d_y: Tensor | None, d_c: Tensor | None) -> Gradients:
        c, weight = saved
        want_c, want_weight, want_bias, _ = ctx.needs_input_grad
        if d_y is None:
            return d_c, None, None, None
        if want_c:
            d_c = d_y @ weight if d_c is None else torch.addmm(d_c, d_y, weight)
        d_bias = d_y.sum(0) if want_bias else None
        return d_c if want_c else None, weight_gradient(d_y, c, want_weight), d_bias, None


def attached(c: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y = c W^T + b, c) with their gradients: c (B, D), y (B, N) where it is known already."""
    y, passed_on = apply("_Attached", c, weight, bias, y)
    return cast(Tensor, y), passed_on if c.requires_grad else c  # else later ones would compute a gradient for it


def modulations_plan(
    tensors: Sequence[Tensor], count: int, dtype: torch.dtype, demanded: bool = False, config: GemmConfig | None = None
) -> Callable[..., Tensor]:
    """The Linears by the candidate of ``config``, or of the one for their shapes.

    tensors: c, the ``count`` weights, and as many biases or none. The plan takes c, the weights and the biases.
    """
    from ..kernels.configs.gemm import modulations_config
    from ..kernels.modulations import Modulations  # imports triton

    c, weights, biased = tensors[0], tensors[1 : count + 1], len(tensors) > count + 1
    widths = tuple(len(weight) for weight in weights)
    stored = weights[0].dtype
    config = config or modulations_config(c.shape[0], sum(widths), c.shape[1], c, dtype, stored, demanded)
    if config.candidate == "triton":
        return Modulations(c, widths, stored, dtype, config)

    def separate(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        out = c.new_empty((c.shape[0], sum(widths)), dtype=dtype)
        c = c.to(dtype)
        for index, (weight, part) in enumerate(zip(weights, out.split_with_sizes(widths, dim=1), strict=True)):
            if biased:
                torch.addmm(biases[index].to(dtype), c, weight.to(dtype).t(), out=part)
            else:
                torch.mm(c, weight.to(dtype).t(), out=part)
        return out

    return separate


def _modulations(
    c: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dtype: torch.dtype,
    demanded: bool,
    key: Layouts | None,
) -> Tensor:
    tensors = c, *weights, *biases
    tf32 = uses_tf32(dtype)
    return planned(modulations_plan, tensors, len(weights), dtype, demanded, key=key, tf32=tf32)(c, weights, biases)


def _modulations_fake(
    c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype, demanded: bool
) -> Tensor:
    return c.new_empty((c.shape[0], sum(weight.shape[0] for weight in weights)), dtype=dtype)


register("modulations", _modulations, _modulations_fake)
