"""CUDA graphs on a GPU: operators, ditfast.DiT and a training step, captured once, replayed with new values."""

import copy
from dataclasses import replace

import pytest
import torch

from ditfast.kernels import modulations
from ditfast.parity import judge
from ditfast.testing.inputs import random_batch, randomize_
from ditfast.training import diffusion_loss
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
