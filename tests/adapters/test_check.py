"""What the check of ditfast.accelerate looks at, and that nobody else notices it."""

import copy
import enum
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ditfast
from ditfast.adapters import Adapter, adapter, register_adapter
from ditfast.adapters import accelerate as accelerate_module
from tests.adapters.conftest import assert_same
from tests.adapters.foreign_models import Attention, Block, Model, inputs, randomised


def test_who_listens_hears_what_is_real():
    """Hooks hear nothing of the check, and are not skipped by what was fused before or after they came."""
    slow = randomised(Model(depth=1))
    fast = copy.deepcopy(slow)
    heard = []

    def listen(*paths):
        for model in (fast, slow):
            for path in paths:
                part = model.blocks[0].get_submodule(path)
                part.register_forward_hook(lambda *_, path=path: heard.append(path))

    listen("", "attn", "mlp.act", "attn.attn_drop")
    report = ditfast.accelerate(fast)
    assert not heard
    assert {entry.module: entry.reason for entry in report.skipped} == {
        "blocks.0.attn": "attn_drop has hooks, which the fused forward would skip",
        "blocks.0.mlp": "act has hooks, which the fused forward would skip",
    }
    for listened in ([], ["mlp.drop2"]):
        listen(*listened)
        for model in (fast, slow):
            heard.append(model)
            model(*inputs())
        middle = heard.index(slow)
        # SDPA runs without its dropout module
        assert heard[1:middle] == heard[middle + 1 :] == ["attn", "mlp.act", *listened, ""]
        heard.clear()
    for path in ("mlp.act", "mlp.drop1", "adaLN_modulation.1"):
        fast = slow = randomised(Model(depth=1))
        ditfast.accelerate(fast)
        listen(path)
        heard.clear()
        fast(*inputs())
        assert heard == [path] * 2  # it listened twice


class Configured(Block):
    """With settings that are no plain values."""

    def __init__(self, activation):
        super().__init__(48, 2)
        self.setting, self.activation = ([1, 2], {3: 4}), activation

    def forward(self, x, c):
        return x + self.activation(x) if self.activation in (torch.relu, F.relu) else super().forward(x, c)


class Factor(enum.Enum):
    ONE = "once"
    TWO = "twice"


@dataclass
class Config:
    value: str


class Scaled(Block):
    """By what an object holds that is no plain value itself."""

    def __init__(self, setting):
        super().__init__(48, 2)
        self.setting = setting

    def forward(self, x, c):
        (setting,) = self.setting if isinstance(self.setting, list) else [self.setting]
        out = super().forward(x, c)
        return out if setting.value == "once" else 2 * out


@pytest.mark.parametrize(
    "settings",
    [tuple(Factor), (Config("once"), Config("twice")), ([Config("once")], [Config("twice")])],
    ids=["enum", "dataclass", "nested"],
)
def test_blocks_are_told_apart_by_what_their_settings_hold(settings):
    model = Model()
    model.blocks = nn.ModuleList(map(Scaled, settings))
    report = ditfast.accelerate(randomised(model))
    assert [entry.module for entry in report.skipped] == ["blocks.1"]


def test_settings_that_say_the_same_share_a_verdict(monkeypatch):
    """Every block has an object of its own: they are checked once for all that."""
    model = Model(depth=3)
    model.blocks = nn.ModuleList(Scaled(Config("once")) for _ in range(3))
    real, asked = accelerate_module.disagreement, []
    monkeypatch.setattr(accelerate_module, "disagreement", lambda m, a: asked.append(m) or real(m, a))
    ditfast.accelerate(randomised(model), strict=True)
    assert [type(module) for module in asked].count(type(model.blocks[0])) == 1


@pytest.mark.parametrize("activations", [(torch.sigmoid, torch.relu), (F.silu, F.relu)])
def test_blocks_are_told_apart_by_their_settings(activations):
    model = Model()
    model.blocks = nn.ModuleList(map(Configured, activations))
    report = ditfast.accelerate(randomised(model))
    assert [entry.module for entry in report.skipped] == ["blocks.1"]
    activation = activations[1].__name__
    assert report.skipped[0].reason.startswith(
        f"its own forward computes {activation} (test_check.py:"
    )


