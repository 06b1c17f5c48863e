"""Models under torch's transforms: inputs and parameters, plain and accelerated, against the formula in fp64."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import ditfast
from ditfast import ops
from ditfast.parity import judge, relative_error
from ditfast.testing.inputs import random_batch
from tests.adapters import foreign_models
from tests.model import conftest as models

pytestmark = pytest.mark.kernels
TINY = ditfast.DiTConfig(depth=2, hidden_size=24, num_heads=3, latent_size=4, num_classes=10)
ONE_BLOCK = replace(TINY, depth=1)  # compiling takes seconds a block
DESIGNS = ("adaln_zero", "adaln", "cross_attention", "in_context")


def of_inputs_and_parameters(model, x, t, y):
    """(a function of x, t and all parameters, what it is taken at, tangents)."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    values = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]

    def function(x, t, *values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x, t, y[: len(x)]))

    xs = (x.to(values[0]), t.to(values[0]), *values)
    generator = torch.Generator().manual_seed(3)
    return function, xs, tuple(torch.randn(x.shape, generator=generator).to(x) for x in xs)


def gradients(function, xs):
    return torch.func.grad(lambda *xs: function(*xs).sin().sum(), argnums=tuple(range(len(xs))))(*xs)


def hessian_product(function, xs, vs):
    return torch.func.jvp(lambda *xs: gradients(function, xs), xs, vs)[1]


def reversed_twice(function, xs, vs):
    def along(*xs):
        return sum((g * v).sum() for g, v in zip(gradients(function, xs), vs, strict=True))

    return torch.func.grad(along, argnums=tuple(range(len(xs))))(*xs)


def of_each_sample(function, xs, vs):
    x, t, *values = xs
    return torch.vmap(lambda x, t: gradients(function, (x[None], t[None], *values)))(x, t)


TRANSFORMS = {
    "jvp": lambda f, xs, vs: [torch.func.jvp(f, xs, vs)[1]],
    "jvp of grad": hessian_product,
    "grad of grad": reversed_twice,
    "vmap of grad": of_each_sample,
}


def together(values):
    """The tensors as one: those of single parameters are small, and some gradients vanish."""
    return torch.cat([value.detach().flatten() for value in values])


def assert_right(transform, fast, slow, inputs):
    def result(model):
        function, xs, vs = of_inputs_and_parameters(model, *inputs)
        return together(TRANSFORMS[transform](function, xs, vs))

    actual = result(fast)
    with sdpa_kernel(SDPBackend.MATH):  # which a foreign model has to be told
        verdict = judge("model", actual, result(slow), result(copy.deepcopy(slow).double()), torch.float32)
    assert verdict.ok, verdict


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("design", DESIGNS)
def test_ditfast_dit(transform, design, machine):
    config = replace(TINY, conditioning=design, qk_norm=design == "adaln")
    assert_right(transform, *models.pair(config), random_batch(config, 2))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_accelerated_model(transform, machine):
    fast, slow = accelerated()
    assert_right(transform, fast, slow, inputs_of(accelerated))


def test_triton_raises_by_name():
    fast, _ = models.pair(TINY)
    function, xs, vs = of_inputs_and_parameters(fast, *random_batch(TINY, 2))
    for transform in TRANSFORMS.values():
        with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"ditfast\.ops\.\w+ cannot .*use_backend"):
            transform(function, xs, vs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_backward_is_right_or_refused(backend):
    """With gradients recorded for a second backward, which the first cannot know."""
    fast, slow = models.pair(TINY)
    x, t, y = random_batch(TINY, 2)

    def penalty(model, x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x, t, y).sin().sum(), x, create_graph=True)
        g.square().sum().backward()
        return together([p.grad for p in model.parameters() if p.grad is not None])

    with ops.use_backend(backend):
        with pytest.raises(RuntimeError, match="ditfast: .* has no derivative"):
            penalty(fast, x)
        with pytest.raises(RuntimeError, match="ditfast: .* has no derivative"):
            penalty(slow, x)
    fast.zero_grad()
    slow.zero_grad()
    with ops.use_backend("torch"), sdpa_kernel(SDPBackend.MATH):
        oracle = penalty(copy.deepcopy(slow).double(), x.double())
        assert judge("model", penalty(fast, x), penalty(slow, x), oracle, torch.float32).ok


