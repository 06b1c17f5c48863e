"""Whole models in the official shape in inference: one launch for all modulations, whose results are not kept."""

import copy
import inspect
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ditfast
from ditfast.adapters import shared
from ditfast.parity import judge
from tests.adapters.foreign_models import Block, Model, inputs, randomised
from tests.kernels.conftest import watch

DEPTH = 3


@pytest.fixture(autouse=True)
def launches(monkeypatch, request):
    """How many Linears each launch took. Library GEMMs replace the kernel, which has its own tests."""
    counts, original = [], shared.modulations_together

    def together(c, parameters):
        if "kernels" in request.keywords:
            out = original(c, parameters)
        else:
            pairs = zip(parameters[::2], parameters[1::2], strict=True)
            out = torch.cat([nn.functional.linear(c, *pair) for pair in pairs], dim=1)
        if out is not None:
            counts.append(len(parameters) // 2)
        return out

    monkeypatch.setattr(shared, "modulations_together", together)
    return counts


def pair(kind=Model):
    slow = randomised(kind(depth=DEPTH)).eval()
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, strict=True, check=False)
    return fast, slow


def assert_same(fast, slow, arguments=None, dtype=torch.float32, context=nullcontext):
    arguments = arguments or inputs()
    exact = copy.deepcopy(slow).double()(arguments[0].double(), *arguments[1:])
    with context():
        verdict = judge("model", fast(*arguments), slow(*arguments), exact, dtype)
    assert verdict.ok, verdict


@pytest.mark.quick
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_inference(mode, launches):
    fast, slow = pair()
    with mode():
        for batch in (3, 1):
            assert_same(fast, slow, inputs(batch))
    assert launches == ([DEPTH + 1] * 2 if mode is torch.no_grad else [])  # its tensors count no writes
    assert_same(fast, slow)
    assert len(launches) < 3  # each block's own Linear in training


@pytest.mark.kernels
def test_with_the_kernels(launches):
    fast, slow = pair()
    with torch.no_grad():
        # the untouched model runs torch's operators whatever the backend
        assert_same(fast, slow, context=lambda: ditfast.ops.use_backend("triton"))
    assert launches == [DEPTH + 1]


@pytest.mark.kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_launches_of_a_block(mode, monkeypatch):
    from ditfast.kernels.adaln import AdaLNForward

    fast, slow = pair()
    plans = watch(monkeypatch, AdaLNForward)
    with mode(), ditfast.ops.use_backend("triton"):
        for _ in range(2):  # plans made, and kept
            plans.clear()
            assert_same(fast, slow)
            assert len(plans) == 3 * DEPTH + 1


class BetweenBlocks(Model):
    """Something happens to the tokens after the first block."""

    how = staticmethod(lambda x, blocks: x)

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(ditfast.reference.ops.timestep_embedding(t, 64).to(x.dtype)) + self.y_embedder(y)
        x = self.how(self.blocks[0](x, c), [lambda x, block=block: block(x, c) for block in self.blocks])
        for block in self.blocks[1:]:
            x = block(x, c)
        return self.final_layer(x, c)


def written_tokens(x, _):
    return x.mul_(1.5)


def written_unseen(x, _):
    """As collectives and kernels of others write: no version tells."""
    x.data.mul_(1.5)
    return x


def rows_written(x, _):
    x[:, 1] = 2.0
    return x


@pytest.mark.kernels
@pytest.mark.parametrize(
    "how",
    [
        lambda x, blocks: x,
        lambda x, blocks: x + 1,
        lambda x, blocks: x.clone(),
        written_tokens,
        written_unseen,
        rows_written,
        lambda x, blocks: blocks[2](x),  # out of order
        lambda x, blocks: blocks[0](x),  # once more
        lambda x, blocks: blocks[1](x) * 0 + x,  # whose result is not used
        lambda x, blocks: x[:, :5],
    ],
    ids=["plain", "new", "cloned", "written", "unseen", "rows", "order", "again", "aside", "fewer"],
)
def test_what_happens_between_blocks(how):
    fast, slow = pair(BetweenBlocks)
    fast.how = slow.how = how
    exact = copy.deepcopy(slow).double()
    arguments = inputs()
    with ditfast.ops.use_backend("triton"), torch.no_grad():
        out, expected = exact(arguments[0].double(), *arguments[1:]), slow(*arguments)
        for _ in range(2):  # plans made, and kept
            verdict = judge("model", fast(*arguments), expected, out, torch.float32)
            assert verdict.ok, verdict


