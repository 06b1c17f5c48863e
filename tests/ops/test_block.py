"""Training blocks as two autograd nodes: gradients for any set of parameters, and what turns the nodes off."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ditfast import DiT, DiTConfig, ops, reference
from ditfast.model.blocks import Pending
from ditfast.parity import judge
from ditfast.testing.inputs import random_batch, randomize_

# without label dropout, so that training draws nothing
TINY = DiTConfig(
    depth=2, hidden_size=72, num_heads=1, latent_size=(4, 6), num_classes=10, class_dropout_prob=0.0
)
pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def kernels_on():
    with ops.use_backend("triton"):
        yield


def pair(config=TINY):
    """(fast, reference) with the same random parameters."""
    slow = randomize_(reference.DiT(config)).train()
    fast = DiT(config).train()
    fast.load_state_dict(slow.state_dict())
    return fast, slow


def gradients(model, x, t, y):
    x = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
    output = model(x, t, y)
    leaves = {"x": x} | {name: value for name, value in model.named_parameters() if value.requires_grad}
    for value in leaves.values():
        value.grad = None
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output))
    return {name: value.grad for name, value in leaves.items() if value.grad is not None}


def assert_agree(fast, slow, batch=2):
    inputs = random_batch(TINY, batch)
    actual, yardstick = gradients(fast, *inputs), gradients(slow, *inputs)
    oracle = gradients(copy.deepcopy(slow).double(), *inputs)
    assert set(actual) == set(yardstick)
    for name, exact in oracle.items():
        verdict = judge("model", actual[name], yardstick[name], exact, torch.float32)
        assert verdict.ok, (name, verdict)


def nodes(output):
    """The names of the autograd nodes behind an output."""
    visited, pending = set(), [output.grad_fn]
    names = []
    while pending:
        node = pending.pop()
        if node is not None and node not in visited:
            visited.add(node)
            names.append(node.name())
            pending += [parent for parent, _ in node.next_functions]
    return names


def merged(model):
    """How many halves of blocks are nodes of their own."""
    return sum(name.startswith("_Norm") for name in nodes(model(*random_batch(TINY, 2))))


FREEZES = {
    "all but the MLPs' first Linears": lambda name: "fc1.weight" not in name,
    "all but biases": lambda name: not name.endswith("bias"),
    "biases": lambda name: name.endswith("bias"),
    "modulations": lambda name: "adaLN" in name or "embedder" in name,
    "the first block": lambda name: "blocks.0" in name,
    "all but the last block's qkv": lambda name: "blocks.1.attn.qkv" not in name,
    "qkv and fc1": lambda name: "qkv" in name or "fc1" in name,
}


@pytest.mark.parametrize(
    ("frozen", "conditioning"),
    [
        *((frozen, ("adaln_zero", "adaln")[index % 2]) for index, frozen in enumerate(FREEZES)),
        ("biases", "adaln"),
        ("all but biases", "adaln_zero"),
    ],
)
def test_frozen_parameters(frozen, conditioning):
    fast, slow = pair(replace(TINY, conditioning=conditioning))
    for model in (fast, slow):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not FREEZES[frozen](name))
    assert merged(fast) >= 2  # parameters frozen from the start leave no node
    assert_agree(fast, slow)


def test_only_the_weights_learn():
    """Nothing before the first norm needs a gradient: its backward is not run, but the norm is recomputed."""
    fast, slow = pair()
    for model in (fast, slow):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "blocks.0.attn.qkv.weight")
    inputs = random_batch(TINY, 3)
    gradients = []
    for model, dtype in ((fast, torch.float32), (slow, torch.float32), (slow, torch.float64)):
        model = copy.deepcopy(model).to(dtype)
        model(*inputs).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    assert judge("model", *gradients, torch.float32).ok


class Wrapped(torch.nn.Linear):
    """As an adapter or a quantised layer would be."""


STEPS_ASIDE = {
    "a hook": lambda block: block.mlp.fc1.register_forward_hook(lambda *_: None),
    "a subclass": lambda block: setattr(block.attn.qkv, "__class__", Wrapped),
    "a hook on the MLP": lambda block: block.mlp.register_forward_pre_hook(lambda *_: None),
    "an own forward": lambda block: setattr(block.attn.proj, "forward", block.attn.proj.forward),
}


@pytest.mark.parametrize("change", STEPS_ASIDE)
def test_changed_layers_are_called(change):
    fast, slow = pair()
    assert merged(fast) == 4
    STEPS_ASIDE[change](fast.blocks[0])
    assert merged(fast) == 2
    assert_agree(fast, slow)
    STEPS_ASIDE[change](fast.blocks[1])
    assert merged(fast) == 0
    if change == "a hook":  # without a fused block the same forward runs, whatever turned the nodes off
        assert_agree(fast, slow)


def test_hooks_see_the_same_values():
    """A replaced output of the MLP reaches the model's."""
    fast, slow = pair()
    for model in (fast, slow):
        model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output * 3)
    assert_agree(fast, slow)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_activation_checkpointing(use_reentrant, training):
    fast, slow = (model.train(training) for model in pair())
    for block in fast.blocks:
        block.forward = (lambda forward: lambda *args: checkpoint(forward, *args, use_reentrant=use_reentrant))(
            block.forward
        )
    assert_agree(fast, slow)


@pytest.mark.quick
def test_evaluation_with_gradients():
    fast, slow = pair()
    assert merged(fast.eval()) == 4
    assert_agree(fast, slow.eval())


def test_the_formula_adds_a_deferred_bias():
    """A block on the kernels' path, followed by a layer on the formula's."""
    fast, slow = pair()
    final = fast.final_layer.forward

    def plain(*args):
        with ops.use_backend("torch"):
            return final(*args)

    fast.final_layer.forward = plain
    assert_agree(fast, slow)