@pytest.mark.parametrize("transform", ["jvp", "jvp of grad", "vmap of grad"])
def test_compiled(transform):
    fast, slow = models.pair(ONE_BLOCK)
    inputs = random_batch(ONE_BLOCK, 2)

    def result(model, wrap=lambda call: call):
        function, xs, vs = of_inputs_and_parameters(model, *inputs)
        return together(wrap(lambda xs, vs: TRANSFORMS[transform](function, xs, vs))(xs, vs))

    torch.compiler.reset()
    actual = result(fast, lambda call: torch.compile(call, backend="aot_eager", fullgraph=True))
    assert judge("model", actual, result(slow), result(copy.deepcopy(slow).double()), torch.float32).ok


def trained(model, x, t, y, call=None):
    model.zero_grad()
    (model if call is None else call)(x, t, y).sin().sum().backward()
    return together([p.grad for p in model.parameters() if p.grad is not None])


def accelerated():
    slow = foreign_models.randomised(foreign_models.Model(dim=24, num_heads=3, depth=1))
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, check=False)
    return fast, slow


def fast_and_slow():
    return models.pair(TINY)


def one_block():
    return models.pair(ONE_BLOCK)


def inputs_of(pair, batch=2):
    """Inputs for the models of this kind."""
    if pair is accelerated:
        return foreign_models.inputs(batch, size=foreign_models.SMALL)
    return random_batch(TINY, batch)


@pytest.mark.parametrize("pair", [one_block, pytest.param(accelerated, marks=pytest.mark.long)])
def test_compiled_with_dynamic_shapes_and_trained_on_the_kernels(pair):
    fast, slow = pair()
    torch.compiler.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        inputs = inputs_of(pair, batch)
        with ops.use_backend("triton"):
            actual = trained(fast, *inputs, call=compiled)
        x, t, y = inputs
        oracle = trained(copy.deepcopy(slow).double(), x.double(), t, y)
        verdict = judge("model", actual, trained(slow, *inputs), oracle, torch.float32)
        assert verdict.ok, verdict


@pytest.mark.parametrize("pair", [one_block, pytest.param(accelerated, marks=pytest.mark.long)])
def test_batches_of_gradients_and_compiled_autograd_on_the_kernels(pair):
    fast, _ = pair()
    x, t, y = inputs_of(pair)
    x.requires_grad_()
    leaves = [x, *(parameter for parameter in fast.parameters() if parameter.requires_grad)]
    with ops.use_backend("triton"):
        out = fast(x, t, y)
        incoming = torch.stack([out.detach(), 2 * out.detach()])
        batched = torch.autograd.grad(out, leaves, incoming, retain_graph=True, is_grads_batched=True)
        one = torch.autograd.grad(out, leaves, out.detach(), retain_graph=True)
        assert all(torch.equal(two[0], each) for two, each in zip(batched, one, strict=True))
        torch.compiler.reset()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            out.backward(out.detach())
    actual, expected = together([leaf.grad for leaf in leaves]), together(one)
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("pair", [fast_and_slow, accelerated])
@pytest.mark.parametrize("gradients", [True, False])
def test_traced(pair, gradients, machine):
    fast, slow = pair()
    inputs = inputs_of(pair)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(fast.eval(), inputs)
    x, t, y = inputs
    oracle = trained(copy.deepcopy(slow).double(), x.double(), t, y)
    verdict = judge("model", trained(traced, *inputs), trained(slow, *inputs), oracle, torch.float32)
    assert verdict.ok, verdict
