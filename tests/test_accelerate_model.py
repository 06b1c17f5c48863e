"""Whole models in the official shape in inference: nothing of one call, or of older weights, is left in the next."""

import copy
from contextlib import nullcontext

import pytest
import torch
from foreign_models import Model, inputs, randomised
from torch import nn

import ditfast
from ditfast.bench.parity import judge

DEPTH = 3


def pair(kind=Model):
    slow = randomised(kind(depth=DEPTH)).eval()
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, strict=True)
    return fast, slow


def assert_same(fast, slow, given=None, dtype=torch.float32, context=nullcontext):
    given = given or inputs()
    exact = copy.deepcopy(slow).double()(given[0].double(), *given[1:])
    with context():
        verdict = judge("model", fast(*given), slow(*given), exact, dtype)
    assert verdict.ok, verdict


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_inference(mode):
    fast, slow = pair()
    with mode():
        for batch in (3, 1):
            assert_same(fast, slow, inputs(batch))


@pytest.mark.kernels
def test_with_the_kernels():
    fast, slow = pair()
    with torch.no_grad():
        # the untouched model runs torch's operators whatever the backend
        assert_same(fast, slow, context=lambda: ditfast.ops.use_backend("triton"))


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
    """Every block is given a condition of its own, made as ``how`` says."""

    how = "new"

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(ditfast.reference.ops.timestep_embedding(t, 64).to(x.dtype)) + self.y_embedder(y)
        for i, block in enumerate(self.blocks):
            if self.how == "new":
                c = c + i
            else:
                c += i
            x = block(x, c)
        return self.final_layer(x, c)


@pytest.mark.parametrize("how", ["new", "written"])
def test_conditions_that_differ_from_block_to_block(how):
    fast, slow = pair(OwnConditions)
    fast.how = slow.how = how
    with torch.no_grad():
        assert_same(fast, slow)
