"""What the check of ditfast.accelerate looks at, and that nobody else notices it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign_models import Block, Model, inputs, randomised
from torch import nn

import ditfast
from ditfast.adapters import Adapter, _adapter, register_adapter


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


@pytest.mark.parametrize("activations", [(torch.sigmoid, torch.relu), (F.silu, F.relu)])
def test_blocks_are_told_apart_by_their_settings(activations):
    model = Model()
    model.blocks = nn.ModuleList(map(Configured, activations))
    report = ditfast.accelerate(randomised(model))
    assert [entry.module for entry in report.skipped] == ["blocks.1"]
    assert "another function" in report.skipped[0].reason


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
    monkeypatch.setattr(_adapter, "_ADAPTERS", list(_adapter._ADAPTERS))
    register_adapter(LookedAdapter())
    assert ditfast.accelerate(Looked()).accelerated
    monkeypatch.setattr(FastLooked, "forward", lambda self, x, *, at: self.table[at - 1] * x)
    with pytest.raises(ValueError, match="its forward is another function"):
        ditfast.accelerate(Looked())


def test_parameters_in_a_dtype_for_storage():
    """As layerwise casting leaves them: torch cannot even tell whether they are finite."""
    model = randomised(Model(depth=1))
    model.blocks[0].mlp.fc1.to(torch.float8_e4m3fn)
    reasons = {entry.module: entry.reason for entry in ditfast.accelerate(model).skipped}
    stored = "is stored as float8_e4m3fn, in which nothing is computed"
    assert reasons == {"blocks.0": f"mlp.fc1.weight {stored}", "blocks.0.mlp": f"fc1.weight {stored}"}