@pytest.mark.kernels
def test_an_mlp_of_another_width_is_an_error():
    fast, _ = pair()
    fast.blocks[1].mlp.fc2 = nn.Linear(192, 96)
    with ditfast.ops.use_backend("triton"), torch.no_grad(), pytest.raises(ValueError, match="branch must have shape"):
        fast(*inputs())


@pytest.mark.kernels
def test_a_condition_from_outside_of_inference_mode():
    fast, slow = pair()
    c = torch.randn(3, 48)
    exact = copy.deepcopy(slow.blocks[0]).double()
    with ditfast.ops.use_backend("triton"), torch.inference_mode():
        tokens = slow.x_embedder(inputs()[0]).flatten(2).transpose(1, 2)
        out, expected = exact(tokens.double(), c.double()), slow.blocks[0](tokens, c)
        assert judge("model", fast.blocks[0](tokens, c), expected, out, torch.float32).ok


@pytest.mark.kernels
def test_norms_and_blocks_that_change():
    fast, slow = pair()

    def other_eps(model):
        model.blocks[1].norm1.eps, model.blocks[2].norm2.eps, model.final_layer.norm_final.eps = 0.3, 0.2, 0.1

    def another_norm(model):
        model.blocks[1].norm1 = nn.LayerNorm(48)

    def hooked(model):
        model.blocks[2].register_forward_pre_hook(lambda _, arguments: (arguments[0] * 2, arguments[1]))

    with ditfast.ops.use_backend("triton"):
        for change in (lambda _: None, other_eps, another_norm, hooked):
            for model in (fast, slow):
                torch.manual_seed(1)
                change(model)
            with torch.no_grad():
                assert_same(fast, slow)


def test_compiled_each_runs_its_own(launches):
    fast, slow = pair()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(compiled, slow)
        assert not launches
        assert_same(fast, slow)
    assert launches == [DEPTH + 1]


def test_the_models_class_goes_with_its_layers(launches):
    fast, slow = pair()
    assert type(fast) is not Model and isinstance(fast, Model) and type(fast).__name__ == "Model"
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        written(twin)
        changed = copy.deepcopy(slow)
        written(changed)
        with torch.no_grad():
            assert_same(twin, changed)
    assert launches == [DEPTH + 1] * 2
    assert inspect.signature(fast.forward) == inspect.signature(slow.forward)
    assert ditfast.restore(fast) == 1 + 3 * DEPTH and type(fast) is Model
    ditfast.accelerate(fast.final_layer)
    ditfast.accelerate(fast.blocks)
    assert type(fast) is Model
    with ditfast.accelerated(fast):
        assert type(fast) is not Model
    assert type(fast) is Model  # as before the with
    alone = randomised(Model(depth=1))
    alone.final_layer.forward = alone.final_layer.forward  # replaced on the instance: left alone
    ditfast.accelerate(alone)
    assert type(alone) is Model


class Registered(Model):
    """A class whose subclasses must have a name."""

    register = {}

    def __init_subclass__(cls, *, name):
        Registered.register[name] = cls


def test_a_register_of_subclasses_is_not_called():
    pair(Registered)
    assert not Registered.register


def written_by_a_hook(block, _):
    block.adaLN_modulation[1].weight.data.mul_(1.5)


def test_hooks_that_write_weights_are_seen(launches):
    fast, slow = pair()
    for model in (fast, slow):
        model.blocks[1].register_forward_pre_hook(written_by_a_hook)
    with torch.no_grad():
        assert_same(fast, slow)
    assert not launches


def test_nothing_is_left_of_a_call_that_failed(launches):
    fast, _ = pair()
    fast.blocks[1].mlp.fc1.weight = nn.Parameter(torch.zeros(3, 48))
    with torch.no_grad(), pytest.raises(ValueError, match="b1 must have shape"):
        fast(*inputs())
    assert launches == [DEPTH + 1] and shared._call.get() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(dtype):
    fast, slow = pair()
    with torch.no_grad():
        assert_same(fast, slow, dtype=dtype, context=lambda: torch.autocast("cpu", dtype))
        assert_same(fast, slow)  # autocast is over
        fast, slow = fast.to(dtype), slow.to(dtype)
        assert_same(fast, slow, (inputs()[0].to(dtype), *inputs()[1:]), dtype)


def stepped(model, fused):
    model(*inputs()).square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused).step()


def written_through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def written_by_a_way_through_the_model(model):
    model.blocks[1].adaLN_modulation[1].weight.data.mul_(2)
    for parameter in model.final_layer.parameters():
        parameter.detach().numpy()[:] *= 2


def written(model):
    with torch.no_grad():
        model.blocks[1].adaLN_modulation[1].weight.mul_(2)


