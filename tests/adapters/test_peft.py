"""ditfast.accelerate and peft's own LoRA, in either order: honoured or reported, never ignored."""

import copy

import pytest
import torch
from torch import nn

import ditfast
from tests.adapters.conftest import (
    ALL,
    KERNELS,
    assert_judged,
    assert_same,
    assert_trained_alike,
    assert_trained_alike_by_kernels,
    pair,
)
from tests.adapters.foreign_models import Model, inputs, randomised

peft = pytest.importorskip("peft", reason="needs the package peft")

READ = "is peft.tuners.lora.layer.Linear, the fused forward reads an nn.Linear's weight"
LINEARS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1", "final_layer.linear"]


def config(*targets, **options):
    return peft.LoraConfig(**{"r": 4, "target_modules": list(targets), "init_lora_weights": False, **options})


def injected(*targets, **options):
    """A change to a model: peft's layers in place of its Linears, with the same random weights every time."""

    def change(model):
        torch.manual_seed(4)
        peft.inject_adapter_in_model(config(*targets, **options), model)

    return change


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def assert_alike(fast, slow):
    """In inference, by the rule."""
    x, t, y = inputs()
    with torch.no_grad():
        models = (fast.eval(), slow.eval(), copy.deepcopy(slow).double())
        results = [{"output": model(x.to(dtype), t, y)} for model, dtype in
                 zip(models, (torch.float32, torch.float32, torch.float64), strict=True)]  # fmt: skip
    assert_judged(*results)
    return results[0]["output"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", LINEARS)
def test_each_linear(path, when):
    unadapted = randomised(Model(depth=1))(*inputs()).detach()
    fast, slow = pair(**{when: injected(path)}, depth=1)
    actual, _ = assert_trained_alike(fast, slow, join=True)
    assert not torch.allclose(actual["output 0.0"], unadapted, rtol=0.01)
    learned = {name.partition(" of ")[2]: value for name, value in actual.items() if name.startswith("gradient 0")}
    assert len(learned) == 2 * len(lora_layers(fast)) and all("lora" in name for name in learned)
    assert all(map(torch.count_nonzero, learned.values()))
    skipped = {entry.module: entry.reason for entry in ditfast.accelerate(fast).skipped}
    read_directly = path.startswith("mlp") and when == "before"
    assert skipped == ({"blocks.0.mlp": f"{path[4:]} {READ}"} if read_directly else {})


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"rank_pattern": {"qkv": 2}, "use_rslora": True}],
    ids=lambda options: "+".join(options),
)
def test_all_of_them(options, when):
    fast, slow = pair(**{when: injected(*LINEARS, **options)}, depth=1)
    start = copy.deepcopy(fast.state_dict())
    for autocast in (None, torch.bfloat16):
        for model in (fast, slow):
            model.load_state_dict(start)
        actual, _ = assert_trained_alike(fast, slow, autocast=autocast, join=True)
        learned = [name for name in actual if name.startswith("gradient 0")]
        layers, biases = len(lora_layers(fast)), sum(name.endswith("bias") for name, _ in fast.named_parameters())
        extra = {"use_dora": layers, "lora_bias": layers, "bias": biases}.get(next(iter(options)), 0)
        assert len(learned) == 2 * layers + extra


@pytest.mark.kernels
@pytest.mark.parametrize("when", ["before", "after"])
def test_on_the_kernels(when):
    """Frozen Linears get no gradient; those that peft wraps are called."""
    fast, slow = pair(**{when: injected("attn.qkv", "mlp.fc2", "adaLN_modulation.1")}, **KERNELS)
    assert_trained_alike_by_kernels(fast, slow, join=True)


def test_a_live_dropout_of_loras():
    fast, slow = pair(before=injected(*LINEARS, lora_dropout=0.4))
    outputs = []
    for model in (fast.train(), slow.train()):
        torch.manual_seed(0)
        outputs.append(model(*inputs()))
    assert_same(*outputs)
    assert not torch.allclose(fast(*inputs()), outputs[0], rtol=0.01)
    assert_alike(fast, slow)


