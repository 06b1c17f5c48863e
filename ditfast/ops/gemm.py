"""The GEMMs with an epilogue as torch operators: schema, fake, registration, and the candidates behind each.

Each call picks a candidate from its shape, dtype and GPU (kernels/configs/gemm.py): the Triton kernel, the library's
GEMM with pointwise kernels, or cuBLASLt's own epilogue. With ``demanded`` it is always the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import library, register

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


def linear_gelu_by(
    config: GemmConfig, x: Tensor, weight: Tensor, bias: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """(gelu_tanh(pre), pre) of pre = x W^T + b by the candidate of ``config``; pre is empty unless ``save``."""
    if config.candidate == "triton":
        from ..kernels import linear  # imports triton

        return linear.linear_gelu(x, weight, bias, save, config)
    if config.candidate == "cublaslt" and bias is not None and x.numel():
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True), x.new_empty(0)
    pre = F.linear(x, weight, bias)
    out = F.gelu(pre, approximate="tanh")
    return out, pre if save else x.new_empty(0)


def linear_gated_residual_by(
    config: GemmConfig, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, residual: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """(residual + gate * branch, branch) of branch = x W^T + b; branch is empty unless ``save``."""
    from ..kernels import adaln, linear

    if config.candidate == "triton":
        return linear.linear_gated_residual(x, weight, bias, gate, residual, save, config)
    branch = F.linear(x, weight, bias)
    out = adaln.adaln_fwd(residual, branch.view(residual.shape), gate, None, None, 0.0)[0]
    return out, branch if save else x.new_empty(0)


def linear_gelu_backward_by(
    config: GemmConfig, d_out: Tensor, weight: Tensor, pre: Tensor, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_pre, activation, partial sums of d_pre) of d_pre = (d_out W) * gelu_tanh'(pre)."""
    from ..kernels import linear

    if config.candidate == "triton":
        return linear.linear_gelu_backward(d_out, weight, pre, want_bias, config)
    return linear.gelu_backward(d_out @ weight, pre, True, want_bias)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, save: bool, demanded: bool) -> tuple[Tensor, Tensor]:
    operator = "linear_gelu_save" if save else "linear_gelu"
    return linear_gelu_by(_config(operator, x.shape[0], *weight.shape, x, demanded), x, weight, bias, save)


def _linear_gated_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, residual: Tensor, save: bool, demanded: bool
) -> tuple[Tensor, Tensor]:
    operator = "linear_gated_residual_save" if save else "linear_gated_residual"
    config = _config(operator, x.shape[0], *weight.shape, x, demanded)
    return linear_gated_residual_by(config, x, weight, bias, gate, residual, save)


def _linear_gelu_backward(
    d_out: Tensor, weight: Tensor, pre: Tensor, want_bias: bool, demanded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    config = _config("linear_gelu_backward", *pre.shape, weight.shape[0], d_out, demanded)
    return linear_gelu_backward_by(config, d_out, weight, pre, want_bias)


def _config(*arguments: Any) -> GemmConfig:
    from ..kernels.configs import gemm

    return gemm.gemm_config(*arguments)


def _gelu_backward(d_act: Tensor, pre: Tensor, want_bias: bool) -> tuple[Tensor, Tensor]:
    from ..kernels import linear

    d_pre, _, partial = linear.gelu_backward(d_act, pre, False, want_bias)
    return d_pre, partial


def _sum_partials(partials: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    from ..kernels import sums

    return sums.sum_partials(partials, dtype)


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
    return cast(Tensor, torch.ops.ditfast.sum_partials.default([partial], dtype)[0][0])