def replaced(model):
    linear = model.final_layer.adaLN_modulation[1]
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(randomised(Model(depth=DEPTH), seed=7).state_dict()),
        lambda model: model.load_state_dict(randomised(Model(depth=DEPTH), seed=7).state_dict(), assign=True),
        lambda model: stepped(model, fused=False),
        lambda model: stepped(model, fused=True),
        written,
        written_through_data,
        written_by_a_way_through_the_model,
        replaced,
    ],
    ids=["loaded", "assigned", "stepped", "fused-step", "written", "data", "way", "replaced"],
)
def test_weights_that_change_between_calls(change):
    fast, slow = pair()
    with torch.no_grad():
        before = fast(*inputs())
    for model in (fast, slow):
        change(model)
    with torch.no_grad():
        assert_same(fast, slow)
        assert not torch.allclose(fast(*inputs()), before)


class OwnConditions(Model):
    """Every block gets a condition of its own, made as ``how`` says."""

    how = "new"

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(ditfast.reference.ops.timestep_embedding(t, 64).to(x.dtype)) + self.y_embedder(y)
        for i, block in enumerate(self.blocks):
            if self.how == "new":
                c = c + i
            elif self.how == "written":
                c += i
            with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast" and i == 1):
                x = block(x, c).to(c.dtype)
        return self.final_layer(x, c)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["new", "written", "autocast"])
def test_conditions_that_differ_from_block_to_block(how, mode):
    fast, slow = pair(OwnConditions)
    fast.how = slow.how = how
    with mode():
        assert_same(fast, slow, dtype=torch.bfloat16 if how == "autocast" else torch.float32)


def test_two_models_do_not_share(launches):
    first, slow = pair()
    second, changed = copy.deepcopy(first), copy.deepcopy(slow)
    written(second)
    written(changed)
    # one within the other, before any of its layers is called, and in the midst of them
    first.x_embedder.register_forward_hook(lambda *_: list(second(*inputs()))[:0] or None)
    first.blocks[1].mlp.register_forward_hook(lambda *_: list(second(*inputs()))[:0] or None)
    with torch.no_grad():
        assert_same(second, changed)
        assert_same(first, slow)
    assert launches == [DEPTH + 1] * 4


class Encoded(Model):
    """With an extra block that is called first, and whose condition has another width."""

    def __init__(self, depth):
        super().__init__(depth=depth)
        self.encoder = Block(48, 2)
        self.encoder.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(20, 6 * 48))

    def forward(self, x, t, y):
        c = self.t_embedder(ditfast.reference.ops.timestep_embedding(t, 64).to(x.dtype)) + self.y_embedder(y)
        x = self.encoder(self.x_embedder(x).flatten(2).transpose(1, 2), c[:, :20])
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def test_an_accelerated_block_elsewhere_in_the_model(launches):
    fast, slow = pair(Encoded)
    with torch.no_grad():
        assert_same(fast, slow)
    assert launches == [DEPTH + 1]


def test_changed_layers_are_called_as_modules(launches):
    fast, slow = pair()
    called = []
    fast.blocks[1].adaLN_modulation[1].register_forward_hook(lambda *_: called.append("linear"))
    with torch.no_grad():
        assert_same(fast, slow)
    assert called == ["linear"]
    fast, slow = pair()
    for model in (fast, slow):
        model.blocks[0].adaLN_modulation[0] = nn.GELU()
        nn.utils.parametrizations.weight_norm(model.blocks[2].adaLN_modulation[1])
    with torch.no_grad():
        assert_same(fast, slow)
    assert not launches


def test_one_block_left_to_its_own_code(launches):
    slow = randomised(Model(depth=DEPTH)).eval()
    slow.blocks[1].norm2 = nn.LayerNorm(48)  # with parameters: refused
    fast = copy.deepcopy(slow)
    assert [entry.module for entry in ditfast.accelerate(fast).skipped] == ["blocks.1"]
    with torch.no_grad():
        assert_same(fast, slow)
    assert launches == [DEPTH]


def test_wrappers_that_checkpoint_activations(launches):
    fast, slow = pair()
    for i in range(DEPTH):
        fast.blocks[i] = checkpoint_wrapper(fast.blocks[i])
    wrapped = copy.deepcopy(slow)
    for i in range(DEPTH):
        wrapped.blocks[i] = checkpoint_wrapper(wrapped.blocks[i])
    ditfast.accelerate(wrapped)
    with torch.no_grad():
        assert_same(fast, slow)
        assert_same(wrapped, slow)
    assert launches == [DEPTH + 1] * 2
    assert_same(wrapped, slow)
