"""Shared by the GEMM kernels' tests: inputs, and each launcher by the numerics rule."""

import pytest
import torch
import torch.nn.functional as F

from ditfast.parity import judge

pytest.importorskip("triton")
from ditfast.kernels import linear  # noqa: E402


def draw(batch, tokens, columns, inner, dtype):
    """x, weight, bias, three vectors a sample side by side, and a residual."""
    x = torch.randn(batch * tokens, inner)
    weight = torch.randn(columns, inner) * inner**-0.5
    vectors = torch.randn(batch, 3 * columns)
    residual = torch.randn(batch, tokens, columns)
    return [value.to(dtype) for value in (x, weight, weight[:, 0] * 3, vectors, residual)]


def agree(dtype, actual, formula, *inputs):
    """By the numerics rule, the formula in fp64 being the oracle and in the working dtype the yardstick."""
    oracle = formula(*(value.double() for value in inputs))
    yardstick = formula(*inputs)
    for index, results in enumerate(zip(actual, yardstick, oracle, strict=True)):
        verdict = judge("operator", *results, dtype)
        assert verdict.ok, (index, verdict)


def linear_gelu(x, weight, bias, save, config=None):
    """(activation, pre-activation or None), by a plan of its own; so are the next."""
    return linear.LinearGelu((x, weight, bias), save, config)(x, weight, bias)


def linear_gated_residual(*arguments):
    *tensors, save, config = arguments
    return linear.LinearGatedResidual(tensors, save, config)(*tensors)


def linear_gelu_backward(d_out, weight, pre, want_bias, config=None):
    return linear.LinearGeluBackward((d_out, weight, pre), want_bias, config)(d_out, weight, pre)


def gelu_backward(d_act, pre, want_act, want_bias):
    return linear.GeluBackward((d_act, pre), want_act, want_bias)(d_act, pre)


def check_linear_gelu(config, inputs, biased=True):
    x, weight, bias, *_ = inputs

    def formula(x, weight, bias):
        pre = F.linear(x, weight, bias if biased else None)
        return F.gelu(pre, approximate="tanh"), pre

    inputs = (x, weight, bias if biased else None)
    agree(x.dtype, linear_gelu(*inputs, True, config), formula, x, weight, bias)
    alone, nothing = linear_gelu(*inputs, False, config)
    assert nothing is None
    agree(x.dtype, [alone], lambda *values: formula(*values)[:1], x, weight, bias)


def check_linear_gated_residual(config, inputs, stream="same"):
    """Gates differ from sample to sample, and come as a chunk of a modulation."""
    x, weight, bias, vectors, residual = inputs
    gate = vectors.chunk(3, dim=1)[1]
    residual = residual if stream == "same" else residual.float()

    def formula(x, weight, bias, gate, residual):
        branch = F.linear(x, weight, bias)
        return residual + gate.unsqueeze(1) * branch.view(residual.shape), branch

    inputs = (x, weight, bias, gate, residual)
    actual = linear_gated_residual(*inputs, True, config)
    assert actual[0].dtype == residual.dtype
    agree(x.dtype, actual, formula, *inputs)
    alone, nothing = linear_gated_residual(*inputs, False, config)
    assert nothing is None
    agree(x.dtype, [alone], lambda *values: formula(*values)[:1], *inputs)


def gelu_gradient(d_act, pre):
    pre = pre.detach().requires_grad_()
    with torch.enable_grad():
        act = F.gelu(pre, approximate="tanh")
        return torch.autograd.grad(act, pre, d_act)[0], act.detach()


def check_linear_gelu_backward(config, inputs):
    d_out, weight, _, _, pre = inputs
    weight, pre = weight.t().contiguous(), pre.flatten(0, 1)

    def formula(d_out, weight, pre):
        d_pre, act = gelu_gradient(d_out @ weight, pre)
        return d_pre, act, d_pre.sum(0)

    d_pre, act, partial = linear_gelu_backward(d_out, weight, pre, True, config)
    assert partial.dtype == torch.float32
    agree(d_out.dtype, (d_pre, act, partial.sum((0, 1))), formula, d_out, weight, pre)
    assert linear_gelu_backward(d_out, weight, pre, False, config)[2] is None
