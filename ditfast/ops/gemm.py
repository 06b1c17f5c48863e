"""The GEMMs with an epilogue as torch operators: schema, fake, registration, and the candidates behind each.

Each call picks a candidate from its shape, dtype and GPU (kernels/configs/gemm.py): the Triton kernel, the library's
GEMM with pointwise kernels, or cuBLASLt's own epilogue. With ``demanded`` it is always the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.launch import Layouts, planned, uses_tf32
from .backend import library, register, run

if TYPE_CHECKING:
    from ..kernels.configs.gemm import GemmConfig

library.define(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, bool save, bool demanded) -> (Tensor out, Tensor pre)"
)
library.define(
    "linear_gated_residual(Tensor x, Tensor weight, Tensor? bias, Tensor gate, Tensor residual, bool save,"
    " bool demanded) -> (Tensor out, Tensor branch)"
)
library.define(
    "linear_gelu_backward(Tensor d_out, Tensor weight, Tensor pre, bool want_bias, bool demanded)"
    " -> (Tensor d_pre, Tensor act, Tensor partial)"
)
library.define("gelu_backward(Tensor d_act, Tensor pre, bool want_bias) -> (Tensor d_pre, Tensor partial)")
library.define("sum_partials(Tensor[] partials, ScalarType dtype) -> Tensor[]")


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, save: bool, demanded: bool
) -> tuple[Tensor, Tensor]:
    """(gelu_tanh(pre), pre) of pre = x W^T + b. This and the next: by torch's operator, where something looks at it."""
    return cast("tuple[Tensor, Tensor]", run("linear_gelu", (x, weight, bias), x, weight, bias, save, demanded))


def linear_gated_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, residual: Tensor, save: bool, demanded: bool
) -> tuple[Tensor, Tensor]:
    """(residual + gate * branch, branch) of branch = x W^T + b."""
    tensors = x, weight, bias, gate, residual
    return cast("tuple[Tensor, Tensor]", run("linear_gated_residual", tensors, *tensors, save, demanded))


def linear_gelu_backward(
    d_out: Tensor, weight: Tensor, pre: Tensor, want_bias: bool, demanded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_pre, activation, partial sums of d_pre) of d_pre = (d_out W) * gelu_tanh'(pre)."""
    tensors = d_out, weight, pre
    return cast("tuple[Tensor, Tensor, Tensor]", run("linear_gelu_backward", tensors, *tensors, want_bias, demanded))


def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, save: bool, demanded: bool, key: Layouts | None
) -> tuple[Tensor, ...]:
    tensors = x, weight, bias
    plan = planned(linear_gelu_plan, tensors, save, demanded, key=key, tf32=uses_tf32(x.dtype))
    return _filled(key, x, plan(*tensors))


def linear_gelu_plan(
    tensors: Sequence[Any], save: bool, demanded: bool = False, config: GemmConfig | None = None
) -> Callable[..., Any]:
    """Of the candidate of ``config``, or of that for the tensors' shapes; the second result is None unless ``save``."""
    from ..kernels.configs.gemm import gemm_config
    from ..kernels.linear import LinearGelu

    x, weight, bias = tensors
    operator = "linear_gelu_save" if save else "linear_gelu"
    columns, inner = weight.shape
    config = config or gemm_config(operator, x.shape[0], columns, inner, x, demanded)
    if config.candidate == "triton":
        return LinearGelu(tensors, save, config)
    if config.candidate == "cublaslt" and bias is not None and x.numel():
        return lambda x, weight, bias: (torch._addmm_activation(bias, x, weight.t(), use_gelu=True), None)

    def separate(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        pre = F.linear(x, weight, bias)
        return F.gelu(pre, approximate="tanh"), pre if save else None

    return separate


def _linear_gated_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    save: bool,
    demanded: bool,
    key: Layouts | None,
) -> tuple[Tensor, ...]:
    tensors = x, weight, bias, gate, residual
    plan = planned(linear_gated_residual_plan, tensors, save, demanded, key=key, tf32=uses_tf32(x.dtype))
    return _filled(key, x, plan(*tensors))


