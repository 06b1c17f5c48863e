"""The adaLN kernels in Triton's interpreter, against fp64: outputs and every gradient."""

from dataclasses import replace

import pytest
import torch

from ditfast import ops
from ditfast.parity import judge
from ditfast.testing.operators import OPERATORS, Shape, check, draw_inputs, run
from tests.kernels.conftest import DTYPES, NAMES, alone_and_together, failures, poison, triton_operator

every_operator = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.kernels

# batch, tokens and width of the numerics rule; the backward's programs have 16 rows up to 64 tokens, then 32
SHAPES = [
    Shape(0, 7, 72),
    Shape(3, 0, 72),
    Shape(1, 1, 72),
    pytest.param(Shape(3, 7, 72), marks=pytest.mark.quick),
    Shape(1, 64, 200),
    Shape(3, 1, 384),
    Shape(2, 17, 384),
    Shape(3, 7, 768),
    Shape(2, 33, 1024),
    Shape(3, 7, 1152),
    Shape(1, 96, 1152),
    Shape(2, 65, 1152),
    Shape(1, 2, 8192),
]


@pytest.mark.pairwise
@every_operator
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.batch}x{s.tokens}x{s.width}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_every_gradient(name, shape, dtype):
    assert not failures(check(triton_operator(name), shape, DTYPES[dtype]))


@every_operator
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fp32_stream(name, dtype):
    for shape in (Shape(3, 7, 72), Shape(2, 5, 1152)):
        assert not failures(check(triton_operator(name), shape, DTYPES[dtype], mixed=True))


# the interpreter truncates to bf16 instead of rounding, 4 apart at 1000: bf16 goes to 30 only
@every_operator
@pytest.mark.parametrize(("mean", "dtype"), [*((30.0, dtype) for dtype in DTYPES), (1000.0, "fp32"), (1000.0, "fp16")])
def test_large_means_do_not_cancel(name, mean, dtype):
    assert not failures(check(triton_operator(name), Shape(2, 5, 1152, mean=mean), DTYPES[dtype]))


def subsets():
    for name in NAMES:
        inputs = tuple(draw_inputs(OPERATORS[name], Shape(1, 1, 4), torch.float32, "cpu"))
        for mask in range(1 << len(inputs)):
            yield name, tuple(item for index, item in enumerate(inputs) if mask >> index & 1)


