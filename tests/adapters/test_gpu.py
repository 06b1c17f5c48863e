"""Accelerated models on a GPU: captured CUDA graphs, a second device, training in bf16."""

import copy

import pytest
import torch

import ditfast
from ditfast.parity import judge
from tests.adapters.conftest import assert_trained_alike
from tests.adapters.foreign_models import Model, inputs, randomised

pytestmark = pytest.mark.gpu

SIZES = {"dim": 128, "num_heads": 2}


def pair(device, dtype=torch.bfloat16):
    slow = randomised(Model(**SIZES)).to(device, dtype).eval()
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast)
    return fast, slow


def batch(device, dtype=torch.bfloat16, seed=1):
    x, t, y = inputs(seed=seed)
    return x.to(device, dtype), t.to(device), y.to(device)


def assert_judged(actual, slow, arguments, dtype=torch.bfloat16):
    with torch.no_grad():
        expected = slow(*arguments)
        exact = copy.deepcopy(slow).double()(arguments[0].double(), *arguments[1:])
    verdict = judge("model", actual, expected, exact, dtype)
    assert verdict.ok, verdict


def test_in_a_captured_graph():
    fast, slow = pair("cuda")
    static = tuple(value.clone() for value in batch("cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            fast(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = fast(*static)
    for seed in (2, 3):
        new = batch("cuda", seed=seed)
        for buffer, value in zip(static, new, strict=True):
            buffer.copy_(value)
        graph.replay()
        assert_judged(out, slow, new)
    # weights written in place are seen by a replay: no copy of them was captured
    with torch.no_grad():
        for model in (fast, slow):
            model.blocks[0].adaLN_modulation[1].weight.mul_(1.5)
    graph.replay()
    assert_judged(out, slow, new)


def test_a_training_step_in_a_captured_graph():
    fast, slow = pair("cuda")
    x, t, y = batch("cuda")
    models = (fast, slow, copy.deepcopy(slow).double())

    def gradients(model):
        out = model(x.to(next(model.parameters()).dtype), t, y)
        return torch.autograd.grad(out.double().square().mean().to(out.dtype), list(model.parameters()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(fast)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = gradients(fast)
    graph.replay()
    joined = [torch.cat([value.flatten() for value in each]) for each in (actual, *map(gradients, models[1:]))]
    verdict = judge("model", *joined, torch.bfloat16)
    assert verdict.ok, verdict


def test_a_second_device():
    """The current device stays the first: kernels launch where their tensors are."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    for device in ("cuda:1", "cuda:0"):
        fast, slow = pair(device)
        arguments = batch(device)
        with torch.no_grad():
            assert_judged(fast(*arguments), slow, arguments)
        assert torch.cuda.current_device() == 0


def test_training_there():
    slow = randomised(Model(**SIZES)).cuda()
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast)
    x, t, y = inputs(4)
    assert_trained_alike(fast, slow, (x.cuda(), t.cuda(), y.cuda()), join=True)
