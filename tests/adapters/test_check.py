"""The check of ditfast.accelerate: what it compares, and that it has no side effects."""

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


def test_hooks_are_called_in_real_calls_only():
    """The check calls no hooks, and fusing skips none, whether it came before or after them."""
    slow = randomised(Model(depth=1))
    fast = copy.deepcopy(slow)
    called = []

    def listen(*paths):
        for model in (fast, slow):
            for path in paths:
                part = model.blocks[0].get_submodule(path)
                part.register_forward_hook(lambda *_, path=path: called.append(path))

    listen("", "attn", "mlp.act", "attn.attn_drop")
    report = ditfast.accelerate(fast)
    assert not called
    assert {entry.module: entry.reason for entry in report.skipped} == {
        "blocks.0.attn": "attn_drop has hooks, which the fused forward would skip",
        "blocks.0.mlp": "act has hooks, which the fused forward would skip",
    }
    for listened in ([], ["mlp.drop2"]):
        listen(*listened)
        for model in (fast, slow):
            called.append(model)
            model(*inputs())
        middle = called.index(slow)
        # SDPA does not call the dropout module
        assert called[1:middle] == called[middle + 1 :] == ["attn", "mlp.act", *listened, ""]
        called.clear()
    for path in ("mlp.act", "mlp.drop1", "adaLN_modulation.1"):
        fast = slow = randomised(Model(depth=1))
        ditfast.accelerate(fast)
        listen(path)
        called.clear()
        fast(*inputs())
        assert called == [path] * 2  # it was registered twice


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
    """By the contents of an object that is no plain value itself."""

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
def test_blocks_differ_by_the_contents_of_their_settings(settings):
    model = Model()
    model.blocks = nn.ModuleList(map(Scaled, settings))
    report = ditfast.accelerate(randomised(model))
    assert [entry.module for entry in report.skipped] == ["blocks.1"]


def test_equal_settings_share_a_verdict(monkeypatch):
    """Every block has an object of its own; equal contents are checked once."""
    model = Model(depth=3)
    model.blocks = nn.ModuleList(Scaled(Config("once")) for _ in range(3))
    disagreement, compared = accelerate_module.disagreement, []
    monkeypatch.setattr(accelerate_module, "disagreement", lambda m, a: compared.append(m) or disagreement(m, a))
    ditfast.accelerate(randomised(model), strict=True)
    assert [type(module) for module in compared].count(type(model.blocks[0])) == 1


@pytest.mark.parametrize("activations", [(torch.sigmoid, torch.relu), (F.silu, F.relu)])
def test_blocks_differ_by_their_settings(activations):
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


def test_inputs_of_an_adapter_may_be_keywords_and_integers(monkeypatch):
    monkeypatch.setattr(adapter, "_ADAPTERS", list(adapter._ADAPTERS))
    register_adapter(LookedAdapter())
    assert ditfast.accelerate(Looked()).accelerated
    monkeypatch.setattr(FastLooked, "forward", lambda self, x, *, at: self.table[at - 1] * x)
    with pytest.raises(ValueError, match="its forward is another function"):
        ditfast.accelerate(Looked())
    monkeypatch.setattr(LookedAdapter, "inputs", lambda *_: None)  # nothing to compare
    assert ditfast.accelerate(Looked()).accelerated


def test_parameters_in_a_dtype_for_storage():
    """As layerwise casting leaves them: torch cannot check whether they are finite."""
    model = randomised(Model(depth=1))
    model.blocks[0].mlp.fc1.to(torch.float8_e4m3fn)
    reasons = {entry.module: entry.reason for entry in ditfast.accelerate(model).skipped}
    stored = "is stored as float8_e4m3fn, in which nothing is computed"
    assert reasons == {"blocks.0": f"mlp.fc1.weight {stored}", "blocks.0.mlp": f"fc1.weight {stored}"}


# --- what only some calls show


class NoGradient(Block):
    """Returns the same numbers, but gives its condition no gradient."""

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
    """Keeps none of its activations, as U-ViT's blocks do on request."""

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
    """Keeps its input to be looked at."""

    def forward(self, x):
        self.last_input = x
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
    """Why a module is skipped; its results stay the same, also under ``calls``."""
    slow = Model()
    slow.set_submodule(path, module)
    fast = copy.deepcopy(randomised(slow))
    (entry,) = ditfast.accelerate(fast).skipped
    assert entry.module == path
    arguments = (torch.randn(3, 9, 48), torch.randn(3, 48))[: 1 if path.endswith("attn") else 2]
    results = []
    for model in (fast, slow):
        x = arguments[0].clone().requires_grad_()
        with calls():
            results.append(model.get_submodule(path)(x, *arguments[1:]))
    assert_same(*results)
    return entry.reason


@pytest.mark.parametrize(
    ("path", "kind"), [("blocks.0", NoGradient), ("blocks.0", LessGradient), ("blocks.0.attn", Frozen)]
)
def test_wrong_gradients(path, kind):
    assert reason_for(path, kind(48, 2)).startswith(
        "its gradients are another function's: the fused one is off by"
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("path", "kind", "part"),
    [("blocks.1", Saving, "adaLN_modulation"), ("blocks.1.attn", SavingAttention, "qkv")],
)
def test_parts_that_checkpoint_themselves(path, kind, part, reentrant):
    """Fused, they would keep the activations that checkpointing drops."""
    reason = reason_for(path, kind(48, 2, reentrant), torch.enable_grad)
    assert (
        reason
        == f"its own forward computes {part} again in the backward (checkpointing), the fused one does not"
    )


@pytest.mark.quick
def test_a_block_that_writes_into_its_input():
    assert (
        reason_for("blocks.0", InPlace(48, 2))
        == "its own forward writes into its input, the fused one does not"
    )


@pytest.mark.parametrize(
    ("path", "kind", "name"), [("blocks.0", Remembering, "calls"), ("blocks.0.attn", Visualised, "last_input")]
)
def test_parts_that_store_a_tensor_of_a_call(path, kind, name):
    assert reason_for(path, kind(48, 2)) == f"its own forward writes {name}, the fused one does not"


@pytest.mark.parametrize(("path", "kind"), [("blocks.0", Exact), ("blocks.0.attn", ExactAttention)])
def test_parts_that_disable_autocast(path, kind):
    reason = reason_for(path, kind(48, 2), lambda: torch.autocast("cpu", torch.bfloat16))
    assert reason.startswith("its own forward keeps autocast out on cpu (test_check.py:")


# --- where accelerate is called


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_any_default_device(device):
    model = randomised(Model())
    with torch.device(device):
        ditfast.accelerate(model, strict=True)


@pytest.mark.parametrize("created_inside", [False, True])
def test_in_inference_mode(created_inside):
    slow = randomised(Model())
    with torch.inference_mode():
        fast = randomised(Model()) if created_inside else copy.deepcopy(slow)
        ditfast.accelerate(fast, strict=True)
        assert_same(fast(*inputs()), slow(*inputs()))
    ditfast.restore(fast)
    ditfast.accelerate(fast, strict=True)


def test_random_states_are_untouched(monkeypatch):
    """torch.manual_seed seeds every GPU: all ranks would continue with the same noise."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model, state = randomised(Model()), torch.get_rng_state()
    ditfast.accelerate(model)
    assert not seeded and torch.equal(torch.get_rng_state(), state)
