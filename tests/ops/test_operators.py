"""Every operator by the numerics rule, against formulas written out, and under torch's transforms."""

import math
from dataclasses import replace

import pytest
import torch

from ditfast import ops
from ditfast.reference import ops as formulas
from ditfast.testing.operators import OPERATORS, Shape, check, draw_inputs, run
from tests.kernels.conftest import DTYPES, failures

SHAPES = [
    Shape(0, 7, 72),
    Shape(1, 1, 72),
    Shape(3, 7, 200, num_heads=5),
    Shape(3, 64, 384, num_heads=6),
    Shape(2, 16, 1024, num_heads=16, mean=1000.0),
    Shape(1, 65, 1152, num_heads=16),
]
every_operator = pytest.mark.parametrize("name", OPERATORS)


@pytest.mark.pairwise
@every_operator
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.batch}x{s.tokens}x{s.width}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(name, shape, dtype):
    verdicts = check(OPERATORS[name], shape, DTYPES[dtype])
    assert not failures(verdicts)


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.mixed])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.batch}x{s.tokens}x{s.width}")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fp32_stream(name, shape, dtype):
    verdicts = check(OPERATORS[name], shape, DTYPES[dtype], mixed=True)
    assert not failures(verdicts)


@every_operator
def test_any_subset_of_gradients(name):
    operator = OPERATORS[name]
    shape = Shape(2, 5, 72)
    inputs = operator.differentiable(draw_inputs(operator, shape, torch.float32, "cpu"))
    for wanted in [(), *((name,) for name in inputs), inputs[::2], inputs[1:]]:
        verdicts = check(operator, shape, torch.float32, wanted=wanted)
        assert {key for key in verdicts if key.startswith("d_")} == {f"d_{name}" for name in wanted}
        assert not failures(verdicts)


@every_operator
def test_two_runs_are_equal_and_inputs_untouched(name):
    operator = OPERATORS[name]
    shape = Shape(3, 7, 72)
    inputs = draw_inputs(operator, shape, torch.float32, "cpu")
    before = {key: value.clone() for key, value in inputs.items()}
    wanted = operator.differentiable(inputs)
    first, second = (run(operator.fused, inputs, operator.options(shape), wanted) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(inputs[key], before[key]) for key in inputs)


@every_operator
def test_gradcheck_of_the_formula(name):
    operator = OPERATORS[name]
    shape = Shape(2, 3, 8)
    inputs = draw_inputs(operator, shape, torch.float64, "cpu")
    wanted = operator.differentiable(inputs)
    if not wanted:
        return
    leaves = [value.detach().requires_grad_(key in wanted) for key, value in inputs.items()]

    def function(*values):
        return operator.formula(**dict(zip(inputs, values, strict=True)), **operator.options(shape))

    assert torch.autograd.gradcheck(function, leaves)


@every_operator
def test_fullgraph_compile(name):
    # Dynamo and AOTAutograd are in question here, not Inductor
    compiled = torch.compile(OPERATORS[name].fused, fullgraph=True, backend="aot_eager")
    verdicts = check(replace(OPERATORS[name], fused=compiled), Shape(2, 5, 72), torch.float32)
    assert not failures(verdicts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_its_neighbours(dtype):
    shape = Shape(3, 7, 72)
    for operator in OPERATORS.values():
        inputs = draw_inputs(operator, shape, dtype, "cpu")
        if not operator.mixed or "weight" in inputs:
            continue  # GEMMs may choose another kernel for another number of rows
        together = run(operator.fused, inputs, {}, ())
        alone = run(operator.fused, {key: value[1:2] for key, value in inputs.items()}, {}, ())
        assert all(torch.equal(together[key][1:2], alone[key]) for key in together)


@pytest.mark.quick
def test_norm_and_residual_written_out():
    inputs = draw_inputs(OPERATORS["gated_residual_layer_norm_modulate"], Shape(3, 5, 72), torch.float64, "cpu")
    residual, branch, gate, shift, scale = inputs.values()
    new, out = ops.gated_residual_layer_norm_modulate(**inputs)
    for b in range(3):
        for t in range(5):
            row = [residual[b, t, d].item() + gate[b, d].item() * branch[b, t, d].item() for d in range(72)]
            mean = math.fsum(row) / 72
            deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in row) / 72 + 1e-6)
            normed = [(v - mean) / deviation for v in row]
            expected = [v * (1 + scale[b, d].item()) + shift[b, d].item() for d, v in enumerate(normed)]
            assert new[b, t].tolist() == pytest.approx(row, rel=1e-13)
            assert out[b, t].tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_written_out(scale):
    inputs = draw_inputs(OPERATORS["self_attention+bias"], Shape(2, 5, 24, num_heads=3), torch.float64, "cpu")
    qkv, bias = inputs["qkv"], inputs["bias"]
    out = ops.self_attention(qkv, 3, scale=scale, bias=bias)
    for b in range(2):
        for h in range(3):
            q, k, v = (qkv[b, :, part * 24 + h * 8 : part * 24 + (h + 1) * 8] for part in range(3))
            logits = q @ k.T * (8**-0.5 if scale is None else scale) + bias[h]
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            torch.testing.assert_close(out[b, :, h * 8 : (h + 1) * 8], weights @ v, rtol=1e-12, atol=1e-12)


def test_attention_takes_a_scalar_bias():
    qkv = torch.randn(2, 5, 72, dtype=torch.float64)
    out = ops.self_attention(qkv, 3, bias=torch.tensor(0.7, dtype=torch.float64))
    assert (out - ops.self_attention(qkv, 3)).norm() <= 1e-14 * out.norm()  # a constant leaves the softmax as it is


def test_attention_reads_strided_projections():
    wide = torch.randn(2, 5, 100, dtype=torch.float64)
    assert torch.equal(ops.self_attention(wide[..., :72], 2), ops.self_attention(wide[..., :72].contiguous(), 2))


@pytest.mark.quick
def test_gelu_is_the_tanh_form():
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    identity, zero = torch.eye(2).double(), torch.zeros(2).double()
    expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in (1.0, -2.0)]
    assert ops.linear_gelu(x, identity, zero)[0].tolist() == pytest.approx(expected, rel=1e-14)
    assert ops.gelu_mlp(x, identity, None, identity, None)[0].tolist() == pytest.approx(expected, rel=1e-14)


def test_autocast_follows_torch():
    shape = Shape(2, 5, 72)
    for name in ("linear_gelu", "gelu_mlp", "self_attention"):
        operator = OPERATORS[name]
        inputs = draw_inputs(operator, shape, torch.float32, "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            fused = operator.fused(**inputs, **operator.options(shape))
            formula = operator.formula(**inputs, **operator.options(shape))
        assert fused.dtype == formula.dtype == torch.bfloat16
        assert torch.equal(fused, formula)


@pytest.mark.quick
def test_use_backend():
    inputs = draw_inputs(OPERATORS["layer_norm_modulate"], Shape(2, 5, 72), torch.float32, "cpu")
    assert ops.current_backend() == "auto"
    with ops.use_backend("torch"):
        assert ops.current_backend() == "torch"
        assert torch.equal(ops.layer_norm_modulate(**inputs), formulas.layer_norm_modulate(**inputs))
    with pytest.raises(RuntimeError, match="inside"), ops.use_backend("triton"):
        raise RuntimeError("inside")
    assert ops.current_backend() == "auto"
    message = "backend must be one of auto, triton, torch, got 'cuda'"
    with pytest.raises(ValueError, match=message), ops.use_backend("cuda"):
        pass
