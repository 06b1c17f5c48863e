"""self_attention with its kernels demanded: the operator, torch's transforms, and its place in a block."""

from dataclasses import replace

import pytest
import torch

from ditfast import ops
from ditfast.bench.cost.count import count
from ditfast.ops import backend as backend_module
from ditfast.parity import judge
from ditfast.reference import ops as formulas
from ditfast.testing.operators import OPERATORS, Shape, check, draw_inputs
from tests.bench.conftest import listing
from tests.kernels.conftest import DTYPES, failures, triton_operator

NAMES = ("self_attention", "self_attention+bias")
every_operator = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.kernels

SHAPES = [
    Shape(0, 7, 72),
    Shape(1, 1, 72, num_heads=1),
    Shape(3, 7, 200, num_heads=5),
    Shape(2, 70, 72, num_heads=2),
    Shape(1, 65, 144, num_heads=2),
    Shape(1, 33, 256, num_heads=2),
]


@pytest.mark.pairwise
@every_operator
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.batch}x{s.tokens}x{s.width}/{s.num_heads}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_every_gradient(name, shape, dtype):
    for wanted in (None, ()):
        assert not failures(check(triton_operator(name), shape, DTYPES[dtype], wanted=wanted))


@pytest.mark.quick
@pytest.mark.parametrize("wanted", [("qkv",), ("bias",), ("qkv", "bias")], ids="+".join)
def test_subsets_of_gradients(wanted):
    verdicts = check(triton_operator("self_attention+bias"), Shape(2, 5, 72), torch.float32, wanted=wanted)
    assert {key for key in verdicts if key.startswith("d_")} == {f"d_{name}" for name in wanted}
    assert not failures(verdicts)


# gradients of enough elements: in five or fifteen the yardstick's errors may all be small by chance
@pytest.mark.parametrize("shape", [(65,), (65, 65), (2, 1, 65), (3, 1, 1, 65), (3, 2, 65, 65)], ids=str)
def test_biases_that_broadcast(shape):
    operator = triton_operator("self_attention+bias")

    def draw(sizes, generator):
        return {**OPERATORS["self_attention"].draw(sizes, generator), "bias": torch.randn(shape, generator=generator)}

    bias = replace(operator, draw=draw)
    assert not failures(check(bias, Shape(3, 65, 72), torch.float32))


def test_scales():
    for scale in (0.3, -1.0, 3):
        operator = replace(
            triton_operator("self_attention"), options=lambda shape, scale=scale: {"num_heads": 2, "scale": scale}
        )
        assert not failures(check(operator, Shape(2, 7, 72), torch.float32))


@every_operator
def test_opcheck(name):
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    qkv = torch.randn(2, 5, 48)
    bias = torch.randn(1, 2, 5, 5) if "bias" in name else None
    forward, backward = torch.ops.ditfast.attention_forward.default, torch.ops.ditfast.attention_backward.default
    for save in (True, False):
        torch.library.opcheck(forward, (qkv, 2, 0.3, bias, save), test_utils=utilities)
    out, stats = forward(qkv, 2, 0.3, bias, True)
    wants = (bias is not None, bias is None)
    torch.library.opcheck(backward, (out, qkv, out, stats, 2, 0.3, bias, *wants), test_utils=utilities)


@every_operator
def test_fullgraph_compile(name):
    torch.compiler.reset()
    operator = OPERATORS[name]
    with ops.use_backend("triton"):
        compiled = torch.compile(operator.fused, fullgraph=True, backend="aot_eager")
        for wanted in (None, ()):
            fused = replace(operator, fused=compiled)
            assert not failures(check(fused, Shape(2, 5, 72), torch.float32, wanted=wanted))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_sums_have_the_rows_that_the_fake_promises(tokens, dtype):
    qkv = torch.randn(2, tokens, 48).to(DTYPES[dtype])
    out, stats = torch.ops.ditfast.attention_forward.default(qkv, 2, 0.3, None, True)
    arguments = (out, qkv, out, stats, 2, 0.3, None, False, True)
    _, _, sums = torch.ops.ditfast.attention_backward.default(*arguments)
    meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments]
    assert torch.ops.ditfast.attention_backward.default(*meta)[2].shape == sums.shape
    yardstick, oracle = (column_sums(qkv.to(kind), out) for kind in (qkv.dtype, torch.float64))
    assert judge("operator", sums.sum(0), yardstick, oracle, DTYPES[dtype]).ok


def column_sums(qkv, incoming):
    """The gradient of a bias of the packed projection, by the formula."""
    leaf = qkv.detach().requires_grad_()
    formulas.self_attention(leaf, 2, scale=0.3).backward(incoming.to(qkv))
    return leaf.grad.sum((0, 1))


def test_meta_tensors_trace_one_launch_each_way():
    inputs = draw_inputs(OPERATORS["self_attention"], Shape(2, 5, 72), torch.bfloat16, "meta")
    qkv = inputs["qkv"].requires_grad_()
    with ops.use_backend("triton"):
        counted = count(lambda: ops.self_attention(qkv, 2).backward(torch.empty_like(qkv[..., :72])), grad=True)
    assert [name for name, *_ in listing(counted)] == [
        "scaled_dot_product_attention",
        "scaled_dot_product_attention_backward",
    ]
    assert qkv.grad.shape == qkv.shape


def test_explicit_backends(monkeypatch):
    qkv = torch.randn(2, 5, 72)
    kernel, library = (ops.self_attention(qkv, 1, backend=name) for name in ("triton", "sdpa"))
    assert torch.allclose(kernel, library, atol=1e-6) and not torch.equal(kernel, library)
    with pytest.raises(ValueError, match='backend "triton" cannot run: the kernels take head dims of at most 128'):
        ops.self_attention(torch.randn(1, 2, 3 * 136), 1, backend="triton")
    with pytest.raises(ValueError, match='backend "triton" cannot run: the kernels compute in fp32, and'):
        ops.self_attention(qkv.double(), 1, backend="triton")
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="self_attention cannot run its Triton kernel"):
        ops.self_attention(torch.randn(1, 2, 3 * 136), 1)
    monkeypatch.setattr(backend_module, "interpreter_unavailable", lambda: "not here")
    with pytest.raises(ValueError, match='backend "triton" cannot run: .*not here'):
        ops.self_attention(qkv, 1, backend="triton")
