"""Elements past 2^31, where an int32 offset turns negative: read there, and written there."""

import pytest
import torch
import torch.nn.functional as F
from attention_helpers import draw as draw_attention
from attention_helpers import kernels
from gemm_helpers import agree, draw
from gpu_helpers import DEVICE, FAR, differing, usable

from ditfast.kernels import adaln, gemm_config, linear
from ditfast.kernels.attention import attention_fwd
from ditfast.kernels.attention_bwd import attention_bwd

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
both_kernels = pytest.mark.parametrize(
    "config", [gemm_config.HOPPER[0][0], gemm_config.PORTABLE[0][0]], ids=["tma", "pointers"]
)


@pytest.fixture(autouse=True)
def memory_for_the_others():
    """Tests of other processes run beside: none keeps the 4 to 6 GB that it had."""
    yield
    torch.cuda.empty_cache()


def spread(value, *strides):
    """value with these strides, most of which is memory that nobody may read."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, strides, strict=True))
    assert size > FAR
    return torch.empty(size, dtype=value.dtype, device=DEVICE).as_strided(value.shape, strides).copy_(value)


@pytest.mark.parametrize("strides", [(FAR, 1152, 1), (1152, FAR // 30, 1)], ids=["samples", "rows"])
def test_rows_are_read(strides):
    x = torch.randn(2, 40, 1152, device=DEVICE, dtype=BF16)
    gate, shift, scale = torch.randn(3, 2, 1152, device=DEVICE, dtype=BF16)
    far = spread(x, *strides)
    forward = [adaln.adaln_fwd(value, x, gate, shift, scale, 1e-6) for value in (x, far)]
    assert all(torch.equal(*pair) for pair in zip(*forward, strict=True))
    _, _, mean, rstd = forward[0]
    arguments = (x, gate, shift, scale, mean, rstd, True, True, True, True, True, True)
    near = adaln.adaln_bwd(x, x, x, *arguments)
    for given in ((far, x, x), (x, far, x), (x, x, far)):
        found = adaln.adaln_bwd(*given, *arguments)
        assert all(torch.equal(*pair) for pair in zip(near[:5], found[:5], strict=True))


def test_rows_are_written():
    """Outputs of more than 2^31 elements, from one row of each sample again and again."""
    tokens = FAR // 1152 // 2 + 100
    row = torch.randn(2, 1, 1152, device=DEVICE, dtype=BF16)
    gate, shift, scale = torch.randn(3, 2, 1152, device=DEVICE, dtype=BF16)
    x = row.expand(2, tokens, 1152)
    _, out, mean, rstd = adaln.adaln_fwd(x, None, None, shift, scale, 1e-6)
    assert out.numel() > FAR
    expected = adaln.adaln_fwd(row, None, None, shift, scale, 1e-6)[1]
    assert all((part == expected[:, :1]).all() for part in out.split(1 << 16, dim=1))
    del out
    r = adaln.adaln_fwd(x, x, gate, None, None, 0.0)[0]
    expected = adaln.adaln_fwd(row, row, gate, None, None, 0.0)[0]
    assert all((part == expected).all() for part in r.split(1 << 16, dim=1))
    del r
    wants = (True, False, False, False, False, False)
    d_x = adaln.adaln_bwd(None, x, x, None, None, None, scale, mean, rstd, *wants)[0]
    expected = adaln.adaln_bwd(None, row, row, None, None, None, scale, mean[:, :1], rstd[:, :1], *wants)[0]
    assert d_x.numel() > FAR and all((part == expected).all() for part in d_x.split(1 << 16, dim=1))


@pytest.mark.parametrize("strides", [(FAR, 432, 144, 72, 1), (432, FAR // 32, 144, 72, 1)], ids=["samples", "rows"])
@pytest.mark.parametrize("bias", [None, "1HTT"])
def test_attention_reads(strides, bias):
    with DEVICE:
        qkv, d_out, bias = draw_attention(2, 40, 2, 72, BF16, bias)
    assert not differing(kernels(qkv, d_out, bias), kernels(spread(qkv, *strides), d_out, bias))


def test_attention_writes():
    """One sample again and again, until its outputs and its gradients lie there."""
    with DEVICE:
        qkv, d_out, _ = draw_attention(1, 256, 16, 72, BF16)
    out, stats = attention_fwd(qkv, 0.1)
    whole, _ = attention_fwd(qkv.expand(FAR // out.numel() + 2, *qkv.shape[1:]), 0.1, save=False)
    assert whole.numel() > FAR and (whole[0] == out[0]).all() and (whole[-2:] == out).all()
    del whole
    d_qkv, _, _ = attention_bwd(d_out, qkv, out, stats, 0.1)
    batch = FAR // d_qkv.numel() + 2
    expanded = [value.expand(batch, *value.shape[1:]) for value in (d_out, qkv)]
    repeated = [value.repeat(batch, *(1 for _ in value.shape[1:])) for value in (out, stats)]
    whole, _, _ = attention_bwd(*expanded, *repeated, 0.1)
    assert whole.numel() > FAR and (whole[0] == d_qkv[0]).all() and (whole[-2:] == d_qkv).all()


@both_kernels
def test_a_gemm_writes(config):
    columns, inner = 4608, 384
    with DEVICE:
        _, weight, bias, *_ = draw(1, 1, columns, inner, BF16)
    x = torch.randn(FAR // columns + 300, inner, device=DEVICE, dtype=BF16)
    out, _ = linear.linear_gelu(x, weight, bias, False, usable(config))
    assert out.numel() > FAR

    def formula(x, weight, bias):
        return [F.gelu(F.linear(x, weight, bias), approximate="tanh")]

    for rows in (slice(None, 300), slice(-300, None)):
        agree(BF16, [out[rows]], formula, x[rows], weight, bias)


@both_kernels
def test_a_gemm_reads(config):
    with DEVICE:
        x, weight, bias, *_ = draw(1, 300, 1160, 1144, BF16)
    far = spread(x, FAR // 296 // 8 * 8, 1)  # rows of 16 bytes, for TMA
    near = linear.linear_gelu(x, weight, bias, True, usable(config))
    for one, other in zip(linear.linear_gelu(far, weight, bias, True, usable(config)), near, strict=True):
        assert torch.equal(one, other)
