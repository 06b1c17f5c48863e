"""The GEMMs with an epilogue in Triton's interpreter, kernel by kernel, against fp64."""

import pytest
import torch
import torch.nn.functional as F

from ditfast.kernels import launch, linear, sums
from ditfast.kernels.configs import gemm
from ditfast.kernels.configs.gemm import GemmConfig
from ditfast.parity import judge
from tests.kernels.conftest import DTYPES, watch
from tests.kernels.gemm_check import (
    agree,
    check_linear_gated_residual,
    check_linear_gelu,
    check_linear_gelu_backward,
    draw,
    gelu_backward,
    gelu_gradient,
    linear_gated_residual,
    linear_gelu,
    linear_gelu_backward,
)

pytestmark = pytest.mark.kernels

# small and uneven: ragged shapes then have several tiles, groups and parts
POINTERS = GemmConfig("triton", 32, 64, 16, 2, 2, 4, 2, 0, 0)
CONFIGS = {"pointers": POINTERS, "tma": GemmConfig("triton", 32, 64, 16, 2, 2, 4, 2, 0, 1)}
# batch, tokens, N, K: tiles that divide nothing, straddle samples, hold several, or just fit
# (eight sums of eight products are too few to judge by: the yardstick's errors may all happen to be small)
QUICK = pytest.param((3, 7, 72, 200), marks=pytest.mark.quick)
SHAPES = [(1, 1, 8, 72), QUICK, (2, 33, 144, 72), (3, 32, 64, 64), (1, 70, 200, 8), (5, 3, 96, 40)]
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@pytest.mark.pairwise
@every_config
@every_dtype
@every_shape
@pytest.mark.parametrize("biased", [True, False])
def test_linear_gelu(config, dtype, shape, biased):
    check_linear_gelu(config, draw(*shape, DTYPES[dtype]), biased)


@pytest.mark.pairwise
@every_config
@every_dtype
@every_shape
@pytest.mark.parametrize("stream", ["same", "fp32"])
def test_linear_gated_residual(config, dtype, shape, stream):
    check_linear_gated_residual(config, draw(*shape, DTYPES[dtype]), stream)


@every_config
@every_dtype
@every_shape
def test_linear_gelu_backward(config, dtype, shape):
    check_linear_gelu_backward(config, draw(*shape, DTYPES[dtype]))


@every_dtype
@pytest.mark.parametrize("rows", [1, 64, 131])
def test_gelu_backward(dtype, rows):
    dtype = DTYPES[dtype]
    d_act, pre = (torch.randn(rows, 72).to(dtype) for _ in range(2))
    d_act = d_act.repeat(1, 2)[:, :72]  # rows with a gap between them
    d_pre, act, partial = gelu_backward(d_act, pre, True, True)

    def formula(d_act, pre):
        d_pre, act = gelu_gradient(d_act, pre)
        return d_pre, act, d_pre.sum(0)

    agree(dtype, (d_pre, act, partial.sum((0, 1))), formula, d_act, pre)
    recomputed, nothing, no_sums = gelu_backward(d_act, pre, False, False)
    assert torch.equal(recomputed, d_pre) and nothing is no_sums is None


def assert_each_is_judged(actual, yardstick, exact):
    """Element by element: in a norm the largest would hide the others."""
    for element in zip(*(values.flatten() for values in (actual, yardstick, exact)), strict=True):
        verdict = judge("operator", *element, actual.dtype)
        assert verdict.ok, (element, verdict)


@every_config
def test_large_pre_activations(config):
    """GELU and its slope where exp over- and underflows."""
    pre = torch.tensor([[-3e4, -300.0, -20.0, -1.0, 0.0, 20.0, 300.0, 3e4]])
    eye = torch.eye(8)
    act, saved = linear_gelu(pre, eye, None, True, config)
    assert torch.equal(saved, pre)
    expected = F.gelu(pre.double(), approximate="tanh")
    assert_each_is_judged(act, F.gelu(pre, approximate="tanh"), expected)
    d_pre, recomputed, _ = linear_gelu_backward(torch.ones_like(pre), eye, pre, False, config)
    assert torch.equal(recomputed, act)
    slope = gelu_gradient(torch.ones_like(expected), pre.double())[0]
    assert_each_is_judged(d_pre, gelu_gradient(torch.ones_like(pre), pre)[0], slope)


@every_config
def test_the_backward_computes_the_activation_again(config):
    """Bit for bit: the forward computes it from the rounded pre-activation that it stores."""
    x, weight, bias, *_ = draw(3, 7, 144, 72, torch.float16)
    act, pre = linear_gelu(x, weight, bias, True, config)
    recomputed = linear_gelu_backward(x, weight.t().contiguous(), pre, False, config)[1]
    assert torch.equal(recomputed, act)


