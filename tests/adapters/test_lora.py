"""Accelerated models with changed parts: LoRA, layers replaced before or after, odd heads, other argument names.

peft's own LoRA is in test_peft.py.
"""

import copy

import pytest
import torch
from torch import nn

import ditfast
from tests.adapters.conftest import (
    KERNELS,
    assert_judged,
    assert_same,
    assert_trained_alike,
    assert_trained_alike_by_kernels,
    pair,
)
from tests.adapters.foreign_models import (
    SMALL,
    Attention,
    Block,
    DropPath,
    FinalLayer,
    Model,
    inputs,
    randomised,
)


class Lora(nn.Module):
    """In peft's style: the Linear's result plus that of two small ones."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Scaled(Lora):
    """With a magnitude of its own (as DoRA has), which under autocast gives fp32 beside the others' bf16."""

    def __init__(self, base):
        super().__init__(base)
        self.lora_magnitude = nn.Parameter(torch.linspace(0.5, 1.5, base.out_features))

    def forward(self, x):
        return self.lora_magnitude * super().forward(x)


class Untold(nn.Module):
    """A wrapper without in_features and out_features."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora = nn.Parameter(torch.linspace(-1, 1, base.out_features))

    def forward(self, x):
        return self.base(x) + self.lora


def wrapped(kind, *paths):
    """A change to a model: these Linears of its first block wrapped in LoRA, all else frozen."""

    def change(model):
        torch.manual_seed(4)
        model.requires_grad_(False)
        for path in paths:
            parent, _, name = path.rpartition(".")
            parent = model.blocks[0].get_submodule(parent)
            setattr(parent, name, kind(getattr(parent, name)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)

    return change


LINEARS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]


WRAPPERS = [(Lora, None), (Lora, torch.bfloat16), (Scaled, torch.bfloat16), (Untold, None)]
PAIRS = [  # every wrapper with every Linear, each before accelerate for some and after it for others
    (kind, autocast, path, ("before", "after")[(i + j) % 2])
    for i, (kind, autocast) in enumerate(WRAPPERS)
    for j, path in enumerate(LINEARS)
]


@pytest.mark.parametrize(
    ("kind", "autocast", "path", "when"), PAIRS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_lora_is_honoured(path, kind, when, autocast):
    unadapted = randomised(Model(depth=1))(*inputs()).detach()
    fast, slow = pair(**{when: wrapped(kind, path)}, depth=1)
    actual, _ = assert_trained_alike(fast, slow, autocast=autocast)
    assert not torch.allclose(actual["output 0.0"].float(), unadapted, rtol=0.01)
    gradients = [value for name, value in actual.items() if name.startswith("gradient 0")]
    assert len(gradients) == {Lora: 2, Scaled: 3, Untold: 1}[kind] and all(map(torch.count_nonzero, gradients))


def test_what_lora_leaves_accelerated():
    """Attention and modulation call their Linears; the fused MLP reads its weights, so a wrapped one is skipped."""
    changed = randomised(Model())
    wrapped(Lora, *LINEARS)(changed)
    report = ditfast.accelerate(changed)
    assert [entry.module for entry in report.skipped] == ["blocks.0.mlp"]
    assert report.skipped[0].reason.endswith("Lora, the fused forward reads an nn.Linear's weight")


@pytest.mark.kernels
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["attn.qkv", "mlp.fc2"])
def test_lora_on_the_kernels(path, autocast):
    kind = Lora if autocast is None else Scaled
    assert_trained_alike_by_kernels(*pair(after=wrapped(kind, path), **KERNELS), autocast=autocast)


@pytest.mark.kernels
def test_promoted_branches_in_ditfasts_own_model():
    """Branches in fp32 within a block, from block to block and into the final layer; modulations in bf16."""
    config = ditfast.DiTConfig(depth=2, hidden_size=96, num_heads=2, latent_size=SMALL, num_classes=10)
    slow = randomised(ditfast.reference.DiT(config))
    fast = ditfast.DiT(config)
    fast.load_state_dict(slow.state_dict())
    for model in (fast, slow):
        model.eval()  # labels are not dropped
        torch.manual_seed(4)
        model.blocks[0].attn.proj = Scaled(model.blocks[0].attn.proj)
        for block in model.blocks:
            block.mlp.fc2 = Scaled(block.mlp.fc2)
    assert_trained_alike_by_kernels(fast, slow, autocast=torch.bfloat16)


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("path", LINEARS)
def test_linears_replaced_by_a_subclass(path):
    def change(model):
        parent, _, name = path.rpartition(".")
        parent = model.blocks[1].get_submodule(parent)
        old = getattr(parent, name)
        new = Shifted(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        setattr(parent, name, new)

    assert_trained_alike(*pair(after=change))


def test_parts_replaced_after_accelerate():
    """A norm with parameters, another activation, a live drop path."""

    def change(model):
        model.blocks[0].norm2 = nn.LayerNorm(48)
        model.blocks[0].mlp.act = nn.SiLU()
        model.blocks[1].attn.k_norm = nn.LayerNorm(24)
        model.final_layer.norm_final = nn.LayerNorm(48, elementwise_affine=False, eps=0.1)

    assert_trained_alike(*pair(after=change))
    fast, slow = pair(after=lambda model: setattr(model.blocks[0], "drop_path", DropPath(0.5)))
    results = []
    for model in (fast, slow):
        torch.manual_seed(0)
        results.append(model(*inputs()))
    assert_same(*results)


# --- calls


class OtherNames(Block):
    def forward(self, hidden, cond):
        return super().forward(hidden, cond)


def test_calls_with_other_names_and_one_condition_for_all():
    for kind in (Block, OtherNames):
        slow = randomised(kind(48, 2))
        fast = copy.deepcopy(slow)
        ditfast.accelerate(fast)
        oracle = copy.deepcopy(slow).double()
        x, c = torch.randn(3, 9, 48), torch.randn(3, 48)
        first, second = ("x", "c") if kind is Block else ("hidden", "cond")
        calls = [((x, c), {}), ((x,), {second: c}), ((), {second: c, first: x}), ((x, c[:1]), {}), ((x[:1], c), {})]
        for args, kwargs in calls:
            results = []
            for model, dtype in ((fast, torch.float32), (slow, torch.float32), (oracle, torch.float64)):
                arguments = [value.to(dtype) for value in args]
                results.append({"out": model(*arguments, **{k: v.to(dtype) for k, v in kwargs.items()}).detach()})
            assert_judged(*results)
    attention = randomised(Attention(48, 2))
    expected = attention(x)
    ditfast.accelerate(attention)
    assert_same(attention(x=x), expected)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        attention()


class Masked(Block):
    """With a further argument, handed on in every call."""

    def forward(self, x, c, mask=None, rope=None):
        x = super().forward(x, c)
        return x if mask is None else x * mask


def test_further_arguments_that_are_none(monkeypatch):
    slow = randomised(Masked(48, 2))
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, strict=True)
    original, calls = Masked.forward, []

    def forward(self, *args, **kwargs):
        calls.append(type(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Masked, "forward", forward)
    x, c, mask = torch.randn(3, 9, 48), torch.randn(3, 48), torch.randn(3, 9, 1)
    for args, kwargs in [((x, c, None), {}), ((x,), {"mask": None, "c": c, "rope": None}), ((x, c, mask), {})]:
        assert_same(fast(*args, **kwargs), slow(*args, **kwargs))
    assert calls == [Masked, Masked, type(fast), Masked]


class Either(Block):
    """Conditioned by one of two inputs, or by both."""

    def forward(self, x, c=None, e=None):
        return super().forward(x, 2 * e if c is None else c if e is None else c + 2 * e)


class Headed(FinalLayer):
    def forward(self, x, c=None, e=None):
        return super().forward(x, -e if c is None else c)


def test_another_condition_is_not_taken_for_the_condition():
    for slow in (randomised(Either(48, 2)), randomised(Headed(48, 8))):
        fast = copy.deepcopy(slow)
        ditfast.accelerate(fast, strict=True)
        x, c = torch.randn(3, 9, 48), torch.randn(3, 48)
        for args, kwargs in [((x,), {"e": c}), ((x, None, c), {}), ((x, c), {"e": None}), ((x,), {"c": c})]:
            assert_same(fast(*args, **kwargs), slow(*args, **kwargs))


def test_a_condition_for_all_samples_reaches_the_final_layer():
    fast, slow = pair()
    oracle = copy.deepcopy(slow).double()
    x, c = torch.randn(3, 9, 48), torch.randn(1, 48)
    assert_judged(*({"out": m.final_layer(x.to(m.x_embedder.weight), c.to(m.x_embedder.weight)).detach()}
                    for m in (fast, slow, oracle)))  # fmt: skip


@pytest.mark.parametrize(("dim", "heads"), [(320, 2), (40, 2), (60, 3)], ids=["160", "20", "20 x 3"])
def test_odd_head_dims(dim, heads):
    assert_trained_alike(*pair(dim=dim, num_heads=heads, depth=1), steps=1)


@pytest.mark.kernels
def test_odd_head_dims_on_the_kernels():
    """20 runs; 160 is more than the kernels take, and demanding them raises an error."""
    assert_trained_alike_by_kernels(*pair(dim=80, num_heads=4, depth=1))
    fast, _ = pair(dim=320, depth=1)
    with ditfast.ops.use_backend("triton"), pytest.raises(RuntimeError, match="head dims of at most 128, got 160"):
        fast(*inputs())
