"""The Linears with an epilogue, their kernels demanded: outputs, every gradient, torch's transforms."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast import ops
from ditfast.bench.cost.count import count
from ditfast.ops import gemm as linear_library
from ditfast.parity import judge, relative_error
from ditfast.testing.operators import OPERATORS, Shape, check, draw_inputs, run
from tests.kernels.conftest import DTYPES, failures, poison, triton_operator

pytest.importorskip("triton")
from ditfast.kernels.configs import gemm as gemm_config  # noqa: E402
from tests.kernels.gemm_check import gelu_backward  # noqa: E402

NAMES = ("linear_gelu", "linear_gated_residual", "gelu_mlp")
every_operator = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.kernels

SHAPES = [
    Shape(0, 7, 72),
    Shape(3, 0, 72),
    Shape(1, 1, 72),
    pytest.param(Shape(3, 7, 200), marks=pytest.mark.quick),
    Shape(3, 65, 72, ratio=3),
    Shape(2, 33, 384, mean=30.0),
    Shape(1, 70, 392, ratio=1),
    pytest.param(Shape(1, 70, 1152, ratio=1), marks=pytest.mark.long),
]


@pytest.mark.pairwise
@every_operator
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.batch}x{s.tokens}x{s.width}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_every_gradient(name, shape, dtype):
    for wanted in (None, ()):  # without gradients other code runs: nothing is stored
        assert not failures(check(triton_operator(name), shape, DTYPES[dtype], wanted=wanted))


def test_the_slope_in_the_tails():
    """1 + tanh and 1 - tanh^2 cancel there; the kernels use neither."""
    pre = torch.linspace(-9, 9, 4096).view(64, 64)
    for part in (pre, pre[:16], pre[-16:]):  # -9 to -4.5 alone, where the slope is 1e-5 and less
        leaf = part.detach().requires_grad_()
        wide = part.double().requires_grad_()
        values = [torch.nn.functional.gelu(x, approximate="tanh") for x in (leaf, wide)]
        slopes = [torch.autograd.grad(value.sum(), x)[0] for value, x in zip(values, (leaf, wide), strict=True)]
        d_pre, act, _ = gelu_backward(torch.ones_like(part), part, True, False)
        assert judge("operator", d_pre, slopes[0], slopes[1], torch.float32).ok
        assert judge("operator", act, values[0], values[1], torch.float32).ok
        assert relative_error(d_pre, slopes[1]) <= 16 * torch.finfo(torch.float32).eps


def test_large_pre_activations():
    """Few hidden units lie in the slope's bend, so the rounding of their pre-activations in one draw is chance."""
    for name in ("linear_gelu", "gelu_mlp"):
        operator = triton_operator(name)

        def draw(shape, generator, name=name):
            inputs = OPERATORS[name].draw(shape, generator)
            return inputs | {"x": 30 * inputs["x"]}

        large = replace(operator, draw=draw)
        assert not failures(check(large, Shape(2, 8, 8, ratio=1), torch.float32, elements=512))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fp32_stream(dtype):
    operator = triton_operator("linear_gated_residual")
    for wanted in (None, ()):
        assert not failures(check(operator, Shape(3, 7, 72), DTYPES[dtype], mixed=True, wanted=wanted))


def subsets():
    for name in NAMES:
        inputs = tuple(draw_inputs(OPERATORS[name], Shape(1, 1, 8), torch.float32, "cpu"))
        for mask in range(1, 1 << len(inputs)):
            yield name, tuple(item for index, item in enumerate(inputs) if mask >> index & 1)