@every_config
def test_two_runs_are_equal(config):
    x, weight, bias, *_ = draw(3, 33, 144, 72, torch.float32)
    runs = [linear_gelu_backward(x, weight.t(), torch.ones(99, 144), True, config)
            for _ in range(2)]  # fmt: skip
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_misaligned_operands_take_the_other_kernel(monkeypatch):
    """TMA wants addresses and row strides of 16 bytes, and rows apart."""
    x, weight = torch.randn(33, 72), torch.randn(144, 72)
    shifted = torch.randn(33 * 72 + 1)[1:].view(33, 72)
    gaps = torch.randn(33, 73)[:, :72]
    overlapping = weight.as_strided((33, 72), (16, 1))
    assert linear._takes_tma(shifted, 72)  # by its layout
    assert not linear._takes_tma(gaps, 73) and not linear._takes_tma(overlapping, 16)
    config = CONFIGS["tma"]._replace(block_m=64)
    kernels = watch(monkeypatch, launch.Launch, note=lambda launch, _: launch.kernel.__name__)

    def formula(a, b):
        return F.gelu(a @ b.t(), approximate="tanh"), a @ b.t()

    for operand in (x, shifted, gaps, overlapping):
        agree(torch.float32, linear_gelu(operand, weight, None, True, config), formula, operand, weight)
    assert kernels == ["_gemm_tma_kernel", *["_gemm_kernel"] * 3]
    plan = linear.LinearGelu((x, weight, None), True, config)  # one for all that lie alike, wherever they begin
    for operand in (shifted, x):
        agree(torch.float32, plan(operand, weight, None), formula, operand, weight)
    assert kernels[4:] == ["_gemm_kernel", "_gemm_tma_kernel"]


@pytest.mark.parametrize("rows", [16, 32, 64, 128, 256])
def test_the_other_kernel_has_as_many_rows(rows):
    """The fallback from TMA keeps the number of rows of a gradient's partial sums."""
    d_out, pre = (torch.randn(33, 72).half() for _ in range(2))
    d_out = torch.cat([d_out, d_out], 1)[:, 1:73]
    config = CONFIGS["tma"]._replace(block_m=rows, block_n=32, block_k=16)
    partial = linear_gelu_backward(d_out, torch.eye(72).half(), pre, True, config)[2]

    def formula(d_out, pre):
        return [torch.stack([part.sum(0) for part in gelu_gradient(d_out, pre)[0].split(rows)])]

    agree(torch.float16, partial, formula, d_out, pre)


@pytest.mark.parametrize(("dtype", "stream", "parts"), [("fp16", "fp16", 2), ("fp16", "fp32", 4), ("fp32", "fp32", 4)])
def test_four_byte_results_take_twice_the_parts(monkeypatch, dtype, stream, parts):
    """With twice the parts, each part takes the same shared memory and registers."""
    launches = watch(monkeypatch, launch.Launch, note=lambda launch, _: launch)
    x, weight, bias, vectors, residual = draw(2, 3, 72, 72, DTYPES[dtype])
    linear_gated_residual(x, weight, bias, vectors[:, :72], residual.to(DTYPES[stream]), False, POINTERS)
    [launched] = launches
    assert dict(zip(launched.kernel.arg_names[-len(launched.rest) :], launched.rest, strict=True))["PARTS"] == parts
    assert POINTERS.parts == 2


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sums_of_several_groups(count):
    shapes = [(6, 2, 72), (1, 131, 200), (1, 1, 8), (2, 65, 130)][:count]
    partials = [torch.randn(shape) for shape in shapes]
    results = sums.SumPartials(partials, torch.float32)(*partials)
    for actual, partial in zip(results, partials, strict=True):
        verdict = judge("operator", actual, partial.sum(1), partial.double().sum(1), torch.float32)
        assert verdict.ok


@pytest.mark.parametrize("operator", ["linear_gelu", "linear_gelu_save", "linear_gelu_backward"])
def test_the_heuristic(operator):
    def choose(rows, columns, inner, dtype=torch.bfloat16, major=9, **options):
        count = 132 if major == 9 else 108
        return gemm.heuristic(operator, rows, columns, inner, dtype, major, count, **options)

    large = choose(65536, 4608, 1152)
    assert large.candidate == ("cublaslt" if operator == "linear_gelu" else "triton")
    assert (large.block_m, large.block_n, large.tma) == (128, 256, 1)
    # one sample: 256 rows are 36 tiles of 128 x 256, a quarter of the multiprocessors
    assert choose(256, 4608, 1152).block_n < 256
    assert choose(65536, 4608, 1152, major=10).tma == 1
    # 99 KB of shared memory a block, and no wgmma
    assert not any(choose(rows, 4608, 1152, major=12).tma for rows in (64, 256, 4096, 65536))
    ampere = choose(65536, 4608, 1152, major=8)
    assert (ampere.tma, ampere.block_m, ampere.block_n, ampere.max_registers) == (0, 128, 128, 128)
    assert choose(65536, 4608, 1152, torch.float32).candidate == "separate"
    assert choose(65536, 4608, 1152, torch.float32, demanded=True) == gemm.IEEE
    assert choose(8, 4608, 1152, demanded=True).candidate == "triton"
    if operator != "linear_gelu":
        assert choose(8, 4608, 1152).candidate == "separate"
        assert choose(65536, 4608, 1152, torch.float32, tf32=True).candidate == "triton"


