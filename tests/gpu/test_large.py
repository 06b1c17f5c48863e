"""Reads and writes of elements past 2^31, where an int32 offset turns negative."""

import pytest
import torch
import torch.nn.functional as F

from ditfast.kernels.adaln import AdaLNBackward, AdaLNForward, Wants
from ditfast.kernels.configs import gemm
from ditfast.parity import judge
from ditfast.reference import ops as formulas
from tests.gpu.conftest import DEVICE, FAR, usable
from tests.kernels.attention_check import backward, check, formula, forward, kernels
from tests.kernels.attention_check import draw as draw_attention
from tests.kernels.gemm_check import agree, draw, linear_gelu

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
both_kernels = pytest.mark.parametrize(
    "config", [gemm.HOPPER[0][0], gemm.PORTABLE[0][0]], ids=["tma", "pointers"]
)


@pytest.fixture(autouse=True)
def memory_for_the_others():
    """Frees 4 to 6 GB after each test: other processes' tests share the GPU."""
    yield
    torch.cuda.empty_cache()


def spread(value, *strides):
    """value with these strides, most of which is memory that nobody may read."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, strides, strict=True))
    assert size > FAR
    return torch.empty(size, dtype=value.dtype, device=DEVICE).as_strided(value.shape, strides).copy_(value)


def adaln_forward(*tensors):
    return AdaLNForward(tensors, 1e-6)(*tensors)


def adaln_backward(wants, *tensors):
    return AdaLNBackward(tensors, wants)(*tensors)


@pytest.mark.parametrize("strides", [(FAR, 1152, 1), (1152, FAR // 480 * 16, 1)], ids=["samples", "rows"])
def test_rows_are_read(strides):
    x = torch.randn(2, 40, 1152, device=DEVICE, dtype=BF16)
    gate, shift, scale = torch.randn(3, 2, 1152, device=DEVICE, dtype=BF16)
    far = spread(x, *strides)
    results = [adaln_forward(value, x, gate, shift, scale) for value in (x, far)]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    _, _, mean, rstd = results[0]
    rest = x, gate, shift, scale, mean, rstd
    wants = Wants(*(True for _ in Wants._fields))
    near = adaln_backward(wants, x, x, x, *rest)
    for operands in ((far, x, x), (x, far, x), (x, x, far)):
        results = adaln_backward(wants, *operands, *rest)
        assert all(torch.equal(*pair) for pair in zip(near[:5], results[:5], strict=True))


def assert_repeated(result, parts, yardstick, oracle):
    """A result past 2^31 that repeats one part along axis ``parts``: the first is right, and all are equal."""
    assert result.numel() > FAR
    first = result.narrow(parts, 0, 1)
    assert all((chunk == first).all() for chunk in result.split(1 << (16 if parts else 8), dim=parts))
    verdict = judge("operator", first, yardstick, oracle, BF16)
    assert verdict.ok, verdict


def test_rows_are_written():
    row, d_row = torch.randn(2, 2, 1, 1152, device=DEVICE, dtype=BF16)
    gate, shift, scale = torch.randn(3, 2, 1152, device=DEVICE, dtype=BF16)
    x, d_out = (value.expand(2, FAR // 1152 // 2 + 100, 1152) for value in (row, d_row))

    def norm(dtype):
        leaf = row.detach().to(dtype).requires_grad_()
        out = formulas.layer_norm_modulate(leaf, shift.to(dtype), scale.to(dtype), 1e-6)
        return out.detach(), torch.autograd.grad(out, leaf, d_row.to(dtype))[0]

    expected = list(zip(norm(BF16), norm(torch.float64), strict=True))
    _, out, mean, rstd = adaln_forward(x, None, None, shift, scale)
    assert_repeated(out, 1, *expected[0])
    del out
    d_x = adaln_backward(Wants(x=True), None, d_out, x, None, None, None, scale, mean, rstd)[0]
    assert_repeated(d_x, 1, *expected[1])
    del d_x
    expected = [formulas.gated_residual(*(v.to(dtype) for v in (row, row, gate))) for dtype in (BF16, torch.float64)]
    assert_repeated(adaln_forward(x, x, gate, None, None)[0], 1, *expected)


@pytest.mark.parametrize("strides", [(FAR, 432, 144, 72, 1), (432, FAR // 32, 144, 72, 1)], ids=["samples", "rows"])
@pytest.mark.parametrize("bias", [None, "1HTT"])
def test_attention_reads(strides, bias):
    with DEVICE:
        qkv, d_out, bias = draw_attention(2, 40, 2, 72, BF16, bias)
    assert not check(qkv, d_out, bias, actual=kernels(spread(qkv, *strides), d_out, bias))


def test_attention_writes():
    with DEVICE:
        qkv, d_out, _ = draw_attention(1, 256, 16, 72, BF16)
    yardstick, oracle = (formula(qkv, d_out, None, 0.1, dtype) for dtype in (BF16, torch.float64))
    out, stats = forward(qkv, 0.1)
    result, _ = forward(qkv.expand(FAR // out.numel() + 2, *qkv.shape[1:]), 0.1, save=False)
    assert_repeated(result, 0, yardstick["out"], oracle["out"])
    del result
    batch = FAR // qkv.numel() + 2
    expanded = [value.expand(batch, *value.shape[1:]) for value in (d_out, qkv)]
    copied = [value.repeat(batch, *(1 for _ in value.shape[1:])) for value in (out, stats)]
    result, _, _ = backward(*expanded, *copied, 0.1)
    assert_repeated(result, 0, yardstick["d_qkv"], oracle["d_qkv"])


def gelu(x, weight, bias):
    pre = F.linear(x, weight, bias)
    return F.gelu(pre, approximate="tanh"), pre


@both_kernels
def test_a_gemm_writes(config):
    columns, inner = 4608, 384
    with DEVICE:
        _, weight, bias, *_ = draw(1, 1, columns, inner, BF16)
    x = torch.randn(FAR // columns + 300, inner, device=DEVICE, dtype=BF16)
    out, _ = linear_gelu(x, weight, bias, False, usable(config))
    assert out.numel() > FAR
    for rows in (slice(None, 300), slice(-300, None)):
        agree(BF16, [out[rows]], lambda *values: gelu(*values)[:1], x[rows], weight, bias)


@both_kernels
def test_a_gemm_reads(config):
    with DEVICE:
        x, weight, bias, *_ = draw(1, 300, 1160, 1144, BF16)
    far = spread(x, FAR // 296 // 8 * 8, 1)  # rows of 16 bytes, for TMA
    agree(BF16, linear_gelu(far, weight, bias, True, usable(config)), gelu, x, weight, bias)
