"""Shared by the attention kernels' tests: inputs, both kernels in a row, and the numerics rule on their results."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast.parity import judge
from ditfast.reference import ops as formulas
from tests.kernels.conftest import failures

pytest.importorskip("triton")
from ditfast.kernels.attention import AttentionForward  # noqa: E402
from ditfast.kernels.attention_bwd import AttentionBackward  # noqa: E402
from ditfast.kernels.configs.attention import SPLIT_TOKENS  # noqa: E402


def draw(batch, tokens, heads, head_dim, dtype=torch.float32, bias=None):
    """qkv, the incoming gradient and a bias of this shape, "B", "H" and "T" standing for the sizes."""
    sizes = {"B": batch, "H": heads, "T": tokens, "1": 1}
    qkv = torch.randn(batch, tokens, 3, heads, head_dim).to(dtype)
    d_out = torch.randn(batch, tokens, heads * head_dim).to(dtype)
    return qkv, d_out, None if bias is None else torch.randn([sizes[axis] for axis in bias]).to(dtype)


def draw_saturated(*shape, deviation=100.0, **options):
    """As :func:`draw`, then a scale, with which the logits have this deviation: from 50 on most rows are saturated.

    Queries and keys are whole numbers and the scale a power of 4, so that logits are exact in any order of summation:
    else rows with two close keys would depend on their rounding, which is chance.
    """
    scale = 2.0**-4
    qkv, d_out, bias = draw(*shape, **options)
    factor = (deviation / (scale * qkv.shape[-1] ** 0.5)) ** 0.5
    qkv[:, :, :2] = (qkv[:, :, :2].float() * factor).round()
    return qkv, d_out, bias, scale


def packed(qkv):
    """(B, T, 3, H, D) as the packed projection, without a copy: its strides are part of what is tested."""
    flat = qkv.flatten(2)
    assert flat.data_ptr() == qkv.data_ptr()
    return flat


def forward(qkv, scale, bias=None, save=True):
    """(out, stats) of qkv with five axes."""
    tensors = packed(qkv), bias
    return AttentionForward(tensors, qkv.shape[3], scale, save)(*tensors)


def backward(d_out, qkv, out, stats, scale, bias=None, want_bias=False, want_sums=False):
    """(d_qkv with five axes, d_bias, sums)."""
    tensors = d_out, packed(qkv), out, stats, bias
    d_qkv, *others = AttentionBackward(tensors, qkv.shape[3], scale, want_bias, want_sums)(*tensors)
    return d_qkv.view(qkv.shape), *others


def kernels(qkv, d_out, bias=None, scale=None, want_bias=True):
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    out, stats = forward(qkv, scale, bias)
    want_bias = want_bias and bias is not None
    d_qkv, d_bias, sums = backward(d_out, qkv, out, stats, scale, bias, want_bias, True)
    results = {"out": out, "d_qkv": d_qkv, "sums": sums.sum(0)}
    return results | ({"d_bias": d_bias} if want_bias else {})


def formula(qkv, d_out, bias, scale, dtype):
    leaf = qkv.detach().to(dtype).requires_grad_()
    leaves = [leaf] if bias is None else [leaf, bias.detach().to(dtype).requires_grad_()]
    out = formulas.self_attention(leaf.flatten(2), qkv.shape[3], scale, *leaves[1:])
    gradients = torch.autograd.grad(out, leaves, d_out.to(dtype))
    results = {"out": out.detach(), "d_qkv": gradients[0], "sums": gradients[0].sum((0, 1)).flatten()}
    return results | ({} if bias is None else {"d_bias": gradients[1]})


def check(qkv, d_out, bias=None, scale=None, actual=None):
    """The verdicts by name that failed: out, d_qkv, d_bias and the sums of d_qkv over samples and tokens.

    actual: results of the kernels for the same values elsewhere.
    """
    actual = kernels(qkv, d_out, bias, scale) if actual is None else actual
    oracle = formula(qkv, d_out, bias, scale, torch.float64)
    # for a saturated softmax the unfused one loses least
    with sdpa_kernel(SDPBackend.MATH) if qkv.shape[1] <= SPLIT_TOKENS else nullcontext():
        yardstick = formula(qkv, d_out, bias, scale, qkv.dtype)
    assert actual["d_qkv"].is_contiguous() and actual["out"].is_contiguous()
    dtypes = {name: qkv.dtype if value.dtype == qkv.dtype else torch.float32 for name, value in actual.items()}
    dtypes["sums"] = qkv.dtype  # the gradient of a bias of that dtype
    return failures(
        {name: judge("operator", actual[name], yardstick[name], oracle[name], dtypes[name]) for name in actual}
    )
