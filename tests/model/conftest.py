"""Shared by the tests of the fast model: a small pair with the same random weights, and the model rule on outputs."""

import copy

import torch

from ditfast import DiT, DiTConfig, reference
from ditfast.parity import judge
from ditfast.testing.inputs import randomize_

TINY = DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=(8, 12), num_classes=10)


def pair(config: DiTConfig = TINY, seed: int = 0) -> tuple[DiT, reference.DiT]:
    """A fast model and the reference with the same random weights, in eval mode."""
    slow = randomize_(reference.DiT(config), seed).eval()
    fast = DiT(config).eval()
    fast.load_state_dict(slow.state_dict())
    return fast, slow


def inference(model, inputs):
    with torch.no_grad():
        return model(*inputs)


def assert_parity(fast, slow, inputs):
    x, t, y = inputs
    oracle = copy.deepcopy(slow).double()(x.double(), t, y)
    for out in (inference(fast, inputs), fast(*inputs)):
        verdict = judge("model", out, slow(*inputs), oracle, torch.float32)
        assert verdict.ok, verdict