def linear_gated_residual_plan(
    tensors: Sequence[Any], save: bool, demanded: bool = False, config: GemmConfig | None = None
) -> Callable[..., Any]:
    """As :func:`linear_gelu_plan`."""
    from ..kernels.adaln import AdaLNForward
    from ..kernels.configs.gemm import gemm_config
    from ..kernels.linear import LinearGatedResidual

    x, weight, _, gate, residual = tensors
    operator = "linear_gated_residual_save" if save else "linear_gated_residual"
    columns, inner = weight.shape
    config = config or gemm_config(operator, x.shape[0], columns, inner, x, demanded)
    if config.candidate == "triton":
        return LinearGatedResidual(tensors, save, config)
    branch = x.new_empty(residual.shape)  # of whose layout alone the plan is made
    add = AdaLNForward((residual, branch, gate, None, None), 0.0)

    def separate(
        x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        branch = F.linear(x, weight, bias)
        r, *_ = add(residual, branch.view(residual.shape), gate, None, None)
        return cast(Tensor, r), branch if save else None

    return separate


def _linear_gelu_backward(
    d_out: Tensor, weight: Tensor, pre: Tensor, want_bias: bool, demanded: bool, key: Layouts | None
) -> tuple[Tensor, ...]:
    tensors = d_out, weight, pre
    plan = planned(linear_gelu_backward_plan, tensors, want_bias, demanded, key=key, tf32=uses_tf32(pre.dtype))
    return _filled(key, pre, plan(*tensors))


def linear_gelu_backward_plan(
    tensors: Sequence[Any], want_bias: bool, demanded: bool = False, config: GemmConfig | None = None
) -> Callable[..., Any]:
    """As :func:`linear_gelu_plan`, the third result unless ``want_bias``."""
    from ..kernels.configs.gemm import gemm_config
    from ..kernels.linear import GeluBackward, LinearGeluBackward

    d_out, weight, pre = tensors
    rows, columns = pre.shape
    config = config or gemm_config("linear_gelu_backward", rows, columns, weight.shape[0], d_out, demanded)
    if config.candidate == "triton":
        return LinearGeluBackward(tensors, want_bias, config)
    gradient = GeluBackward((pre.new_empty(pre.shape), pre), True, want_bias)
    return lambda d_out, weight, pre: gradient(d_out @ weight, pre)


def gelu_backward(d_act: Tensor, pre: Tensor, want_bias: bool) -> tuple[Tensor, Tensor]:
    """(d_pre, partial sums of d_pre) of d_pre = d_act * gelu_tanh'(pre)."""
    return cast("tuple[Tensor, Tensor]", run("gelu_backward", (d_act, pre), d_act, pre, want_bias))


def _gelu_backward(
    d_act: Tensor, pre: Tensor, want_bias: bool, key: Layouts | None
) -> tuple[Tensor, Tensor | None]:
    from ..kernels.linear import GeluBackward

    d_pre, _, sums = planned(GeluBackward, (d_act, pre), False, want_bias, key=key)(d_act, pre)
    return d_pre, pre.new_empty(0, dtype=torch.float32) if key is None and sums is None else sums


def sum_partials(partials: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each (S, R, W) in fp32 -> (S, W) in ``dtype``; one or more."""
    return cast("list[Tensor]", run("sum_partials", partials, partials, dtype))


def _sum_partials(partials: Sequence[Tensor], dtype: torch.dtype, key: Layouts | None) -> list[Tensor]:
    from ..kernels.sums import SumPartials

    return planned(SumPartials, partials, dtype, key=key)(*partials) if partials else []


def _filled(key: Layouts | None, x: Tensor, results: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The results of an operator of torch, which are tensors: empty ones like x for those that there are not, the
    third, partial sums, in fp32."""
    if key is not None:
        return tuple(results)
    dtypes = (x.dtype, x.dtype, torch.float32)
    return tuple(
        x.new_empty(0, dtype=dtype) if result is None else result
        for result, dtype in zip(results, dtypes, strict=False)
    )


def _linear_gelu_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, save: bool, demanded: bool
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save else 0)


def _linear_gated_residual_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, residual: Tensor, save: bool, demanded: bool
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), x.new_empty((x.shape[0], weight.shape[0]) if save else 0)


def _partial_fake(pre: Tensor, want_bias: bool) -> Tensor:
    from ..kernels.configs.gemm import sum_rows

    tiles = -(-pre.shape[0] // sum_rows(pre.shape[0], pre.dtype))
    return pre.new_empty((1, tiles, pre.shape[1]) if want_bias else 0, dtype=torch.float32)


def _linear_gelu_backward_fake(
    d_out: Tensor, weight: Tensor, pre: Tensor, want_bias: bool, demanded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape), _partial_fake(pre, want_bias)


def _gelu_backward_fake(d_act: Tensor, pre: Tensor, want_bias: bool) -> tuple[Tensor, Tensor]:
    return pre.new_empty(pre.shape), _partial_fake(pre, want_bias)


def _sum_partials_fake(partials: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [partial.new_empty((partial.shape[0], partial.shape[2]), dtype=dtype) for partial in partials]


register("linear_gelu", _linear_gelu, _linear_gelu_fake)
register("linear_gated_residual", _linear_gated_residual, _linear_gated_residual_fake)
register("linear_gelu_backward", _linear_gelu_backward, _linear_gelu_backward_fake)
register("gelu_backward", _gelu_backward, _gelu_backward_fake)
register("sum_partials", _sum_partials, _sum_partials_fake)


def summed(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias gradient (W,) from its partial sums (1, n, W)."""
    return sum_partials([partial], dtype)[0][0]