def test_merged_and_unmerged():
    """Merging writes into weights that the fused forward reads or calls; merged, unmerged, and unloaded."""
    fast, slow = pair(after=injected(*LINEARS))
    before = assert_alike(fast, slow)
    for model in (fast, slow):
        for layer in lora_layers(model):
            layer.merge()
    assert_same(assert_alike(fast, slow), before)
    for model in (fast, slow):
        for layer in lora_layers(model):
            layer.unmerge()
    assert_same(assert_alike(fast, slow), before)


def wrapped(model):
    """Inside peft's own model class, which its users train."""
    torch.manual_seed(4)
    return peft.get_peft_model(model, config(*LINEARS))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_peft_model(when, tmp_path):
    slow = wrapped(randomised(Model()))
    fast = randomised(Model())
    if when == "after":
        ditfast.accelerate(fast)
    fast = wrapped(fast)
    if when == "before":
        paths = [entry.module for entry in ditfast.accelerate(fast).accelerated]
        assert len(paths) == ALL - 2 and paths[0] == "base_model.model.blocks.0"
    assert_trained_alike(fast, slow, join=True)
    # from here on with the same weights again
    peft.set_peft_model_state_dict(slow, peft.get_peft_model_state_dict(fast))
    assert list(fast.state_dict()) == list(slow.state_dict())
    assert all(torch.equal(value, fast.state_dict()[name]) for name, value in slow.state_dict().items())
    adapted = assert_alike(fast, slow)
    with fast.disable_adapter(), slow.disable_adapter():
        unadapted = assert_alike(fast, slow)
    assert_same(unadapted, randomised(Model())(*inputs()))
    assert not torch.allclose(adapted, unadapted, rtol=0.01)
    fast.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(randomised(Model()), tmp_path)
    assert_alike(loaded, slow)
    merged, expected = fast.merge_and_unload(), slow.merge_and_unload()
    assert_same(assert_alike(merged, expected), adapted)
    assert type(merged.blocks[0].attn.qkv) is nn.Linear
    assert len(ditfast.accelerate(merged).accelerated) == ALL  # the MLPs too, now that they are plain again
    assert_same(assert_alike(merged, expected), adapted)
    ditfast.restore(merged)
    assert [type(part) for part in merged.modules()] == [type(part) for part in expected.modules()]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["norm2", "attn", "mlp", "adaLN_modulation", "blocks.1", "final_layer"])
def test_modules_that_peft_trains_whole(part, when):
    """peft trains a copy of them, so the copy gets the gradients."""

    def change(model):
        torch.manual_seed(4)
        peft.inject_adapter_in_model(config("x_embedder", modules_to_save=[part]), model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1.5)

    fast, slow = pair(**{when: change})
    actual, _ = assert_trained_alike(fast, slow, join=True)
    assert any("modules_to_save" in name for name in actual) or part == "norm2"
    assert not any("original_module" in name for name in actual)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "other",
    [
        peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False),
        peft.LoHaConfig(r=4, target_modules=["qkv", "fc1", "adaLN_modulation.1"], init_weights=False),
        peft.LoKrConfig(r=4, target_modules=["qkv", "proj"], init_weights=False),
        peft.OFTConfig(r=0, oft_block_size=8, target_modules=["qkv", "fc1"], init_weights=False),
        peft.LoraConfig(r=4, target_parameters=["attn.qkv.weight", "mlp.fc1.weight"], init_lora_weights=False),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Config") if not isinstance(value, str) else value,
)
def test_other_methods_of_peft(other, when):
    def change(model):
        torch.manual_seed(4)
        peft.inject_adapter_in_model(copy.deepcopy(other), model)

    unadapted = randomised(Model(depth=1))(*inputs()).detach()
    fast, slow = pair(**{when: change}, depth=1)
    slow.load_state_dict(fast.state_dict())
    actual, _ = assert_trained_alike(fast, slow, join=True)
    assert not torch.allclose(actual["output 0.0"], unadapted, rtol=0.01)
