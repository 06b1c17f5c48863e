"""ditfast.DiT on a GPU by the model rule: outputs and gradients, under autocast, compiled, checkpointed, in threads."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ditfast
from ditfast import DiTConfig, ops
from ditfast.bench.prove.verify import check_model, run_model
from ditfast.config import CONDITIONINGS
from ditfast.kernels import adaln
from ditfast.testing.inputs import random_batch
from ditfast.training import diffusion_loss
from tests.adapters.foreign_models import Model, inputs, randomised
from tests.gpu.conftest import DEVICE, SMALL, in_threads, model_failures, pair, spy_on
from tests.kernels.conftest import DTYPES, failures

pytestmark = pytest.mark.gpu
FUSED = ("adaln", "adaln_zero")
XL = DiTConfig(depth=2, hidden_size=1152, num_heads=16, latent_size=32, num_classes=10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_outputs_and_every_gradient(conditioning, dtype):
    assert not failures(check_model(replace(XL, conditioning=conditioning), DTYPES[dtype], DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conditioning", FUSED)
@pytest.mark.parametrize("latent_size", [32, (30, 34)], ids=["256 tokens", "255 tokens"])
def test_with_the_kernels_demanded(conditioning, dtype, latent_size):
    config = replace(SMALL, conditioning=conditioning, latent_size=latent_size)
    with ops.use_backend("triton"):
        assert not failures(check_model(config, DTYPES[dtype], DEVICE))


@pytest.mark.parametrize("training", [False, True])
def test_the_kernels_are_on_the_path(training, monkeypatch):
    """On a GPU "auto" takes them without a demand."""
    launches = spy_on(monkeypatch, adaln.AdaLNForward, adaln.AdaLNBackward)
    fast, _ = pair(SMALL, torch.bfloat16)
    with torch.set_grad_enabled(training):
        out = fast(*random_batch(SMALL, 3, DEVICE, torch.bfloat16))
    if training:
        out.sum().backward()
    norms, calls = 2 * SMALL.depth + 1, [name for name, _ in launches]
    assert (calls.count("AdaLNForward"), calls.count("AdaLNBackward")) == (norms, norms if training else 0)


@pytest.mark.parametrize("conditioning", FUSED)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast(conditioning, dtype):
    fast, slow = pair(replace(SMALL, conditioning=conditioning), torch.float32)
    batch = random_batch(SMALL, 3, DEVICE)
    with torch.autocast("cuda", DTYPES[dtype]):
        actual, yardstick = (run_model(model, *batch) for model in (fast, slow))
    oracle = run_model(copy.deepcopy(slow).double(), *batch)
    assert not model_failures(actual, yardstick, oracle, DTYPES[dtype])


def trained(model, autocast=None):
    """What four steps of SGD change in each parameter."""
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in learning.items()}
    optimiser = torch.optim.SGD(learning.values(), lr=0.01, momentum=0.9)
    dtype = next(iter(learning.values())).dtype
    for step in range(4):
        x0, t, y = random_batch(SMALL, 3, DEVICE, dtype, seed=step)
        noise = random_batch(SMALL, 3, DEVICE, dtype, seed=10 + step)[0]
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            loss = diffusion_loss(model, x0, t, y, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {f"d_{name}": value.detach() - before[name] for name, value in learning.items()}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_training_steps(autocast):
    fast, slow = (model.train() for model in pair(replace(SMALL, class_dropout_prob=0.0)))
    exact = trained(copy.deepcopy(slow).double())
    assert not model_failures(trained(fast, autocast), trained(slow, autocast), exact, autocast or torch.float32)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("conditioning", FUSED)
def test_activation_checkpointing(conditioning, use_reentrant):
    fast, slow = pair(replace(SMALL, conditioning=conditioning), torch.bfloat16)
    for block in fast.blocks:
        block.forward = (lambda forward: lambda *args: checkpoint(forward, *args, use_reentrant=use_reentrant))(
            block.forward
        )
    assert_alike(fast, slow, random_batch(SMALL, 3, DEVICE, torch.bfloat16))


def outputs_and_gradients(model, x, t, y):
    """One forward and one backward: a compiled model is traced once."""
    x = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
    out = model(x, t, y)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    learning = {"x": x} | {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {"output": out.detach()} | {f"d_{name}": value.grad for name, value in learning.items()}


def assert_alike(fast, slow, arguments, dtype=torch.bfloat16):
    actual, yardstick = (outputs_and_gradients(model, *arguments) for model in (fast, slow))
    oracle = outputs_and_gradients(copy.deepcopy(slow).double(), *arguments)
    assert not model_failures(actual, yardstick, oracle, dtype)


def test_compiled():
    fast, slow = pair(replace(SMALL, depth=1), torch.bfloat16)
    fast.compile(fullgraph=True)
    assert_alike(fast, slow, random_batch(SMALL, 3, DEVICE, torch.bfloat16))


def test_a_compiled_model_of_another_codebase():
    slow = randomised(Model(dim=128, depth=1)).to(DEVICE).eval()
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast)
    fast.compile(fullgraph=True)
    x, t, y = inputs()
    assert_alike(fast, slow, (x.to(DEVICE), t.to(DEVICE), y.to(DEVICE)), torch.float32)


@pytest.mark.parametrize("conditioning", FUSED)
@pytest.mark.parametrize("training", [False, True])
def test_threads_share_a_model(conditioning, training):
    """Forwards and backwards at once, each on a stream of its own, through one model and autograd's one thread."""
    config = replace(SMALL, conditioning=conditioning, class_dropout_prob=0.0)
    fast, slow = (model.train(training) for model in pair(config, torch.float32))
    batches = [random_batch(config, 3, DEVICE, seed=seed) for seed in range(3)]
    fresh = in_threads([lambda batch=batch: run_model(fast, *batch) for batch in batches])
    again = in_threads([lambda batch=batch: [run_model(fast, *batch) for _ in range(3)][-1] for batch in batches])
    exact = copy.deepcopy(slow).double()
    for batch, *runs in zip(batches, fresh, again, strict=True):
        yardstick, oracle = (run_model(model, *batch) for model in (slow, exact))
        for results in runs:
            assert not model_failures(results, yardstick, oracle, torch.float32)


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    assert not failures(check_model(SMALL, torch.bfloat16, "cuda:1"))
    assert torch.cuda.current_device() == 0