@pytest.mark.parametrize(("name", "wanted"), list(subsets()), ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_every_subset_of_gradients(name, wanted):
    verdicts = check(triton_operator(name), Shape(2, 3, 72), torch.float32, wanted=wanted)
    assert {key for key in verdicts if key.startswith("d_")} == {f"d_{item}" for item in wanted}
    assert not failures(verdicts)


@every_operator
def test_without_bias(name):
    operator = triton_operator(name)
    biases = {"gelu_mlp": ("b1", "b2")}.get(name, ("bias",))

    def bare(function):
        return lambda **inputs: function(**inputs, **dict.fromkeys(biases))

    def draw(shape, generator):
        return {key: value for key, value in operator.draw(shape, generator).items() if key not in biases}

    bare_operator = replace(operator, fused=bare(operator.fused), formula=bare(operator.formula), draw=draw)
    assert not failures(check(bare_operator, Shape(3, 7, 72), torch.float32))


@every_operator
def test_leading_axes_and_strides(name):
    """Any number of leading axes, and rows with a gap between them."""
    inputs = draw_inputs(OPERATORS[name], Shape(2, 6, 72), torch.float32, "cpu")
    wide = torch.cat([inputs["x"], torch.full_like(inputs["x"], torch.nan)], dim=-1)
    strided = inputs | {"x": wide[..., : inputs["x"].shape[-1]]}
    operator = triton_operator(name)
    expected, actual = (run(operator.fused, item, {}, ()) for item in (inputs, strided))
    assert torch.equal(expected["output0"], actual["output0"])
    if name != "linear_gated_residual":
        folded = run(operator.fused, inputs | {"x": inputs["x"].view(2, 3, 2, 72)}, {}, ())["output0"]
        assert torch.equal(folded.flatten(1, 2), expected["output0"])


@every_operator
def test_strided_and_expanded_biases(name):
    operator = triton_operator(name)

    def draw(shape, generator):
        inputs = operator.draw(shape, generator)
        for key in inputs:
            if key in ("bias", "b1", "b2"):
                inputs[key] = torch.stack([inputs[key], torch.full_like(inputs[key], 7.0)], dim=1)[:, 0]
        return inputs

    for wanted in (None, ()):
        assert not failures(
            check(replace(operator, draw=draw), Shape(3, 7, 72), torch.float32, wanted=wanted)
        )


def test_a_residual_of_any_strides():
    operator = triton_operator("linear_gated_residual")
    inputs = draw_inputs(operator, Shape(3, 7, 72), torch.float32, "cpu")
    expected = run(operator.fused, inputs, {}, ("residual", "gate"))
    for axes in ((0, 1), (1, 2)):
        strided = inputs | {"residual": inputs["residual"].transpose(*axes).contiguous().transpose(*axes)}
        actual = run(operator.fused, strided, {}, ("residual", "gate"))
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


@every_operator
def test_two_runs_are_equal(name):
    operator, shape = triton_operator(name), Shape(3, 7, 72)
    inputs = draw_inputs(operator, shape, torch.float32, "cpu")
    first, second = (run(operator.fused, inputs, {}, operator.differentiable(inputs)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_operator
def test_outputs_are_written_whole(name, monkeypatch):
    """Every element of the results' memory is written."""
    operator, shape = triton_operator(name), Shape(3, 7, 200)
    inputs = draw_inputs(operator, shape, torch.float32, "cpu")
    wanted = operator.differentiable(inputs)
    before = run(operator.fused, inputs, {}, wanted)

    poison(monkeypatch)
    after = run(operator.fused, inputs, {}, wanted)
    assert all(torch.equal(before[key], after[key]) for key in before)


@every_operator
def test_saves_the_pre_activation_only(name):
    """Not the activation: (M, F) is saved once, or the branch if its gate learns."""
    inputs = draw_inputs(OPERATORS[name], Shape(2, 5, 72, ratio=3), torch.float32, "cpu")
    leaves = {key: value.requires_grad_() for key, value in inputs.items()}
    input_addresses = {value.untyped_storage().data_ptr() for value in leaves.values()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), ops.use_backend("triton"):
        OPERATORS[name].fused(**leaves)
    saved_sizes = [size for address, size in saved.items() if address not in input_addresses]
    assert saved_sizes == [10 * 72 if name == "linear_gated_residual" else 10 * 3 * 72]


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("save", [True, False])
def test_candidates(save):
    """The library's epilogue runs if it is chosen and there is a bias; separate kernels agree with the formula."""
    x, weight, bias = (torch.empty(size, device="meta") for size in ((6, 16), (24, 16), (24,)))
    for added_bias, epilogue in ((bias, True), (None, False)):
        config = gemm_config.IEEE._replace(candidate="cublaslt")
        with Recorder() as recorder:
            tensors = x, weight, added_bias
            out, _ = linear_library.linear_gelu_plan(tensors, False, config=config)(*tensors)
        assert ("aten::_addmm_activation" in recorder.names) == epilogue
        assert out.shape == (6, 24)
    x, weight, gate, residual = (torch.randn(size) for size in ((6, 16), (24, 16), (2, 24), (2, 3, 24)))
    d_out = residual.flatten(0, 1)

    def gelu(x, weight):
        pre = x @ weight.t()
        return torch.nn.functional.gelu(pre, approximate="tanh"), pre

    def gated(x, weight, gate, residual):
        branch = x @ weight.t()
        return residual + gate.unsqueeze(1) * branch.view(2, 3, 24), branch

    def gelu_gradient(d_out, weight, x):
        with torch.enable_grad():
            pre = x.detach().requires_grad_()
            act = torch.nn.functional.gelu(pre, approximate="tanh")
            d_pre = torch.autograd.grad(act, pre, d_out @ weight)[0]
        return d_pre, act.detach(), d_pre.sum(0).view(1, 1, -1)

    for config in (gemm_config.IEEE, gemm_config.IEEE._replace(candidate="separate")):
        for make, formula, inputs, rest in (
            (linear_library.linear_gelu_plan, gelu, (x, weight), (None,)),
            (linear_library.linear_gated_residual_plan, gated, (x, weight, gate, residual), (None,)),
            (linear_library.linear_gelu_backward_plan, gelu_gradient, (d_out, weight, x), ()),
        ):
            tensors = *inputs[:2], *rest, *inputs[2:]
            actual = make(tensors, save, config=config)(*tensors)
            oracle = formula(*(value.double() for value in inputs))
            for computed, yardstick, exact in zip(actual, formula(*inputs), oracle, strict=True):
                if computed is not None:
                    assert judge("operator", computed, yardstick, exact, torch.float32).ok


@every_operator
def test_opcheck(name):
    x, weight, gate, residual = (torch.randn(size) for size in ((6, 16), (24, 16), (2, 24), (2, 3, 24)))
    # autograd is registered outside the operator, by a Function
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    library = torch.ops.ditfast
    calls = {
        "linear_gelu": [(library.linear_gelu, (x, weight, weight[:, 0].clone(), save, True)) for save in (True, False)],
        "linear_gated_residual": [
            (library.linear_gated_residual, (x, weight, None, gate, residual, save, True)) for save in (True, False)
        ],
        "gelu_mlp": [
            (library.linear_gelu_backward, (residual.flatten(0, 1), weight, x, True, True)),
            (library.gelu_backward, (x, x + 1, True)),
            (library.sum_partials, ([torch.randn(2, 3, 8), torch.randn(1, 5, 16)], torch.float32)),
        ],
    }
    for operator, arguments in calls[name]:
        torch.library.opcheck(operator.default, arguments, test_utils=utilities)


@every_operator
def test_fullgraph_compile(name):
    torch.compiler.reset()
    with ops.use_backend("triton"):
        compiled = torch.compile(OPERATORS[name].fused, fullgraph=True, backend="aot_eager")
        for wanted in (None, ()):
            fused = replace(OPERATORS[name], fused=compiled)
            assert not failures(check(fused, Shape(2, 5, 72), torch.float32, wanted=wanted))


@every_operator
def test_autocast_follows_torch(name):
    dtype = torch.float16
    operator, shape = triton_operator(name), Shape(2, 5, 72)
    inputs = draw_inputs(operator, shape, torch.float32, "cpu")
    if "gate" in inputs:
        inputs["gate"] = inputs["gate"].to(dtype)  # as in a modulation under autocast
    wanted = tuple(inputs)
    results = []
    for function in (operator.fused, operator.formula):
        with torch.autocast("cpu", dtype):
            results.append(run(function, inputs, {}, wanted))
    fused, formula = results
    oracle = run(operator.formula, inputs, {}, wanted, torch.float64)
    for key in oracle:
        assert fused[key].dtype == formula[key].dtype, key
        assert judge("operator", fused[key], formula[key], oracle[key], dtype).ok, key


@every_operator
def test_odd_widths_run_the_formula(name):
    """Rows that are no multiples of 16 bytes run the formula; demanding the kernels raises an error."""
    operator, shape = OPERATORS[name], Shape(2, 3, 20, ratio=3)
    inputs = draw_inputs(operator, shape, torch.float32, "cpu")
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="widths must be multiples of 8, got [26]0"):
        operator.fused(**inputs)
    assert not failures(check(operator, shape, torch.float32))


@every_operator
def test_meta_tensors_trace_the_fused_path(name):
    inputs = draw_inputs(OPERATORS[name], Shape(2, 128, 72), torch.bfloat16, "meta")
    launches = {"linear_gelu": 1, "linear_gated_residual": 1, "gelu_mlp": 2}[name]
    with ops.use_backend("triton"):
        forward = count(lambda: OPERATORS[name].fused(**inputs))
        leaves = {key: value.requires_grad_() for key, value in inputs.items()}
        whole = count(lambda: OPERATORS[name].fused(**leaves).sum().backward(), grad=True)
    assert forward.total_launches == launches
    gemm = 2 * 256 * 72 * 144 * (2 if name == "gelu_mlp" else 1)
    assert (forward.total_flops, whole.total_flops) == (gemm, 3 * gemm)
    for leaf in leaves.values():
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
