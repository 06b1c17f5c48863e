"""The GEMMs' real tiles, which no interpreter can afford, and GELU by the GPU's own tanh."""

import pytest
import torch
import torch.nn.functional as F

from ditfast.kernels.configs import gemm
from tests.gpu.conftest import DEVICE, OtherWork, usable
from tests.kernels.conftest import DTYPES
from tests.kernels.gemm_check import (
    check_linear_gated_residual,
    check_linear_gelu,
    check_linear_gelu_backward,
    draw,
    gelu_gradient,
    linear_gated_residual,
    linear_gelu,
    linear_gelu_backward,
)

pytestmark = pytest.mark.gpu
TILES = [entry[0] for entry in (*gemm.HOPPER, *gemm.PORTABLE)]
every_tile = pytest.mark.parametrize("config", TILES, ids=lambda config: "x".join(map(str, config)))
SHAPE = (3, 257, 1160, 1144)  # M, N and K are no multiples of any tile's, and samples are straddled


def drawn(*shape):
    with DEVICE:
        return draw(*shape)


@every_tile
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_heuristics_tiles(config, dtype):
    if dtype == "fp32":
        config = config._replace(block_k=32)  # as much shared memory
    config, inputs = usable(config), drawn(*SHAPE, DTYPES[dtype])
    check_linear_gelu(config, inputs)
    check_linear_gelu_backward(config, inputs)
    for stream in ("same", "fp32"):
        check_linear_gated_residual(config, inputs, stream)


@every_tile
def test_many_runs_are_bit_equal(config):
    """Persistent programs start their next tile while others store: the order must not matter."""
    x, weight, bias, vectors, residual = drawn(16, 257, 1160, 1144, torch.bfloat16)
    other_work, config = OtherWork(), usable(config)

    def results():
        act, pre = linear_gelu(x, weight, bias, True, config)
        gated = linear_gated_residual(x, weight, bias, vectors[:, :1160], residual, True, config)
        return act, pre, *gated, *linear_gelu_backward(x, weight.t().contiguous(), pre, True, config)

    first = results()
    for repeat in range(20):
        other_work.queue(repeat % 4)
        assert all(torch.equal(result, repeated) for result, repeated in zip(first, results(), strict=True)), repeat


@every_tile
def test_the_backward_computes_the_activation_again(config):
    """Bit for bit: the forward computes it from the rounded pre-activation that it stores."""
    x, weight, bias, *_ = drawn(*SHAPE, torch.bfloat16)
    act, pre = linear_gelu(x, weight, bias, True, usable(config))
    recomputed = linear_gelu_backward(x, weight.t().contiguous(), pre, False, usable(config))[1]
    assert torch.equal(recomputed, act)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("config", [gemm.HOPPER[-1][0], gemm.PORTABLE[-1][0]], ids=["tma", "pointers"])
def test_large_pre_activations(config, dtype):
    """Where the tangent is 1, every result is exact; nothing overflows on the way there."""
    pre = torch.tensor([[-3e4, -3e3, -300.0, -20.0, 20.0, 300.0, 3e3, 3e4]], device=DEVICE, dtype=DTYPES[dtype])
    eye = torch.eye(8, device=DEVICE, dtype=pre.dtype)
    act, saved = linear_gelu(pre, eye, None, True, usable(config))
    assert torch.equal(saved, pre)
    assert torch.equal(act.double(), F.gelu(pre.double(), approximate="tanh"))
    d_pre, recomputed, _ = linear_gelu_backward(torch.ones_like(pre), eye, pre, False, usable(config))
    slope, _ = gelu_gradient(torch.ones_like(pre).double(), pre.double())
    assert torch.equal(recomputed, act) and torch.equal(d_pre.double(), slope)
