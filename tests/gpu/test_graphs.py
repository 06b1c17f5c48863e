"""CUDA graphs on a GPU: operators, ditfast.DiT and a training step, captured once, replayed with new values;
``ditfast.graphed``."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

import ditfast
from ditfast.kernels import modulations
from ditfast.parity import judge
from ditfast.testing.inputs import random_batch, randomize_
from ditfast.training import diffusion_loss
from tests.adapters.foreign_models import Model, randomised
from tests.gpu.conftest import (
    DEVICE,
    SMALL,
    Question,
    by,
    captured,
    every_backend,
    every_operator,
    model_failures,
    pair,
)
from tests.kernels.conftest import watch

pytestmark = pytest.mark.gpu
designs = pytest.mark.parametrize("conditioning", ["adaln", "adaln_zero"])


@every_operator
@every_backend
def test_operators(name, backend):
    static = Question(by[backend](name), gradients=False)
    graph, out = captured(static.run)
    for seed in (1, 2):
        new = Question(by[backend](name), seed=seed, gradients=False)
        for key, value in new.inputs.items():
            static.inputs[key].copy_(value)
        graph.replay()
        assert not new.failures(out)


@designs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_forward(conditioning, dtype, monkeypatch):
    """Replayed with other inputs, and with weights written in place: the graph holds no copy of either."""
    fast, slow = pair(replace(SMALL, conditioning=conditioning), dtype)
    static = random_batch(SMALL, 3, DEVICE, dtype)
    together = watch(monkeypatch, modulations.Modulations, note=lambda _, arguments: len(arguments[1]))
    with torch.no_grad():
        graph, out = captured(lambda: fast(*static))
        assert set(together) == {SMALL.depth + 1}  # in the capture and before it
        for seed in (1, 2):
            for model in (fast, slow):
                randomize_(model, seed)
            for buffer, value in zip(static, random_batch(SMALL, 3, DEVICE, dtype, seed), strict=True):
                buffer.copy_(value)
            graph.replay()
            exact = copy.deepcopy(slow).double()(static[0].double(), *static[1:])
            assert judge("model", out, slow(*static), exact, dtype).ok


@designs
def test_a_training_step(conditioning):
    """Loss, backward and optimiser in one graph: after every replay the gradients of another batch, at weights that
    the step before has moved."""
    config = replace(SMALL, conditioning=conditioning, class_dropout_prob=0.0)
    fast, slow = (model.train() for model in pair(config, torch.float32))
    start = {name: value.clone() for name, value in fast.state_dict().items()}
    static = *random_batch(config, 3, DEVICE), torch.randn(3, 4, *config.latent_hw, device=DEVICE)

    def steps(model):
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.SGD(learning, lr=1e-3)
        dtype = learning[0].dtype

        def step():
            optimiser.zero_grad()
            x0, t, y, noise = static
            diffusion_loss(model, x0.to(dtype), t, y, noise.to(dtype)).backward()
            optimiser.step()
            return {f"d_{name}": value.grad for name, value in model.named_parameters() if value.requires_grad}

        return step

    graph, actual = captured(steps(fast))
    fast.load_state_dict(start)  # the calls before the capture were steps too
    yardstick, oracle = steps(slow), steps(copy.deepcopy(slow).double())
    for seed in (1, 2, 3):
        new = *random_batch(config, 3, DEVICE, seed=seed), torch.randn_like(static[-1])
        for buffer, value in zip(static, new, strict=True):
            buffer.copy_(value)
        graph.replay()
        assert not model_failures(actual, yardstick(), oracle(), torch.float32), seed


def accelerated_pair(config, dtype):
    slow = randomised(Model(config.hidden_size, config.num_heads, config.depth)).to(DEVICE, dtype).eval()
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, check=False)
    return fast, slow


every_model = pytest.mark.parametrize("make", [pair, accelerated_pair], ids=["DiT", "accelerated"])


def assert_graphed(fast, slow, seed=1, batch=3, dtype=torch.bfloat16):
    arguments = random_batch(SMALL, batch, DEVICE, dtype, seed)
    with torch.no_grad():
        actual, yardstick = fast(*arguments), slow(*arguments)
        exact = copy.deepcopy(slow).double()(arguments[0].double(), *arguments[1:])
    assert fast.unavailable() is None
    verdict = judge("model", actual, yardstick, exact, dtype)
    assert verdict.ok, verdict
    return actual


@every_model
@pytest.mark.parametrize("inference", [False, True])
def test_graphed(make, inference, monkeypatch):
    """Shapes in turn, weights written in place and moved; outputs outlive replays; one launch of all modulations."""
    model, slow = make(SMALL, torch.bfloat16)
    fast = ditfast.graphed(model, limit=2)
    together = watch(monkeypatch, modulations.Modulations, note=lambda _, arguments: len(arguments[1]))
    with torch.inference_mode(inference):
        first = assert_graphed(fast, slow)
        kept = first.clone()
        for seed, batch in enumerate((3, 2, 3, 2), 2):
            assert_graphed(fast, slow, seed, batch)
        assert torch.equal(first, kept) and len(fast._graphs) == 2
        assert set(together) == {SMALL.depth + 1}
        together.clear()
        for each in (model, slow):
            randomised(each, 5)  # in place
        assert_graphed(fast, slow)
        assert not together  # no launch of the host's
    for each in (model, slow):
        for parameter in each.parameters():
            parameter.data = 1.1 * parameter.data  # elsewhere
    assert_graphed(fast, slow)
    assert len(fast._graphs) == 1
    assert_graphed(fast, slow, batch=4)
    assert_graphed(fast, slow, batch=5)
    assert len(fast._graphs) == 2


@every_model
def test_graphed_on_streams(make):
    """Each stream has its graph, and waits for nobody else's."""
    model, slow = make(SMALL, torch.bfloat16)
    fast = ditfast.graphed(model)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for seed in (1, 2):
        for stream in streams:
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                assert_graphed(fast, slow, seed)
                assert torch.cuda.current_stream() == stream
            torch.cuda.default_stream().wait_stream(stream)
    assert len(fast._graphs) == 3


class Tabled(nn.Module):
    """With a table that every forward makes on the CPU, as the official timestep embedding's."""

    def __init__(self, reads=False):
        super().__init__()
        self.linear, self.reads = nn.Linear(64, 64), reads

    def forward(self, t):
        rates = torch.exp(-torch.arange(32, dtype=torch.float32) / 32).to(t.device)
        out = self.linear(torch.cat([(t[:, None] * rates).cos(), (t[:, None] * rates).sin()], dim=1))
        return out * float(t.max()) if self.reads else out


@pytest.mark.parametrize("reads", [False, True])
def test_graphed_forwards_of_others(reads):
    """A table from the CPU is captured where the inputs are; values read on the host run plainly, by name."""
    model = Tabled(reads).to(DEVICE).eval()
    fast = ditfast.graphed(model)
    with pytest.warns(UserWarning, match="reads values on the host") if reads else nullcontext():
        for seed in range(3):
            t = torch.rand(5, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))
            with torch.no_grad():
                torch.testing.assert_close(fast(t), model(t))
    assert len(fast._graphs) == (0 if reads else 1)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_graphed_random_draws_are_no_others():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).to(DEVICE)
    model.eval()
    model[1].train()
    results, x = [], torch.randn(4, 8, device=DEVICE)
    with pytest.warns(UserWarning, match="its forward draws random numbers"), torch.no_grad():
        for call in (model, ditfast.graphed(model)):
            torch.manual_seed(0)
            results.append(torch.stack([call(x) for _ in range(4)]))
    assert torch.equal(*results)