@pytest.mark.parametrize(("name", "wanted"), list(subsets()), ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_every_subset_of_gradients(name, wanted):
    verdicts = check(triton_operator(name), Shape(2, 3, 72), torch.float32, wanted=wanted)
    assert {key for key in verdicts if key.startswith("d_")} == {f"d_{item}" for item in wanted}
    assert not failures(verdicts)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(used):
    """The gradient of an unused output is None, not zero."""
    operator = triton_operator("gated_residual_layer_norm_modulate")

    def one(function):
        return lambda **inputs: function(**inputs)[used]

    alone = replace(operator, fused=one(operator.fused), formula=one(operator.formula))
    assert not failures(check(alone, Shape(2, 5, 200), torch.float32))


@every_operator
def test_two_runs_are_bit_equal(name):
    operator, shape = triton_operator(name), Shape(2, 40, 200)
    inputs = draw_inputs(operator, shape, torch.float32, "cpu")
    first, second = (run(operator.fused, inputs, {}, tuple(inputs)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_operator
def test_a_sample_does_not_depend_on_its_neighbours(name):
    """Bit-equal alone and in a batch, gradients included; each sample has its own shift."""
    operator, shape = triton_operator(name), Shape(3, 40, 72)
    inputs = draw_inputs(operator, shape, torch.float32, "cpu")
    assert all(torch.equal(*pair) for pair in alone_and_together(operator, inputs, 1))


@every_operator
def test_every_element_is_written(name, monkeypatch):
    poison(monkeypatch)
    for shape in (Shape(2, 17, 72), Shape(3, 33, 1152), Shape(2, 0, 72)):
        assert not failures(check(triton_operator(name), shape, torch.float32))


@every_operator
def test_inputs_of_any_layout(name):
    """Strided batches and rows, an expanded batch, a transposed last axis."""
    operator, shape = triton_operator(name), Shape(3, 5, 72)
    inputs = draw_inputs(operator, shape, torch.float32, "cpu")

    def strided(value):
        wide = torch.full((*value.shape[:-1], 100), float("nan"))
        wide[..., :72] = value
        return wide[..., :72]

    def batch_last(value):
        return value.transpose(0, -2).contiguous().transpose(0, -2) if value.ndim == 3 else value

    def transposed(value):
        return value.mT.contiguous().mT

    expected = run(operator.fused, {key: value.contiguous() for key, value in inputs.items()}, {}, tuple(inputs))
    for layout in (strided, batch_last, transposed):
        laid_out = {key: layout(value) for key, value in inputs.items()}
        actual = run(operator.fused, laid_out, {}, tuple(inputs))
        assert all(torch.equal(actual[key], expected[key]) for key in expected), layout.__name__
    one = {key: value[:1].expand_as(value) for key, value in inputs.items()}
    copied = {key: value.contiguous() for key, value in one.items()}
    expected, actual = (run(operator.fused, values, {}, ()) for values in (copied, one))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_expanded_incoming_gradients():
    inputs = draw_inputs(OPERATORS["layer_norm_modulate"], Shape(2, 5, 72), torch.float32, "cpu")
    gradients = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        leaves = [value.to(dtype).detach().requires_grad_() for value in inputs.values()]
        with ops.use_backend(backend):
            out = ops.layer_norm_modulate(*leaves).square()
        gradients.append(torch.autograd.grad(out.sum(), leaves))
    # the sum's own gradient is an expanded scalar, all strides 0
    with ops.use_backend("triton"):
        d_shift = torch.autograd.grad(ops.layer_norm_modulate(*(leaf.float() for leaf in leaves)).sum(), leaves[1])[0]
    assert torch.equal(d_shift, torch.full_like(d_shift, 5.0))
    for kernel, yardstick, oracle in zip(*gradients, strict=True):
        assert judge("operator", kernel, yardstick, oracle, torch.float32).ok


@every_operator
def test_opcheck(name):
    inputs = draw_inputs(OPERATORS[name], Shape(2, 5, 72), torch.float32, "cpu")
    x = inputs.get("x", inputs.get("residual"))
    branch, gate, shift, scale = (inputs.get(key) for key in ("branch", "gate", "shift", "scale"))
    # autograd is registered outside the operator, by a Function
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = torch.ops.ditfast.adaln_forward.default
    torch.library.opcheck(forward, (x, branch, gate, shift, scale, 1e-6), test_utils=utilities)
    r, _, mean, rstd = forward(x, branch, gate, shift, scale, 1e-6)
    normed, gated = shift is not None, gate is not None
    d_r, d_out = (torch.randn_like(x) if present else None for present in (gated, normed))
    arguments = (d_r, d_out, r if gated else x, branch, gate, shift, scale)
    moments = (mean, rstd) if normed else (None, None)
    torch.library.opcheck(
        torch.ops.ditfast.adaln_backward.default,
        (*arguments, *moments, normed, gated, gated, normed, gated, normed, [torch.randn(1, 3, 8)]),
        test_utils=utilities,
    )


@every_operator
def test_fullgraph_compile(name):
    torch.compiler.reset()
    with ops.use_backend("triton"):
        compiled = replace(
            OPERATORS[name], fused=torch.compile(OPERATORS[name].fused, fullgraph=True, backend="aot_eager")
        )
        for wanted in (None, ()):
            for operator in (OPERATORS[name], compiled):  # eager first: a plan is kept when the compiler traces
                assert not failures(check(operator, Shape(2, 5, 72), torch.float32, wanted=wanted))


@every_operator
def test_meta_tensors_trace_the_kernels(name):
    inputs = draw_inputs(OPERATORS[name], Shape(2, 5, 72), torch.bfloat16, "meta", mixed=True)
    leaves = {key: value.requires_grad_() for key, value in inputs.items()}
    with ops.use_backend("triton"):
        outputs = OPERATORS[name].fused(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    for leaf in leaves.values():
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


@every_operator
def test_functional_gradients(name):
    operator, shape = OPERATORS[name], Shape(2, 5, 72)
    inputs = draw_inputs(operator, shape, torch.float32, "cpu")

    def gradients(backend, dtype):
        def loss(*leaves):
            with ops.use_backend(backend):
                out = operator.fused(**dict(zip(inputs, leaves, strict=True)))
            return sum(item.sin().sum() for item in (out if isinstance(out, tuple) else (out,)))

        values = [value.to(dtype) for value in inputs.values()]
        return torch.func.grad(loss, argnums=tuple(range(len(values))))(*values)

    results = gradients("triton", torch.float32), gradients("torch", torch.float32), gradients("torch", torch.float64)
    for kernel, yardstick, oracle in zip(*results, strict=True):
        assert judge("operator", kernel, yardstick, oracle, torch.float32).ok


def test_only_what_backward_reads_is_saved():
    """One stream-sized tensor saved for the norm, two with the gate's gradient, and vectors."""
    shape = Shape(2, 64, 384)
    for name, wanted, streams in (
        ("layer_norm_modulate", None, 1),
        ("gated_residual", None, 1),
        ("gated_residual_layer_norm_modulate", None, 2),
        ("gated_residual_layer_norm_modulate", ("residual", "shift"), 1),
    ):
        inputs = draw_inputs(OPERATORS[name], shape, torch.float32, "cpu")
        leaves = {key: v.detach().requires_grad_(wanted is None or key in wanted) for key, v in inputs.items()}
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), ops.use_backend("triton"):
            OPERATORS[name].fused(**leaves)
        assert sum(size == 2 * 64 * 384 for size in saved.values()) == streams, name


def test_refusals_name_the_reason():
    x, v = torch.randn(2, 5, 72), torch.randn(2, 72)
    with ops.use_backend("triton"):
        with pytest.raises(RuntimeError, match="layer_norm_modulate cannot run its Triton kernel: .*fp64"):
            ops.layer_norm_modulate(x.double(), v.double(), v.double())
        wide = torch.randn(1, 1, 8193), torch.randn(1, 8193)
        with pytest.raises(RuntimeError, match="rows of at most 8192 elements, got 8193"):
            ops.gated_residual(wide[0], wide[0], wide[1])
    # without a demand the formula runs
    assert torch.isfinite(ops.gated_residual(wide[0], wide[0], wide[1])).all()


def test_vmap_takes_the_formula_or_says_no():
    x, gate = torch.randn(4, 2, 5, 72), torch.randn(4, 2, 72)
    per_sample = torch.vmap(torch.func.grad(lambda x, gate: ops.gated_residual(x, x, gate).sin().sum()))
    assert per_sample(x, gate).shape == x.shape
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="no rule for torch.vmap"):
        per_sample(x, gate)