class Looked(nn.Module):
    """A table that is no parameter, read at whole numbers, from a keyword argument."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(5, 3))

    def forward(self, x, *, at):
        return x * self.table[at]


class FastLooked(nn.Module):
    def forward(self, x, *, at):
        return self.table[at] * x


class LookedAdapter(Adapter):
    name, mixin = "looked", FastLooked

    def recognises(self, module):
        return type(module) is Looked

    def refuses(self, module):
        return None

    def inputs(self, module, generator):
        return torch.randn(2, 3, generator=generator), {"at": torch.tensor([4, 0])}


def test_an_adapters_inputs_may_be_named_and_whole(monkeypatch):
    monkeypatch.setattr(adapter, "_ADAPTERS", list(adapter._ADAPTERS))
    register_adapter(LookedAdapter())
    assert ditfast.accelerate(Looked()).accelerated
    monkeypatch.setattr(FastLooked, "forward", lambda self, x, *, at: self.table[at - 1] * x)
    with pytest.raises(ValueError, match="its forward is another function"):
        ditfast.accelerate(Looked())
    monkeypatch.setattr(LookedAdapter, "inputs", lambda *_: None)  # nothing to compare
    assert ditfast.accelerate(Looked()).accelerated


def test_parameters_in_a_dtype_for_storage():
    """As layerwise casting leaves them: torch cannot even tell whether they are finite."""
    model = randomised(Model(depth=1))
    model.blocks[0].mlp.fc1.to(torch.float8_e4m3fn)
    reasons = {entry.module: entry.reason for entry in ditfast.accelerate(model).skipped}
    stored = "is stored as float8_e4m3fn, in which nothing is computed"
    assert reasons == {"blocks.0": f"mlp.fc1.weight {stored}", "blocks.0.mlp": f"fc1.weight {stored}"}


# --- what only some calls show


class NoGradient(Block):
    """The same numbers; its condition learns nothing."""

    def forward(self, x, c):
        return super().forward(x, c.detach())


class LessGradient(Block):
    def forward(self, x, c):
        out = super().forward(x, c)
        return out.detach() + 0.5 * (out - out.detach())


class Frozen(Attention):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Saving(Block):
    """Keeps none of its activations, as U-ViT's blocks do where they are told to."""

    def __init__(self, dim, num_heads, reentrant):
        super().__init__(dim, num_heads)
        self.reentrant = reentrant

    def forward(self, x, c):
        return checkpoint(super().forward, x, c, use_reentrant=self.reentrant)


class SavingAttention(Attention):
    def __init__(self, dim, num_heads, reentrant):
        super().__init__(dim, num_heads)
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class InPlace(Block):
    def forward(self, x, c):
        return x.copy_(super().forward(x, c))


class Remembering(Block):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.calls = []

    def forward(self, x, c):
        self.calls.append(c)
        return super().forward(x, c)


class Visualised(Attention):
    """Somebody looks at what it has seen."""

    def forward(self, x):
        self.seen = x
        return super().forward(x)


class Exact(Block):
    """In fp32 whatever the autocast."""

    def forward(self, x, c):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x, c)


class ExactAttention(Attention):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.qkv.weight.dtype))


def reason_for(path, module, calls=torch.no_grad):
    """Why a module is skipped; it is then what it was, also in such calls."""
    slow = Model()
    slow.set_submodule(path, module)
    fast = copy.deepcopy(randomised(slow))
    (entry,) = ditfast.accelerate(fast).skipped
    assert entry.module == path
    given = (torch.randn(3, 9, 48), torch.randn(3, 48))[: 1 if path.endswith("attn") else 2]
    results = []
    for model in (fast, slow):
        x = given[0].clone().requires_grad_()
        with calls():
            results.append(model.get_submodule(path)(x, *given[1:]))
    assert_same(*results)
    return entry.reason


@pytest.mark.parametrize(
    ("path", "kind"), [("blocks.0", NoGradient), ("blocks.0", LessGradient), ("blocks.0.attn", Frozen)]
)
def test_gradients_that_are_another_functions(path, kind):
    assert reason_for(path, kind(48, 2)).startswith(
        "its gradients are another function's: the fused one is off by"
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("path", "kind", "part"),
    [("blocks.1", Saving, "adaLN_modulation"), ("blocks.1.attn", SavingAttention, "qkv")],
)
def test_parts_that_checkpoint_themselves(path, kind, part, reentrant):
    """Fused they would keep the activations that they are told not to keep."""
    found = reason_for(path, kind(48, 2, reentrant), torch.enable_grad)
    assert (
        found
        == f"its own forward computes {part} again in the backward (checkpointing), the fused one does not"
    )


@pytest.mark.quick
def test_a_block_that_writes_into_its_input():
    assert (
        reason_for("blocks.0", InPlace(48, 2))
        == "its own forward writes into its input, the fused one does not"
    )


@pytest.mark.parametrize(
    ("path", "kind", "name"), [("blocks.0", Remembering, "calls"), ("blocks.0.attn", Visualised, "seen")]
)
def test_parts_that_keep_something_of_a_call(path, kind, name):
    assert reason_for(path, kind(48, 2)) == f"its own forward writes {name}, the fused one does not"


@pytest.mark.parametrize(("path", "kind"), [("blocks.0", Exact), ("blocks.0.attn", ExactAttention)])
def test_parts_that_autocast_is_kept_from(path, kind):
    found = reason_for(path, kind(48, 2), lambda: torch.autocast("cpu", torch.bfloat16))
    assert found.startswith("its own forward keeps autocast out on cpu (test_check.py:")


# --- where accelerate is called


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_whatever_the_default_device(device):
    model = randomised(Model())
    with torch.device(device):
        ditfast.accelerate(model, strict=True)


@pytest.mark.parametrize("made", [False, True])
def test_in_inference_mode(made):
    slow = randomised(Model())
    with torch.inference_mode():
        fast = randomised(Model()) if made else copy.deepcopy(slow)
        ditfast.accelerate(fast, strict=True)
        assert_same(fast(*inputs()), slow(*inputs()))
    ditfast.restore(fast)
    ditfast.accelerate(fast, strict=True)


def test_nobodys_random_numbers_are_drawn(monkeypatch):
    """torch.manual_seed seeds every GPU: ranks would go on with the same noise."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model, state = randomised(Model()), torch.get_rng_state()
    ditfast.accelerate(model)
    assert not seeded and torch.equal(torch.get_rng_state(), state)
