"""An engine sees what changed since its last call; between calls it keeps captured steps only."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import ditfast
from ditfast.inference import Engine, Guidance, Sampler
from ditfast.inference.engine import NotFinite
from tests.inference.test_engine import (
    LABELS,
    assert_parity,
    loaded,
    models,
    noise,
    replaced,
    stepped,
    written,
)
from tests.inference.test_graphs import captures as _captures
from tests.inference.test_graphs import wrap

captures = _captures


def assert_follows(change, prepare=lambda model: None):
    """Parity after a change to both models that changes the latents."""
    fast, slow = models()
    for model in (fast, slow):
        prepare(model)
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    before = engine(noise(), LABELS)
    for model in (fast, slow):
        change(model)
    assert_parity(engine, slow, engine.guidance, dtype=fast.dtype)
    assert not torch.equal(engine(noise(), LABELS), before)


def assigned(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()}, assign=True)


def written_as_data(model):
    model.t_embedder.mlp[2].bias.data.add_(1)
    model.blocks[0].adaLN_modulation[1].weight.data.mul_(2)


def relabelled(model):
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[3] += 1


def swapped(model):
    torch.utils.swap_tensors(*(block.adaLN_modulation[1].weight for block in model.blocks[:2]))


def moved(model):
    model.to(torch.bfloat16)


@pytest.mark.quick
@pytest.mark.parametrize(
    "change", [loaded, assigned, written, written_as_data, relabelled, stepped, replaced, swapped, moved]
)
def test_changed_weights(change):
    assert_follows(change)


def replace_activations(model):
    model.blocks[0].adaLN_modulation[0] = model.t_embedder.mlp[1] = nn.GELU()


def rescale(model):
    model.t_embedder.factor = 2.0


class LowRank(nn.Module):
    def __init__(self, linear):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = nn.Linear(linear.in_features, 4), nn.Linear(4, linear.out_features)

    def forward(self, c):
        return self.up(self.down(c))


def lower_rank(model):
    """A modulation of unknown width turns the table off."""
    model.blocks[0].adaLN_modulation[1] = LowRank(model.blocks[0].adaLN_modulation[1])


def test_changed_layers():
    assert_follows(replace_activations)
    assert_follows(rescale, prepare=wrap)
    assert_follows(lower_rank)


@pytest.mark.parametrize("target", ["adaLN_modulation.1", "embedding_table"])
def test_adapters_that_are_switched_off(target, captures):
    peft = pytest.importorskip("peft", reason="needs the package peft")

    def adapt(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        model.eval()

    def switch_off(model):
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.enable_adapters(False)

    assert_follows(switch_off, prepare=adapt)
    assert captures == []


def test_earlier_runs_do_not_matter():
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    x, t, y = noise(), torch.full((3,), 500), torch.tensor(LABELS)
    with torch.no_grad():
        doubled = {name: 2 * value for name, value in fast.state_dict().items()}
        torch.func.functional_call(fast, doubled, (x, t, y))
        torch.func.grad(lambda x: fast(x, t, y).sum())(x)
        with torch.autocast("cpu", torch.bfloat16):
            engine(x, LABELS)
    assert_parity(engine, slow, engine.guidance)


def test_a_table_is_freed_with_its_call(captures, monkeypatch):
    fast, _ = models()
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    tables, modulation = [], ditfast.DiT.modulation

    def recorded(model, t, y):
        table = modulation(model, t, y)
        tables.append(StorageWeakRef(table.untyped_storage()))
        return table

    monkeypatch.setattr(ditfast.DiT, "modulation", recorded)
    alive = []
    engine(noise(), LABELS, on_step=lambda _: alive.append(not tables[-1].expired()))
    assert alive == [True] * 3 and [table.expired() for table in tables] == [True]
    with torch.no_grad():
        fast.y_embedder.embedding_table.weight[0] = torch.nan
    with pytest.raises(NotFinite) as stopped:
        engine(noise(), LABELS)
    # while the traceback holds the call's frames
    assert stopped.tb is not None and [table.expired() for table in tables] == [True] * 2
    assert captures == [3]
