"""The engine's captured steps, rehearsed without a GPU: a stand-in replays the captured function on its buffers.

What a capture fixes (the function, Python values in it, addresses) is fixed here too, so whatever a replay would miss
is missed by these tests' graphs.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ditfast.inference import Engine, Guidance, Sampler, graphs
from ditfast.parity import relative_error
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


class Recorded:
    def __init__(self, function, buffers, output):
        self.function, self.buffers, self.output = function, buffers, output

    def replay(self):
        with torch.inference_mode(False), torch.no_grad():  # as it was captured
            new = self.function(*self.buffers)
        for old, value in zip(tree_leaves(self.output), tree_leaves(new), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(value)


@pytest.fixture
def captures(monkeypatch):
    """The batch sizes of the captures, as they come."""
    batches = []

    def capture(function, inputs, device):
        batches.append(len(inputs[0]) if inputs else 0)
        buffers = tuple(value.clone() for value in inputs)
        output = function(*buffers)
        return graphs._Captured(Recorded(function, buffers, output), buffers, output)

    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    return batches


@pytest.mark.quick
@pytest.mark.parametrize("design", ["adaln_zero", "in_context"])
def test_a_step_is_captured_once(design, captures):
    fast, slow = models(conditioning=design)
    engine = Engine(fast, Sampler("ddpm", 5), Guidance(3.0))
    for labels in (LABELS, [1, 1, 4]):
        assert_parity(engine, slow, engine.guidance, labels)
    assert captures == [3] and len(engine.graphs) == 1


def test_steps_with_and_without_guidance(captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 6), Guidance(4.0, interval=(200.0, 700.0)))
    assert_parity(engine, slow, engine.guidance)
    assert captures == [3, 3]  # a batch of 2N and one of N


def test_a_changed_scale_is_read(captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 6), Guidance(4.0, power=2.0))  # another in every step
    assert_parity(engine, slow, engine.guidance)
    assert captures == [3]
    changed = [Guidance(1.5), Guidance(9.0, power=1.0), Guidance(1.5, channels="all"), Guidance(1.5, rescale=0.5), None]
    for guidance, captured in zip(changed, (1, 1, 2, 3, 4), strict=True):
        engine.guidance = guidance
        assert_parity(engine, slow, guidance)
        assert len(captures) == captured  # only where something else than the scale has changed


def test_the_cache_is_bounded(captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 2), Guidance(2.0))
    for count in (1, 2, 3, 4, 5, 1, 5):
        assert_parity(engine, slow, engine.guidance, [3] * count)
        assert len(engine.graphs) <= 4
    assert captures == [1, 2, 3, 4, 5, 1]


@pytest.mark.parametrize("change", [loaded, written, stepped])
def test_weights_written_in_place_need_no_capture(change, captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    engine(noise(), LABELS)
    for model in (fast, slow):
        change(model)
    assert_parity(engine, slow, engine.guidance)
    assert captures == [3]


def test_moved_weights_need_a_capture(captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    engine(noise(), LABELS)
    for model in (fast, slow):
        replaced(model)
        linear = model.blocks[0].mlp.fc1
        linear.weight = torch.nn.Parameter(linear.weight.detach() * 1.5)
    assert_parity(engine, slow, engine.guidance)
    assert captures == [3, 3] and len(engine.graphs) == 1
    for model in (fast, slow):
        weight = model.blocks[0].attn.proj.weight
        weight.data = weight.data.t()  # where it was, in another layout
    assert_parity(engine, slow, engine.guidance)
    assert captures == [3, 3, 3]


def test_a_model_with_hooks_is_called(captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    engine(noise(), LABELS)
    called = []
    fast.blocks[0].register_forward_hook(lambda *_: called.append(1))
    assert_parity(engine, slow, engine.guidance)
    assert captures == [3] and len(called) == 3 and len(engine.graphs) == 0
    assert engine.graphs.unavailable() == "the model has hooks, which a replay would not call"


def test_the_output_outlives_the_next_replay(captures):
    fast, _ = models()
    engine = Engine(fast, Sampler("ddim", 2), graphs=True)
    run = engine.graphs.run
    assert engine.graphs.look()
    first = run("key", lambda x: 2 * x, torch.ones(2))
    second = run("key", lambda x: 3 * x, torch.full((2,), 5.0))  # the captured function runs, not this one
    third = run("key", lambda x: 4 * x, torch.full((2,), 6.0))
    assert first.tolist() == [2, 2] and second.tolist() == [10, 10] and third.tolist() == [12, 12]


def test_autocast_is_not_captured(captures):
    fast, _ = models()
    engine = Engine(fast, Sampler("ddim", 2), Guidance(2.0))
    with torch.autocast("cpu", torch.bfloat16):
        engine(noise(), LABELS)
        assert engine.graphs.unavailable().startswith("autocast keeps casts of the weights")
    assert captures == []


def test_captured_in_inference_mode_and_replayed_outside(captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    with torch.inference_mode():
        engine(noise(), LABELS)
    assert_parity(engine, slow, engine.guidance)
    assert captures == [3]


class Scaled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.factor = inner, 1.0

    def forward(self, *arguments):
        return self.factor * self.inner(*arguments)


def wrap(model):
    model.t_embedder = Scaled(model.t_embedder)


def test_other_codebases_are_not_captured(captures):
    fast, slow = models()
    wrap(fast)
    engine = Engine(fast, Sampler("ddim", 3), Guidance(2.0))
    assert_parity(engine, slow, engine.guidance)
    assert captures == [] and engine.graphs.unavailable().startswith("layers of other codebases")


def changed_epsilon(model):
    model.blocks[0].norm1.eps = 0.5


def without_a_gelu(model):
    model.t_embedder.mlp[1] = torch.nn.Identity()


@pytest.mark.parametrize("change", [changed_epsilon, without_a_gelu])
def test_a_layer_without_weights_that_changes_is_seen(change, captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 2), Guidance(2.0), table_mib=0)
    assert_parity(engine, slow, engine.guidance)
    for model in (fast, slow):
        change(model)
    assert_parity(engine, slow, engine.guidance)
    assert captures == [3, 3]


def test_the_precision_switch_is_part_of_a_capture(captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 2), Guidance(2.0))
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            assert_parity(engine, slow, engine.guidance)
    finally:
        torch.set_float32_matmul_precision(before)
    assert captures == [3, 3]


def test_nothing_is_captured_within_a_transform(captures):
    fast, slow = models()
    engine = Engine(fast, Sampler("ddim", 2), Guidance(2.0))
    start = noise()
    derivative, _ = torch.func.jvp(lambda x: engine(x, LABELS), (start,), (start,))
    assert captures == []
    assert_parity(engine, slow, engine.guidance)
    assert captures == [3] and relative_error(derivative, engine(start, LABELS)) < 1e-5  # another path of attention
