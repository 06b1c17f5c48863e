"""diffusers' caches and layer skipping, which look blocks up by class, on an accelerated model with new classes."""

import copy
import sys

import pytest
import torch

import ditfast
from ditfast.parity import relative_error

diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
from diffusers import hooks  # noqa: E402
from diffusers.models.attention import BasicTransformerBlock  # noqa: E402
from diffusers.models.cache_utils import CacheMixin  # noqa: E402

from tests.adapters.diffusers_models import transformer  # noqa: E402

REGISTER = "diffusers.hooks._helpers"
STEPS = 6


def trajectory(model):
    """Every output of a few steps; the later ones read a cache."""
    x, outputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), []
    with torch.no_grad():
        for step in range(STEPS):
            with CacheMixin.cache_context(model, "steps"):
                conditions = {"timestep": torch.tensor([900 - 5 * step] * 2), "class_labels": torch.tensor([1, 7])}
                outputs.append(model(x, **conditions, return_dict=False)[0])
            x = x - 0.05 * outputs[-1][:, :4]
    return torch.stack(outputs)


APPLIED = {
    "first block": lambda model: hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=0.5)),
    "mag": lambda model: hooks.apply_mag_cache(
        model,
        hooks.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), threshold=0.5),
    ),
    "attention broadcast": lambda model: hooks.apply_pyramid_attention_broadcast(
        model,
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
    ),
    "taylor": lambda model: hooks.apply_taylorseer_cache(
        model,
        hooks.TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            cache_identifiers=[r"transformer_blocks\.\d+\.ff"],
            taylor_factors_dtype=torch.float32,
        ),
    ),
    "blocks skipped": lambda model: hooks.apply_layer_skip(
        model, hooks.LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    ),
    "feed-forwards skipped": lambda model: hooks.apply_layer_skip(
        model,
        hooks.LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=False, skip_ff=True),
    ),
}


@pytest.mark.parametrize("name", APPLIED)
def test_after_accelerate(name):
    slow = transformer(num_layers=3, num_embeds_ada_norm=10)
    fast, uncached = copy.deepcopy(slow), trajectory(copy.deepcopy(slow))
    ditfast.accelerate(fast, check=False)
    for model in (slow, fast):
        APPLIED[name](model)
    expected = trajectory(slow)
    assert relative_error(expected, uncached.double()) > 1e-3  # or nothing was cached
    assert relative_error(trajectory(fast), expected.double()) <= 1e-5


class OwnBlock(BasicTransformerBlock):
    pass


def test_classes_that_are_registered(monkeypatch):
    """A user's block registered before; diffusers' blocks where the register is not yet imported."""
    module = sys.modules[REGISTER]
    model = transformer(num_embeds_ada_norm=10)
    registered = module.TransformerBlockMetadata(return_hidden_states_index=3)
    monkeypatch.setattr(module.TransformerBlockRegistry, "_registry", {})
    module.TransformerBlockRegistry.register(OwnBlock, registered)
    model.transformer_blocks[0].__class__ = OwnBlock
    ditfast.accelerate(model, check=False)
    metadata = module.TransformerBlockRegistry.get(type(model.transformer_blocks[0]))
    assert metadata.return_hidden_states_index == 3 and registered._cls is OwnBlock is not metadata._cls

    monkeypatch.setattr(hooks, "_helpers", module)  # and put back
    monkeypatch.delitem(sys.modules, REGISTER)
    ditfast.restore(model)
    ditfast.accelerate(model, check=False)
    assert sys.modules[REGISTER].TransformerBlockRegistry.get(type(model.transformer_blocks[1]))
