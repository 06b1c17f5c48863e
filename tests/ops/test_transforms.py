"""The operators under torch's transforms: derivatives beyond gradients are right, or refused by name."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast import ops
from ditfast.parity import judge
from ditfast.reference import ops as formulas
from ditfast.testing.operators import OPERATORS, Shape, draw_inputs
from tests.kernels.conftest import failures

pytestmark = pytest.mark.kernels
SHAPE = Shape(2, 5, 72, layers=2)
every_operator = pytest.mark.parametrize("name", OPERATORS)
with_gradients = pytest.mark.parametrize("name", [name for name, each in OPERATORS.items() if each.gradients])


def case(name, dtype=torch.float32):
    """(the operator, its formula, its floating inputs, tangents): functions of these inputs to a tuple."""
    operator = OPERATORS[name]
    inputs = draw_inputs(operator, SHAPE, torch.float32, "cpu")
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    if name == "timestep_embedding":  # whose derivative is that by t
        inputs["t"] = torch.tensor([0.3, 700.0], dtype=dtype)
    names = [key for key, value in inputs.items() if value.is_floating_point()]
    fixed = {key: value for key, value in inputs.items() if key not in names} | operator.options(SHAPE)

    def of(function):
        def call(*tensors):
            out = function(**dict(zip(names, tensors, strict=True)), **fixed)
            return out if isinstance(out, tuple) else (out,)

        return call

    xs = tuple(inputs[key] for key in names)
    generator = torch.Generator().manual_seed(3)
    vs = tuple(torch.randn(x.shape, generator=generator).to(x) for x in xs)
    return of(operator.fused), of(operator.formula), xs, vs


def loss(function):
    return lambda *xs: sum(out.sin().sum() for out in function(*xs))


def gradient(function, xs):
    return torch.func.grad(loss(function), argnums=tuple(range(len(xs))))


def along(function, xs, vs):
    """The gradient's product with vs, a scalar."""
    return lambda *xs: sum((g * v).sum() for g, v in zip(gradient(function, xs)(*xs), vs, strict=True))


def by_duals(function, xs, vs):
    with forward_ad.dual_level():
        outs = function(*map(forward_ad.make_dual, xs, vs))
        return [forward_ad.unpack_dual(out).tangent for out in outs]


def of_each_sample(function, xs, vs):
    stacked = [torch.stack([x, x + v]) for x, v in zip(xs, vs, strict=True)]
    return torch.vmap(gradient(function, xs))(*stacked)


def around_a_gradient(function, xs, vs):
    xs = [x.clone().requires_grad_() for x in xs]
    torch.func.grad(along_the_first(function, xs[1:]))(xs[0]).sin().sum().backward()
    return [x.grad for x in xs]


def along_the_first(function, rest):
    return lambda x: loss(function)(x, *rest)


TRANSFORMS = {
    "jvp": lambda f, xs, vs: torch.func.jvp(f, xs, vs)[1],
    "dual numbers": by_duals,
    "linearize": lambda f, xs, vs: torch.func.linearize(f, *xs)[1](*vs),
    "jvp of grad": lambda f, xs, vs: torch.func.jvp(gradient(f, xs), xs, vs)[1],
    "grad of jvp": lambda f, xs, vs: gradient(lambda *xs: torch.func.jvp(f, xs, vs)[1], xs)(*xs),
    "grad of grad": lambda f, xs, vs: torch.func.grad(along(f, xs, vs), argnums=tuple(range(len(xs))))(*xs),
    "backward of grad": around_a_gradient,
    "vmap of grad": of_each_sample,
}


def results(transform, function, xs, vs):
    outputs = TRANSFORMS[transform](function, xs, vs)
    return {str(index): torch.zeros(()) if value is None else value.detach() for index, value in enumerate(outputs)}


@pytest.mark.pairwise
@every_operator
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform(name, transform, machine):
    fused, formula, xs, vs = case(name)
    yardstick = results(transform, formula, xs, vs)
    oracle = results(transform, *case(name, torch.float64)[1:])
    actual = results(transform, fused, xs, vs)
    verdicts = {key: judge("operator", actual[key], yardstick[key], oracle[key], torch.float32) for key in oracle}
    assert not failures(verdicts)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"ditfast.*use_backend\(.torch"):
        results(transform, fused, xs, vs)


def by_kernels(function):
    def call(*xs):
        with ops.use_backend("triton"):
            return function(*xs)

    return call


@with_gradients
def test_batches_of_incoming_gradients(name):
    fused, _, xs, _ = case(name)
    leaves = [x.requires_grad_() for x in xs]
    outs = by_kernels(fused)(*leaves)
    outs = [out for out in outs if out.requires_grad]
    incoming = [torch.randn(2, *out.shape) for out in outs]
    together = torch.autograd.grad(outs, leaves, incoming, is_grads_batched=True, retain_graph=True)
    for index in range(2):
        alone = torch.autograd.grad(outs, leaves, [each[index] for each in incoming], retain_graph=True)
        for batched, single in zip(together, alone, strict=True):
            assert judge("operator", batched[index], single, single.double(), torch.float32).ok

    def first(*tensors):
        return by_kernels(fused)(*tensors)[0].reshape(-1)[:2]

    jacobian = torch.func.jacrev(lambda x: first(x, *xs[1:]))(xs[0].detach())
    (row,) = torch.autograd.grad(first(*leaves)[1], leaves[:1])
    assert judge("operator", jacobian[1], row, row.double(), torch.float32).ok