@pytest.mark.parametrize("where", ["a block", "the next block", "the final layer"])
def test_a_loss_between_the_blocks(where):
    """A branch that hooks can see may have other uses than the next norm: then its bias gets a gradient through it."""
    fast, slow = pair()
    x, t, y = random_batch(TINY, 2)

    def loss(model, dtype):
        streams = []
        layers = [*model.blocks, model.final_layer]
        last = 1 if where == "the final layer" else 0  # the block whose result the loss reads
        if type(model) is reference.DiT:
            handle = layers[last].register_forward_hook(lambda module, inputs, output: streams.append(output))
        elif where == "a block":
            handle = layers[last].register_forward_hook(lambda module, inputs, out: streams.append(stream(*out)))
        else:
            handle = layers[last + 1].register_forward_pre_hook(lambda module, inputs: streams.append(stream(*inputs)))
        output = model(x.to(dtype), t, y)
        handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
        (output.square().sum() + streams[0].square().sum()).backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    actual, yardstick = loss(fast, torch.float32), loss(slow, torch.float32)
    oracle = loss(copy.deepcopy(slow).double(), torch.float64)
    for name, exact in oracle.items():
        assert judge("model", actual[name], yardstick[name], exact, torch.float32).ok, name


def stream(x, branch, gate, *_):
    """The residual stream after a block, as in the reference."""
    return x + gate.unsqueeze(1) * branch


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_a_replaced_mlp(backend):
    class Plain(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.layers = torch.nn.Sequential(mlp.fc1, torch.nn.GELU(approximate="tanh"), mlp.fc2)

        def forward(self, x):
            return self.layers(x)

    fast, slow = pair()
    for model in (fast, slow):
        model.blocks[0].mlp = Plain(model.blocks[0].mlp)
    with ops.use_backend(backend):
        assert_agree(fast, slow)


class Wrapper(torch.Tensor):
    """A tensor subclass, as quantised weights are: it holds its values elsewhere."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrap = lambda item: item.values if isinstance(item, Wrapper) else item  # noqa: E731
        if function is torch.ops.aten.detach.default:
            return Wrapper(args[0].values)
        assert function.namespace == "aten", f"{function} cannot read such a weight"
        return function(*map(unwrap, args), **(kwargs or {}))


@pytest.mark.parametrize("layer", ["qkv", "fc1"])
def test_weights_of_another_kind(layer):
    fast, slow = pair()
    for model in (fast, slow):
        linear = getattr(model.blocks[0].attn if layer == "qkv" else model.blocks[0].mlp, layer)
        values = linear.weight.detach()
        wrapped = Wrapper(values) if model is fast else values
        linear.weight = torch.nn.Parameter(wrapped, requires_grad=False)
    assert merged(fast) == 2
    assert_agree(fast, slow)
    with torch.no_grad():
        fast(*random_batch(TINY, 2))


def test_a_bias_that_is_no_parameter():
    """Everything else is frozen; the bias gets its gradient once."""
    fast, slow = pair()
    biases = []
    for model, dtype in ((fast, torch.float32), (slow, torch.float32), (copy.deepcopy(slow), torch.float64)):
        model.to(dtype).requires_grad_(False)
        bias = model.blocks[0].mlp.fc2.bias.detach().clone().requires_grad_()
        del model.blocks[0].mlp.fc2.bias
        model.blocks[0].mlp.fc2.bias = bias
        x, t, y = random_batch(TINY, 2)
        model(x.to(dtype), t, y).square().sum().backward()
        biases.append(bias.grad)
    assert judge("model", *biases, torch.float32).ok


def test_a_settled_branch_keeps_its_dtype():
    branch, bias = torch.randn(2, 3, 8).half(), torch.randn(8, requires_grad=True)
    settled = Pending(branch, torch.randn(2, 8).half(), bias).settled()
    assert settled.branch.dtype == torch.float16 and torch.equal(settled.branch, branch)
    settled.branch.sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 6.0))


def test_unused_outputs():
    """A loss on a block's branch alone, and on its residual stream alone."""
    fast, _ = pair()
    block = fast.blocks[0].double().float()
    x, c = torch.randn(2, 5, 72), torch.randn(2, 72)
    for index in (0, 1):
        inputs = [value.clone().requires_grad_() for value in (x, c)]
        out = block(inputs[0], None, None, None, inputs[1], True, None)[index]
        actual = torch.autograd.grad(out.sum(), inputs, allow_unused=True)
        with ops.use_backend("torch"):
            expected_out = block(inputs[0], None, None, None, inputs[1], True, None)[index]
            expected = torch.autograd.grad(expected_out.sum(), inputs, allow_unused=True)
        for one, other in zip(actual, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other.norm() > 1e-4:
                assert judge("operator", one, other, other.double(), torch.float32).error < 1e-5


def test_without_biases():
    fast, slow = pair()
    for model in (fast, slow):
        for block in model.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.bias = None
    assert merged(fast) == 4
    assert_agree(fast, slow)


def test_functional_call():
    fast, slow = pair()
    parameters = {name: value.detach() for name, value in fast.named_parameters()}
    inputs = random_batch(TINY, 2)

    def loss(model):
        return lambda values: torch.func.functional_call(model, values, inputs).square().sum()

    actual, yardstick = (torch.func.grad(loss(model))(parameters) for model in (fast, slow))
    exact = {name: value.double() for name, value in parameters.items()}
    inputs = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    oracle = torch.func.grad(loss(copy.deepcopy(slow).double()))(exact)
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            assert judge("model", actual[name], yardstick[name], oracle[name], torch.float32).ok, name
