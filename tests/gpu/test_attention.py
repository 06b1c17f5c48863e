"""The attention kernels on a GPU, against fp64: bf16 dots at every head dim, with and without a bias."""

import pytest
import torch

from ditfast.kernels import attention
from tests.gpu.conftest import DEVICE, OtherWork, differing
from tests.kernels.attention_check import check, draw, draw_saturated, kernels, packed
from tests.kernels.conftest import poison

pytestmark = pytest.mark.gpu
every_bias = pytest.mark.parametrize("bias", [None, "1HTT"])


def drawn(*shape, **options):
    with DEVICE:
        return draw(*shape, **options)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("tokens", [256, 257, 1024])
@every_bias
def test_bf16_dots(head_dim, tokens, bias):
    assert not check(*drawn(3, tokens, 2, head_dim, torch.bfloat16, bias))


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@every_bias
def test_other_dtypes(head_dim, dtype, bias):
    assert not check(*drawn(3, 257, 2, head_dim, dtype, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("tokens", "head_dim"), [(16, 64), (64, 72), (128, 128)])
@every_bias
def test_saturated_rows(tokens, head_dim, bias, dtype):
    with DEVICE:
        assert not check(*draw_saturated(3, tokens, 2, head_dim, dtype, bias))


@pytest.mark.parametrize("bias", ["BHTT", "B11T", "111T", "1HT1"])
def test_biases_that_broadcast(bias):
    assert not check(*drawn(3, 257, 2, 72, torch.bfloat16, bias))


@pytest.mark.parametrize("scale", [-0.3, 100.0])
def test_scales(scale):
    """Exponents far apart, through the GPU's own exp2."""
    assert not check(*drawn(3, 257, 2, 72, torch.bfloat16), scale=scale)


@pytest.mark.parametrize("offset", [-torch.inf, -1e4])
def test_masked_keys(offset):
    """The first tiles are masked entirely."""
    qkv, d_out, bias = drawn(2, 257, 2, 72, torch.bfloat16, "1HTT")
    bias[:, 1, :, :130] = offset
    assert not check(qkv, d_out, bias)


def test_masked_rows():
    """They give 0 and no gradient; torch's own kernels may give NaN, so there is no yardstick."""
    qkv, d_out, bias = drawn(2, 257, 2, 72, torch.bfloat16, "1HTT")
    before = kernels(qkv, d_out, bias)
    bias[:, 0, 3:140] = -torch.inf
    results = kernels(qkv, d_out, bias)
    assert all(value.isfinite().all() for value in results.values())
    assert not results["out"][:, 3:140, :72].any() and not results["d_qkv"][:, 3:140, 0, 0].any()
    assert not results["d_bias"][:, 0, 3:140].any()
    for rows in (slice(None, 3), slice(140, None)):
        assert torch.equal(results["out"][:, rows], before["out"][:, rows])


@pytest.mark.parametrize("tokens", [33, 257])
@every_bias
def test_every_element_is_written(tokens, bias, monkeypatch):
    poison(monkeypatch)
    assert not check(*drawn(3, tokens, 2, 72, torch.bfloat16, bias))


@pytest.mark.parametrize("head_dim", [64, 72, 128])
@every_bias
def test_many_runs_are_bit_equal(head_dim, bias, monkeypatch):
    """The backward's second launch reads what the first one wrote; loads run stages ahead of what is computed."""
    poison(monkeypatch)
    inputs, work = drawn(32, 257, 16, head_dim, torch.bfloat16, bias=bias), OtherWork()
    first = kernels(*inputs)
    for repeat in range(20):
        work.queue(repeat % 4)
        assert not differing(first, kernels(*inputs)), repeat


@pytest.mark.parametrize("gap", [1, 3, 8])
@every_bias
def test_rows_with_gaps(gap, bias):
    """Strides that are no multiples of 8 elements take narrower accesses, as addresses do that are none."""
    qkv, d_out, bias = drawn(3, 257, 2, 72, torch.bfloat16, bias)
    rows = packed(qkv)
    apart = torch.cat([rows, torch.full_like(rows[..., :gap], torch.nan)], dim=-1)[..., : rows.shape[2]]
    apart = apart.unflatten(2, qkv.shape[2:])
    assert attention.alignment(apart) == (8 if gap == 8 else 1)
    moved = torch.cat([d_out.new_zeros(gap), d_out.flatten()])[gap:].view(d_out.shape)
    assert not check(apart, moved, bias)
