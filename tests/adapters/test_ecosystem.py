"""Accelerated models as people train them, beside the untouched: hooks, frozen parts, autocast, EMA.

Outputs, every gradient and the parameters after steps of the optimiser are judged by fp64.
"""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ditfast
from ditfast.adapters.swap import accelerated_by
from ditfast.testing.inputs import random_batch
from tests.adapters.conftest import (
    ALL,
    KERNELS,
    assert_judged,
    assert_same,
    assert_trained_alike,
    assert_trained_alike_by_kernels,
    pair,
    trained,
)
from tests.adapters.foreign_models import Model, inputs, randomised
from tests.model.conftest import pair as own_pair


def doubled(module, args, output):
    return 2 * output


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_of_an_optimiser(accumulate):
    actual, _ = assert_trained_alike(*pair(), accumulate=accumulate, x_learns=True, steps=3)
    assert "gradient of x" in actual


def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        runs = [assert_trained_alike(*pair())[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name in runs[0]:
        assert_same(runs[0][name], runs[1][name])


def test_ema():
    """By deepcopy, and by torch's AveragedModel, which makes one."""
    averages = []
    fast, slow = pair()
    oracle = copy.deepcopy(slow).double()
    for model in (fast, slow, oracle):
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        copied = copy.deepcopy(model)
        trained(model)
        ema.update_parameters(model)
        with torch.no_grad():
            for mean, current in zip(copied.parameters(), model.parameters(), strict=True):
                mean.lerp_(current, 0.5)
            x, t, y = inputs()
            x = x.to(next(model.parameters()))
            averages.append({"AveragedModel": ema(x, t, y), "deepcopy": copied(x, t, y)})
    # with the model itself, in whose forward they share a launch
    assert accelerated_by(copied.blocks[0]) is None and sum(map(bool, map(accelerated_by, fast.modules()))) == ALL + 1
    assert_judged(*averages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_grad_scaler(dtype):
    assert_trained_alike(*pair(), autocast=dtype, x_learns=True)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_the_kernels(dtype):
    assert_trained_alike_by_kernels(*pair(**KERNELS), autocast=dtype)


# --- frozen parts


def only(*trainable):
    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trainable))

    return freeze


SUBSETS = [("attn.qkv",), ("adaLN_modulation",), ("mlp.fc2.bias",), ("x_embedder",), ("attn", "mlp.fc1"), ()]


@pytest.mark.parametrize("trainable", SUBSETS, ids=lambda trainable: "+".join(trainable) or "only x")
def test_frozen_parts(trainable):
    for x_learns in (False, True) if trainable else (True,):
        actual, _ = assert_trained_alike(*pair(after=only(*trainable)), x_learns=x_learns)
        learned = {name.rpartition(" ")[2] for name in actual if name.startswith("gradient")} - {"x"}
        assert bool(learned) == bool(trainable) and all(any(part in name for part in trainable) for name in learned)


@pytest.mark.kernels
@pytest.mark.parametrize("trainable", ["attn.qkv", "adaLN_modulation", "only x"])
def test_frozen_parts_on_the_kernels(trainable):
    assert_trained_alike_by_kernels(*pair(after=only(trainable), **KERNELS), x_learns=True)


# --- hooks


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_blocks(when):
    """Forward, forward-pre and full backward hooks, each of which changes its input."""

    def hook(model):
        first, second = model.blocks
        first.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, args[1]))
        first.register_forward_hook(doubled)
        second.register_full_backward_hook(lambda module, d_in, d_out: (d_in[0] * 3, d_in[1]))
        second.register_full_backward_pre_hook(lambda module, d_out: (d_out[0] * 0.5,))

    fast, slow = pair(**{when: hook})
    assert len(ditfast.accelerate(fast).accelerated) == ALL
    assert_trained_alike(fast, slow)


INNER = ["norm1", "attn", "attn.qkv", "attn.q_norm", "attn.proj_drop", "mlp.act", "mlp.drop1", "mlp.fc2", "mlp"]
INNER += ["drop_path", "adaLN_modulation", "adaLN_modulation.0"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("inner", INNER)
def test_hooks_inside_of_blocks(inner, when):
    """A module whose fused forward would skip a hook runs its own; it is reported if the hook came first."""
    def hook(model):
        model.blocks[0].get_submodule(inner).register_forward_hook(doubled)

    fast, slow = pair(**{when: hook}, depth=1)
    assert_trained_alike(fast, slow, steps=1)
    skipped = inner in ("norm1", "attn.q_norm", "attn.proj_drop", "mlp.act", "mlp.drop1", "drop_path")
    reasons = [entry.reason for entry in ditfast.accelerate(fast).skipped]
    expected = [f"{inner.rpartition('.')[2]} has hooks, which the fused forward would skip"]
    assert reasons == (expected if skipped and when == "before" else [])


@pytest.mark.kernels
@pytest.mark.parametrize("inner", ["norm2", "attn.qkv", "mlp.act"])
def test_hooks_inside_of_blocks_on_the_kernels(inner):
    fast, slow = pair(after=lambda m: m.blocks[0].get_submodule(inner).register_forward_hook(doubled), **KERNELS)
    assert_trained_alike_by_kernels(fast, slow)


def test_global_hooks():
    fast, slow = pair()
    kinds = (nn.LayerNorm, nn.GELU, nn.Identity)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: 2 * out if type(m) in kinds else None)
    try:
        assert_trained_alike(fast, slow)
    finally:
        handle.remove()


def test_hooks_are_not_called_by_the_check():
    """Hooks are not copied either: they may hold anything."""
    model, called = randomised(Model()), []

    class Uncopyable:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def hook(self, module, args, output):
            called.append(module)

    for path in ("blocks.0", "blocks.0.attn", "blocks.1.mlp.fc1", "final_layer.linear"):
        model.get_submodule(path).register_forward_hook(Uncopyable().hook)
    assert len(ditfast.accelerate(model).accelerated) == ALL and not called
    model(*inputs())
    assert len(called) == 4


def test_hooks_in_ditfasts_own_model():
    fast, slow = own_pair()
    for model in (fast, slow):
        model.blocks[0].attn.q_norm.register_forward_hook(doubled)
    x, t, y = random_batch(fast.config, 2)
    oracle = copy.deepcopy(slow).double()
    results = [{"output": model(x.to(dtype), t, y).detach()} for model, dtype in
               ((fast, torch.float32), (slow, torch.float32), (oracle, torch.float64))]  # fmt: skip
    assert_judged(*results)
