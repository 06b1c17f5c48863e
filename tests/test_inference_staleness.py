"""What a schedule table and captured steps were made from has changed: the next run is the changed model's."""

import pytest
import torch
from test_inference_engine import LABELS, assert_parity, generators, models, noise
from test_inference_graphs import captures as _captures
from torch import nn

from ditfast.inference import Engine, Guidance, Sampler

GUIDANCE = Guidance(2.0)
captures = _captures


def assert_follows(change, prepare=lambda model: None, tell=lambda model: None):
    """Parity before and after a change to both models, of which ``tell`` informs the fast one."""
    fast, slow = models()
    for model in (fast, slow):
        prepare(model)
    engine = Engine(fast, Sampler("ddim", 3), GUIDANCE)
    assert_parity(engine, slow, GUIDANCE)
    before = engine(noise(), LABELS)
    for model in (fast, slow):
        change(model)
    tell(fast)
    assert_parity(engine, slow, GUIDANCE)
    assert not torch.equal(engine(noise(), LABELS), before)
    return engine


def write_data(model):
    model.t_embedder.mlp[2].bias.data.add_(1)
    model.blocks[0].adaLN_modulation[1].weight.data.mul_(2)


@pytest.mark.parametrize("tell", [lambda model: model.reset_cache(), lambda model: model.train().eval()])
def test_writes_through_data_that_were_told(tell):
    assert_follows(write_data, tell=tell)


def replace_adaln_activation(model):
    model.blocks[0].adaLN_modulation[0] = nn.GELU()


def replace_time_activation(model):
    model.t_embedder.mlp[1] = nn.GELU()


def add_hook(model):
    model.t_embedder.handle = model.t_embedder.register_forward_hook(lambda *given: 2 * given[-1])


def remove_hook(model):
    model.t_embedder.handle.remove()


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.factor = inner, 1.0

    def forward(self, *given):
        return self.factor * self.inner(*given)


def wrap(model):
    model.t_embedder = Scaled(model.t_embedder)


def rescale(model):
    model.t_embedder.factor = 2.0


@pytest.mark.parametrize("change", [replace_adaln_activation, replace_time_activation, add_hook, wrap])
def test_other_layers(change):
    assert_follows(change if change is not wrap else lambda model: (wrap(model), rescale(model)))


def test_layers_that_go_by_more_than_their_parameters():
    assert_follows(remove_hook, prepare=add_hook)
    assert_follows(rescale, prepare=wrap)


@pytest.mark.parametrize("target", ["adaLN_modulation.1", "mlp.2", "embedding_table"])
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


class LowRank(nn.Module):
    def __init__(self, linear):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = nn.Linear(linear.in_features, 4), nn.Linear(4, linear.out_features)

    def forward(self, c):
        return self.up(self.down(c))


def test_modulations_of_unknown_width_need_no_table():
    def replace(model):
        model.blocks[0].adaLN_modulation[1] = LowRank(model.blocks[0].adaLN_modulation[1])

    assert assert_follows(replace).table is None


def test_autocast_that_ended():
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 3), GUIDANCE)
    with torch.autocast("cpu", torch.bfloat16):
        engine(noise(), LABELS)
    assert_parity(engine, slow, GUIDANCE)


def test_timesteps_between_integers():
    fast, slow = models()
    whole, between = Sampler("ddim", 3), Sampler("ddim", 3)
    whole.timesteps, between.timesteps = torch.tensor([999, 499, 0]), torch.tensor([999.0, 499.9, 0.9])
    engine = Engine(fast, whole)
    engine(noise(), LABELS)
    engine.sampler = between
    assert_parity(engine, slow, None)


def test_labels_of_a_tensor():
    fast, _ = models()
    engine = Engine(fast, Sampler("ddpm", 3), GUIDANCE)
    expected = engine(noise(), LABELS, generators())
    assert torch.equal(engine(noise(), torch.tensor(LABELS), generators()), expected)


def test_captured_in_inference_mode_and_replayed_outside(captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 3), GUIDANCE)
    with torch.inference_mode():
        engine(noise(), LABELS)
    assert_parity(engine, slow, GUIDANCE)
    assert captures == [3]


def test_other_codebases_are_not_captured(captures):
    fast, slow = models()
    wrap(fast)
    engine = Engine(fast, Sampler("ddim", 3), GUIDANCE)
    assert_parity(engine, slow, GUIDANCE)
    assert captures == [] and engine.graphs.unavailable().startswith("layers of other codebases")