REFUSED = "ditfast: the gradient of .* has no derivative where kernels computed it; .*use_backend"


@with_gradients
def test_a_kernels_gradient_refuses_to_be_differentiated(name):
    fused, _, xs, vs = case(name)
    of = by_kernels(loss(fused))
    leaves = [x.clone().requires_grad_() for x in xs]
    plain = torch.autograd.grad(of(*leaves), leaves)
    recorded = torch.autograd.grad(of(*leaves), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    for index in range(len(xs)):
        if recorded[index].requires_grad:
            with pytest.raises(RuntimeError, match=REFUSED):
                recorded[index].sum().backward(retain_graph=True)
    for leaf in leaves:  # whichever leaf the gradient is by
        linear = [g.sum() for g in recorded if g.requires_grad]
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(sum(linear), leaf, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=REFUSED):  # it takes silence for zeros
        torch.autograd.functional.hvp(of, xs, vs)
    _, backward = torch.func.vjp(of, *xs)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.jvp(backward, (torch.ones(()),), (torch.ones(()),))
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.grad(lambda v: sum(g.sum() for g in backward(v)))(torch.ones(()))


def test_a_level_of_others_does_not_disturb_a_backward():
    fused, _, xs, vs = case("gated_residual")
    x = xs[0].clone().requires_grad_()
    out = by_kernels(loss(fused))(x, *xs[1:])
    with forward_ad.dual_level():
        forward_ad.make_dual(vs[0], vs[0])
        out.backward()
    assert x.grad.isfinite().all()


def test_fused_attention_of_torch_refuses_by_name():
    fused, formula, xs, _ = case("self_attention")
    x = xs[0].requires_grad_()

    def twice(function):
        (g,) = torch.autograd.grad(loss(function)(x), x, create_graph=True)
        return torch.autograd.grad(g.sin().sum(), x)[0]

    for function in (fused, formula):
        with pytest.raises(RuntimeError, match=r"ditfast: attention .* under torch.nn.attention.sdpa_kernel"):
            twice(function)
        with sdpa_kernel(SDPBackend.MATH):
            twice(function)
    with pytest.raises(ValueError, match='backend "flash" cannot run: it has no forward-mode derivative'):
        torch.func.jvp(lambda x: ops.self_attention(x, 2, backend="flash"), (x,), (x,))


@pytest.mark.parametrize("wants", ["t_emb", "table"])
def test_conditioning_has_a_kernel_for_inference(wants):
    inputs = draw_inputs(OPERATORS["conditioning"], SHAPE, torch.float32, "cpu")
    inputs[wants].requires_grad_()
    with ops.use_backend("triton"):
        with pytest.raises(RuntimeError, match=f'{wants} wants a gradient.*use_backend\\("torch"\\)'):
            ops.conditioning(**inputs)
        with torch.no_grad():
            ops.conditioning(**inputs)


def test_the_gradient_by_a_timestep(machine):
    def slope(function, dtype):
        t = torch.tensor([0.3, 700.0], dtype=dtype, requires_grad=True)
        out = function(t, 1024, dtype=dtype)
        return torch.autograd.grad((out.square() * torch.arange(1024)).sum(), t)[0]

    exact, yardstick = (slope(formulas.timestep_embedding, dtype) for dtype in (torch.float64, torch.float32))
    assert judge("operator", slope(ops.timestep_embedding, torch.float32), yardstick, exact, torch.float32).ok
    t = torch.tensor([0.3, 700.0], requires_grad=True)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"t wants a gradient.*use_backend\(.torch"):
        ops.timestep_embedding(t, 16)


def test_compiled_autograd_takes_the_backward():
    fused, _, xs, _ = case("gated_residual_layer_norm_modulate")
    leaves = [x.clone().requires_grad_() for x in xs]
    eager = torch.autograd.grad(by_kernels(loss(fused))(*leaves), leaves)
    torch.compiler.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        by_kernels(loss(fused))(*leaves).backward()
    assert all(torch.equal(leaf.grad, expected) for leaf, expected in zip(leaves, eager, strict=True))


@pytest.mark.parametrize("name", [name for name, each in OPERATORS.items() if each.gradients and "+" not in name])
def test_compiled_twice_over_with_dynamic_shapes(name):
    """Two calls in one graph, with one tensor in two places."""
    operator = OPERATORS[name]

    def twice(*tensors):
        first, second = (operator.fused(**dict(zip(names, tensors, strict=True)), **options) for _ in range(2))
        return [a.sin() + b for a, b in zip(*map(tupled, (first, second)), strict=True)]

    def tupled(out):
        return out if isinstance(out, tuple) else (out,)

    torch.compiler.reset()
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in (SHAPE, Shape(3, 4, 72, layers=2)):
        inputs, options = draw_inputs(operator, shape, torch.float32, "cpu"), operator.options(shape)
        inputs |= {"scale": inputs["shift"]} if "scale" in inputs else {}
        names = list(inputs)
        leaves = [x.requires_grad_() for x in inputs.values()]
        actual, expected = (
            torch.autograd.grad([out.square().sum() for out in by_kernels(f)(*leaves)], leaves, allow_unused=True)
            for f in (compiled, twice)
        )
        for gradient, eager in zip(actual, expected, strict=True):
            assert judge("operator", gradient, eager, eager.double(), torch.float32).ok
