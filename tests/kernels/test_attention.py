"""The attention kernels in Triton's interpreter, against fp64: outputs and every gradient."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast.kernels import attention, attention_bwd
from ditfast.kernels.configs import attention as configs
from ditfast.kernels.configs.attention import AttentionConfig, attention_config
from ditfast.parity import judge, relative_error
from tests.kernels.attention_check import (
    backward,
    check,
    draw,
    draw_saturated,
    formula,
    forward,
    kernels,
    packed,
)
from tests.kernels.conftest import DTYPES, poison

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
pytestmark = pytest.mark.kernels
INF = float("inf")
EPS = torch.finfo(torch.float32).eps


def tiles(monkeypatch, block_m, block_n, **by_operator):
    """Launches the kernels with these block sizes, or with those named by operator."""

    def config(operator, *_):
        return AttentionConfig(*by_operator.get(operator.removeprefix("attention_"), (block_m, block_n)), 4, 2)

    monkeypatch.setattr(configs, "attention_config", config)
    monkeypatch.setattr(configs, "_launch_config", configs._launch_config.__wrapped__)


@pytest.mark.parametrize(
    ("head_dim", "plain", "saturated"),
    [
        (8, "fp32", "fp16"),
        (32, "bf16", "fp32"),
        (48, "fp16", "bf16"),
        (64, "bf16", "fp16"),
        pytest.param(72, "fp32", "bf16", marks=pytest.mark.quick),
        (80, "fp16", "fp32"),
        (96, "fp32", "fp16"),
        (120, "bf16", "fp32"),
        (128, "fp16", "bf16"),
    ],
)
def test_head_dims(head_dim, plain, saturated):
    assert not check(*draw(1, 40, 2, head_dim, DTYPES[plain]))
    assert not check(*draw_saturated(1, 40, 2, head_dim, DTYPES[saturated]))


@every_dtype
@pytest.mark.parametrize(("tokens", "head_dim"), [(2, 72), (5, 8), (16, 64), (100, 16)])
def test_saturated_rows(tokens, head_dim, dtype):
    """As right as an unfused softmax, in one tile of keys, two and more."""
    bias = "BHTT" if (tokens in (2, 100)) == (dtype == torch.bfloat16) else None
    assert not check(*draw_saturated(max(32 // tokens, 1), tokens, 2, head_dim, dtype, bias))


@every_dtype
@pytest.mark.parametrize("tokens", [129, pytest.param(257, marks=pytest.mark.long)])
def test_saturated_long_rows_are_as_right_as_a_flash_kernels(tokens, dtype):
    for deviation in (50.0, 200.0):
        arguments = draw_saturated(1, tokens, 2, 32, dtype, deviation=deviation)
        actual, oracle = kernels(*arguments), formula(*arguments, torch.float64)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash = formula(*arguments, dtype)
        assert all(judge("operator", actual[name], flash[name], oracle[name], dtype).ok for name in actual)


def test_each_launch_may_sum_in_an_order_of_its_own(monkeypatch):
    """The statistics do not rely on two launches' dots being bit-equal."""
    tiles(monkeypatch, 32, 16, dq=(32, 64), dkv=(64, 16), dbias=(64, 16))
    assert not check(*draw_saturated(2, 50, 2, 72, bias="1HTT", deviation=200.0))


@pytest.mark.parametrize(("batch", "tokens"), [(3, 1), (3, 7), (3, 16), (2, 64), (1, 128), (1, 129)])
@pytest.mark.parametrize("bias", [None, "1HTT"])
def test_tokens(batch, tokens, bias):
    assert not check(*draw(batch, tokens, 2, 24, bias=bias))
    if tokens < 64:
        assert not check(*draw_saturated(batch, tokens, 2, 72, torch.float16, bias))


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype"),
    [(1030, 24, torch.float32), pytest.param(4096, 16, torch.float16, marks=pytest.mark.long)],
)
def test_many_tokens(tokens, head_dim, dtype, monkeypatch):
    tiles(monkeypatch, 256, 256)
    assert not check(*draw(1, tokens, 1, head_dim, dtype))


@pytest.mark.parametrize("arch", [(8, 0), (9, 0)])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_the_tiles_of_each_architecture(arch, head_dim, monkeypatch):
    tiles = configs.attention_config
    monkeypatch.setattr(configs, "attention_config", lambda *args: tiles(*args[:4], arch, args[5]))
    monkeypatch.setattr(configs, "_launch_config", configs._launch_config.__wrapped__)
    assert not check(*draw(1, 161, 1, head_dim, torch.float16, "11TT"))
    assert not check(*draw(1, 256, 1, head_dim, torch.float16))


