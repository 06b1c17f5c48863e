"""Accelerated models under torch's transforms: compile, export, checkpointing, functional calls."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import ditfast
from ditfast.reference import ops
from tests.adapters.conftest import (
    ALL,
    KERNELS,
    assert_judged,
    assert_trained_alike,
    assert_trained_alike_by_kernels,
    pair,
)
from tests.adapters.foreign_models import SMALL, Model, inputs, randomised


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()  # the limit on recompilations counts other tests' models too


def by(compiled, fast):
    """A call that runs the compiled function in the fast model's place."""
    return lambda model, *arguments: compiled(*arguments) if model is fast else model(*arguments)


@pytest.mark.parametrize(
    ("backend", "fullgraph"),
    [
        ("eager", True),
        ("aot_eager", True),
        pytest.param("inductor", False, marks=[pytest.mark.compiler, pytest.mark.long]),
    ],
)
def test_compile(backend, fullgraph):
    fast, slow = pair(depth=1)
    compiled = torch.compile(fast, backend=backend, fullgraph=fullgraph)
    assert_trained_alike(fast, slow, call=by(compiled, fast), x_learns=True, join=True)


@pytest.mark.parametrize("training", [True, False])
def test_no_recompile_after_the_second_batch_size(training):
    fast, slow = pair()
    call = by(torch.compile(fast, backend="aot_eager", fullgraph=True), fast)
    with torch.set_grad_enabled(training):
        for batch in (4, 3):
            call(fast, *inputs(batch))
        with torch.compiler.set_stance("fail_on_recompile"):
            if training:
                assert_trained_alike(fast, slow, inputs(2), call=call)
            else:
                x, t, y = inputs(2)
                oracle = copy.deepcopy(slow).double()
                assert_judged({"out": call(fast, x, t, y)}, {"out": slow(x, t, y)}, {"out": oracle(x.double(), t, y)})


def test_blocks_compiled_one_by_one():
    """Before and after accelerate: traces of the old class are not run for the new one."""
    fast, slow = pair()
    for block in fast.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert_trained_alike(fast, slow)
    late = copy.deepcopy(slow)
    for block in late.blocks:
        block.compile(backend="eager", fullgraph=True)
    late(*inputs())
    assert len(ditfast.accelerate(late).accelerated) == ALL
    assert_trained_alike(late, slow)


def test_a_compiled_model():
    slow = randomised(Model())
    fast = copy.deepcopy(slow)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    compiled(*inputs())
    report = ditfast.accelerate(compiled)
    assert [entry.module for entry in report.accelerated][0] == "_orig_mod.blocks.0" and len(report.accelerated) == ALL
    assert_trained_alike(fast, slow, call=by(compiled, fast))


@pytest.mark.kernels
def test_compile_with_the_kernels():
    fast, slow = pair(**KERNELS)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert_trained_alike_by_kernels(fast, slow, call=by(compiled, fast))


def checkpointed(reentrant):
    def call(model, x, t, y):
        tokens = model.x_embedder(x).flatten(2).transpose(1, 2)
        c = model.t_embedder(ops.timestep_embedding(t, 64).to(x.dtype)) + model.y_embedder(y)
        for block in model.blocks:
            tokens = checkpoint(block, tokens, c, use_reentrant=reentrant)
        return ops.unpatchify(model.final_layer(tokens, c), 2, (x.shape[2] // 2, x.shape[3] // 2))

    return call


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    assert_trained_alike(*pair(), call=checkpointed(reentrant))


@pytest.mark.kernels
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_on_the_kernels(reentrant):
    assert_trained_alike_by_kernels(*pair(**KERNELS), call=checkpointed(reentrant))


@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpoint_wrappers(when):
    def wrap(model):
        model.blocks = nn.ModuleList(map(checkpoint_wrapper, model.blocks))

    fast, slow = pair(**{when: wrap})
    assert len(ditfast.accelerate(fast).accelerated) == ALL
    assert_trained_alike(fast, slow)


def test_functional_call():
    def call(model, *arguments):
        return torch.func.functional_call(model, dict(model.named_parameters()), arguments)

    assert_trained_alike(*pair(), call=call)


def gradients(model, arguments):
    """By torch.func.grad of a functional call."""
    x, t, y = arguments
    x = x.to(next(model.parameters()))

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x, t, y)).square().mean()

    return torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})


def test_func_grad():
    fast, slow = pair()
    batch = inputs()
    assert_judged(gradients(fast, batch), gradients(slow, batch), gradients(copy.deepcopy(slow).double(), batch))


@pytest.mark.kernels
def test_func_grad_on_the_kernels():
    fast, slow = pair(**KERNELS)
    arguments = inputs(4, size=SMALL)
    with ditfast.ops.use_backend("triton"):
        actual = gradients(fast, arguments)
    assert_judged(actual, gradients(slow, arguments), gradients(copy.deepcopy(slow).double(), arguments))


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_dynamic_batch(strict):
    fast, slow = pair()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fast.eval(), inputs(3), dynamic_shapes=({0: batch},) * 3, strict=strict)
    x, t, y = inputs(4)
    actual = program.module()(x, t, y).detach()
    oracle = copy.deepcopy(slow).double()(x.double(), t, y)
    assert_judged({"out": actual}, {"out": slow(x, t, y).detach()}, {"out": oracle.detach()})


def mapped(model, x, t, y):
    return torch.func.vmap(lambda sample: model(sample[None], t[:1], y[:1])[0])(x)


def with_doubled_parameters(model, *arguments):
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    return torch.func.functional_call(model, doubled, arguments)


@pytest.mark.parametrize("transform", [mapped, with_doubled_parameters])
def test_in_inference(transform):
    fast, slow = pair()
    x, t, y = inputs()
    with torch.no_grad():
        outputs = [{"out": transform(model, x, t, y)} for model in (fast, slow)]
        assert_judged(*outputs, {"out": transform(copy.deepcopy(slow).double(), x.double(), t, y)})