@pytest.mark.parametrize("blocks", [{"dq": (32, 16), "dkv": (64, 32)}, {"dq": (64, 16), "dkv": (32, 32)}])
def test_each_kernel_has_its_own_tiles(blocks, monkeypatch):
    """One row of sums for each tile of the finer kernel; the other kernel fills its unused rows with zeros."""
    tiles(monkeypatch, 32, 32, **blocks)
    poison(monkeypatch)
    for tokens in (7, 70):
        assert not check(*draw_saturated(2, tokens, 1, 72, bias="1HTT"))


@pytest.mark.parametrize("shape", ["1HTT", "BHTT", "B1TT", "11TT", "B11T", "111T", "BH1T", "1HT1", "1111"])
def test_biases(shape):
    qkv, d_out, bias = draw(2, 35, 2, 16, bias=shape)
    assert not check(qkv, d_out, bias)
    assert not check(*draw_saturated(2, 16, 2, 16, torch.float16, shape))
    if shape.endswith("1"):  # a constant on every key of a row leaves the softmax as it is
        assert not kernels(qkv, d_out, bias)["d_bias"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_every_configuration_has_a_row_of_sums_for_each_tile(dtype, bias):
    for arch in (None, (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        for head_dim in range(8, 129, 8):
            for tokens in (1, 2, 17, 33, 64, 65, 200, 257, 4096):
                slots = configs.sum_slots(tokens, head_dim, dtype, bias)
                for operator in ("attention_dq", "attention_dkv"):
                    config = configs.attention_config(operator, head_dim, tokens, dtype, arch, bias)
                    assert -(-tokens // config.block_m) <= slots, (arch, head_dim, tokens, operator)


def test_biases_of_any_layout_and_dtype():
    qkv, d_out, bias = draw(2, 35, 2, 16, torch.float16, "1HTT")
    expected = kernels(qkv, d_out, bias)
    for laid_out in (bias.mT.contiguous().mT, bias.repeat(1, 1, 1, 2)[..., :35], bias.float(), bias.double()):
        actual = kernels(qkv, d_out, laid_out)
        assert actual["d_bias"].dtype == laid_out.dtype
        assert torch.equal(actual.pop("d_bias").half(), expected["d_bias"])
        assert all(torch.equal(actual[name], expected[name]) for name in actual)
    # an expanded bias has as many gradients as elements
    wide = kernels(qkv, d_out, bias.expand(2, -1, -1, -1))
    assert all(torch.equal(wide[name], expected[name]) for name in ("out", "d_qkv"))
    assert relative_error(wide["d_bias"].sum(0, True), expected["d_bias"].double()) <= torch.finfo(torch.half).eps


SCALES = [(scale, dtype) for scale in (0.5, -0.3, 100.0) for dtype in DTYPES] + [(20.0, "fp32")]


@pytest.mark.parametrize(("scale", "dtype"), SCALES)
def test_scales(scale, dtype):
    """Logits of more than a thousand too: nothing overflows, the sum of a row is at least 1."""
    for tokens in (32, 45):
        qkv, d_out, _ = draw(1, tokens, 4, 16, DTYPES[dtype])
        qkv[:, :, :2] = (8 * qkv[:, :, :2].float()).round() / 8  # exact sums: rounded, so large ones decide a row
        assert not check(qkv, d_out, scale=scale)


@every_dtype
def test_a_scale_of_zero(dtype):
    """Every p is the same, and so is its rounding: the eager sums are all but exact and no yardstick."""
    for tokens in (32, 45):
        assert not check(*draw(1, tokens, 2, 16, dtype), scale=0.0).keys() - {"sums"}


@every_dtype
def test_rows_of_equal_logits(dtype):
    qkv, d_out, _ = draw(2, 45, 2, 72, dtype)
    qkv[:, :, 0] = 0
    assert not check(qkv, d_out)
    qkv[:, :, :2] = 10  # each logit is 7200 * scale, the greatest and the sum's only one
    assert not check(qkv, d_out)


@every_dtype
def test_minus_infinity_in_the_bias(dtype):
    """In places, in whole rows (which give 0, and gradients of 0), in whole tiles and in whole columns."""
    qkv, d_out, bias = draw(2, 45, 2, 16, dtype, "1HTT")
    bias[torch.rand(bias.shape) < 0.3] = -INF
    bias[:, 0, 3:40] = -INF
    bias[:, :, :, 9] = -INF
    bias[:, 1, :, :40] = -INF
    assert not check(qkv, d_out, bias)
    results = kernels(qkv, d_out, bias)
    assert not results["out"][:, 3:40, :16].any()
    assert not results["d_qkv"][:, 3:40, 0, 0].any()
    assert not results["d_qkv"][:, 9, 1:].any()
    padding = torch.zeros(2, 1, 1, 45).to(dtype)
    padding[0, ..., 41:] = -INF
    padding[1] = -INF
    assert not check(qkv, d_out, padding)


def test_logits_far_below_a_tile_of_minus_infinity():
    """The first tile gives no maximum: taking 0 would lose the other tiles to underflow."""
    qkv, d_out, bias = draw(1, 45, 1, 16, torch.float16, "11TT")
    bias[..., :40] = -INF
    bias[..., 40:] -= 300
    assert not check(qkv, d_out, bias)


@pytest.mark.parametrize("tokens", [32, 45])
def test_stats_are_the_log_sum_exp_in_two_parts(tokens):
    qkv, _, bias = draw(2, tokens, 3, 16, bias="1HTT")
    bias[:, 1, 5] = -INF
    out, stats = forward(qkv, 0.3, bias)
    highest, inverse = stats.double().unbind(2)
    q, k, _ = qkv.double().permute(2, 0, 3, 1, 4).unbind(0)
    oracle = torch.logsumexp(0.3 * q @ k.mT + bias, -1)
    empty = oracle.isinf()
    assert torch.equal(highest.isinf(), empty) and (highest[empty] == INF).all()
    assert relative_error((highest - inverse.log()).where(~empty, 1.0), oracle.where(~empty, 1.0)) <= EPS
    recomputed, nothing = forward(qkv, 0.3, bias, save=False)
    assert torch.equal(out, recomputed) and nothing is None


@every_dtype
@pytest.mark.parametrize("offset", [-1e9, 1e4, "lowest"])
def test_logits_that_share_a_large_offset(offset, dtype):
    """As in a padded sample: the sums must keep what the rows' maximum hides."""
    lowest = torch.finfo(dtype).min
    qkv, d_out, bias = draw(2, 45, 2, 16, dtype, "BHTT")
    bias[1] = lowest if offset == "lowest" else max(offset, lowest)
    bias[0, :, 7] = lowest
    assert not check(qkv, d_out, bias)


@pytest.mark.parametrize("deviation", [5.0, 30.0])
def test_wide_biases(deviation):
    qkv, d_out, bias = draw(1, 32, 4, 64, bias="1HTT")
    assert not check(qkv, d_out, bias * deviation)


def layouts(x):
    """x over other memory: rows apart, an odd stride, the first axis inside the second, the last axis strided."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), float("nan"), dtype=x.dtype, device=x.device)
    odd = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    for storage in (wide, odd):
        storage[..., : x.shape[-1]] = x
        yield storage[..., : x.shape[-1]]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield x.transpose(1, -1).contiguous().transpose(1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inputs_of_any_layout(dtype):
    qkv, d_out, bias = draw(2, 20, 2, 24, dtype, "1HTT")
    expected = kernels(qkv, d_out, bias)
    for laid_out in layouts(packed(qkv)):
        actual = kernels(laid_out.unflatten(2, qkv.shape[2:]), d_out, bias)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for laid_out in layouts(d_out):
        actual = kernels(qkv, laid_out, bias)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_expanded_incoming_gradients():
    """The gradient of a sum: all strides 0."""
    qkv, d_out, _ = draw(2, 35, 2, 16)
    expanded = d_out[:1, :1, :1].expand_as(d_out)
    assert not check(qkv, expanded)
    assert not check(qkv, d_out[:, :1].expand_as(d_out))


def test_two_runs_are_bit_equal():
    inputs = draw(2, 70, 1, 72, torch.float16, "1HTT")
    first, second = kernels(*inputs), kernels(*inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [None, "BHTT", "1HTT"])
def test_a_sample_does_not_depend_on_its_neighbours(shape):
    """Bit-equal alone and in a batch, the share of the sums included."""
    qkv, d_out, bias = draw(3, 40, 1, 24, bias=shape)
    scale = 0.2

    def results(rows):
        bias_rows = bias[rows] if shape == "BHTT" else bias
        out, stats = forward(qkv[rows], scale, bias_rows)
        want_bias = shape == "BHTT"
        d_qkv, d_bias, sums = backward(d_out[rows], qkv[rows], out, stats, scale, bias_rows, want_bias, True)
        tensors = [out, stats, d_qkv, sums.unflatten(0, (len(out), -1))]
        return [*tensors, d_bias] if want_bias else tensors

    for alone, together in zip(results(slice(1, 2)), results(slice(None)), strict=True):
        assert torch.equal(alone, together[1:2])


@pytest.mark.quick
def test_every_element_is_written(monkeypatch):
    poison(monkeypatch)
    for tokens, bias in itertools.product((1, 33), (None, "1HTT", "BH1T", "B1T1")):
        assert not check(*draw(2, tokens, 1, 40, bias=bias))


def test_results_not_requested_are_none():
    qkv, d_out, bias = draw(2, 9, 2, 16, bias="1HTT")
    out, stats = forward(qkv, 0.25, bias)
    complete = backward(d_out, qkv, out, stats, 0.25, bias, True, True)
    for want_bias, want_sums in itertools.product((False, True), repeat=2):
        d_qkv, d_bias, sums = backward(d_out, qkv, out, stats, 0.25, bias, want_bias, want_sums)
        assert torch.equal(d_qkv, complete[0])
        assert torch.equal(d_bias, complete[1]) if want_bias else d_bias is None
        assert torch.equal(sums, complete[2]) if want_sums else sums is None


@pytest.mark.parametrize(("batch", "tokens"), [(0, 7), (2, 0), (0, 0)])
def test_nothing_to_do(batch, tokens):
    qkv, d_out, bias = draw(batch, tokens, 2, 16, bias="1HTT")
    results = kernels(qkv, d_out, bias)
    assert results["out"].shape == d_out.shape and results["d_qkv"].shape == qkv.shape
    assert torch.equal(results["d_bias"], torch.zeros_like(bias))
    assert torch.equal(results["sums"], torch.zeros(96))


def test_a_backward_is_two_launches_and_a_third_for_the_bias():
    qkv, d_out, bias = (x.to("meta") for x in draw(2, 64, 2, 16, bias="1HTT"))
    stats = torch.empty(2, 2, 64, device="meta")
    configs = [AttentionConfig(64, 32, 4, 2)] * 3
    for d_bias, names in ((None, ["dq", "dkv"]), (bias, ["dq", "dkv", "dbias"])):
        launches = attention_bwd.bwd_launches(d_out, qkv, d_out, stats, 1.0, bias, qkv, d_bias, 0, configs)
        assert [kernel.__name__ for kernel, _, _ in launches] == [f"_attention_{name}_kernel" for name in names]


def test_tf32_follows_either_of_torchs_switches():
    matmul = torch.backends.cuda.matmul
    qkv = torch.empty(1, 16, 3, 1, 16, device="meta")
    before = matmul.fp32_precision

    def allowed():
        return attention.fwd_launch(qkv, None, qkv, None, 1.0, AttentionConfig(16, 16, 4, 2))[1]["ALLOW_TF32"]

    try:
        for legacy in (True, False):
            matmul.allow_tf32 = legacy
            assert allowed() == legacy
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert allowed() == (precision == "tf32")
    finally:
        matmul.fp32_precision = before


def test_configurations():
    """Powers of two that a dot takes, no larger than the tokens ask for; the same for every batch by signature."""
    for operator, head_dim, tokens, dtype, arch, bias in itertools.product(
        ("fwd", "dq", "dkv", "dbias"), range(8, 129, 8), (1, 7, 16, 64, 100, 257, 4096), DTYPES.values(),
        ((8, 0), (8, 6), (9, 0), (10, 0), None), (False, True),
    ):  # fmt: skip
        config = attention_config(f"attention_{operator}", head_dim, tokens, dtype, arch, bias)
        for block in config[:3]:
            assert block & (block - 1) == 0
        for block in config[:2]:
            assert 16 <= block < max(2 * tokens, 17) or arch is None
        assert 1 <= config.num_warps <= 8 and 1 <= config.num_stages <= 4
    for head_dim, lanes in {8: (16, 0), 32: (32, 0), 48: (32, 16), 72: (64, 16), 96: (64, 32), 120: (128, 0)}.items():
        assert configs.head_lanes(head_dim) == lanes
