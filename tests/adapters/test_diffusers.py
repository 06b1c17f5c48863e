"""ditfast.accelerate on the blocks of diffusers' DiT: numbers against the untouched ones, what is refused and why."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn

import ditfast
from ditfast.adapters.swap import accelerated_by
from tests.adapters.conftest import assert_same

diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
from diffusers.models.attention import BasicTransformerBlock  # noqa: E402
from diffusers.models.attention_processor import (  # noqa: E402
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)

from tests.adapters.diffusers_models import (  # noqa: E402
    ALL,
    DEPTH,
    assert_parity,
    assert_same_in_inference,
    hook,
    lone_block,
    pair,
    put,
    run,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("same", [True, False])
def test_a_transformer(same, training):
    fast, slow = pair(same=same)
    keys = list(fast.state_dict())
    report = ditfast.accelerate(fast, strict=True)
    assert (len(report.accelerated), len(report.skipped)) == (ALL, 0), str(report)
    assert list(fast.state_dict()) == keys and repr(fast) == repr(slow)
    assert isinstance(fast, diffusers.DiTTransformer2DModel)
    assert all(isinstance(block, BasicTransformerBlock) for block in fast.transformer_blocks)
    fast.train(training), slow.train(training)
    assert_parity(fast, slow)
    assert_same_in_inference(fast, slow)
    slow.load_state_dict(fast.state_dict())
    fast.load_state_dict(slow.state_dict())
    assert ditfast.restore(fast) == ALL
    assert [type(part) for part in fast.modules()] == [type(part) for part in slow.modules()]


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_attention_processors(processor):
    fast, slow = pair()
    for model in (fast, slow):
        for block in model.transformer_blocks:
            block.attn1.set_processor(processor())
    assert len(ditfast.accelerate(fast).accelerated) == ALL
    assert_parity(fast, slow)
    for model in (fast, slow):  # fused projections, chosen after acceleration
        for block in model.transformer_blocks:
            block.attn1.fuse_projections()
            block.attn1.set_processor(FusedAttnProcessor2_0())
    assert_same_in_inference(fast, slow)


def test_a_processor_of_ones_own_is_called():
    class Halved(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) / 2

    fast, slow = pair()
    ditfast.accelerate(fast)
    before = run(fast)
    for model in (fast, slow):
        model.transformer_blocks[1].attn1.set_processor(Halved())
    assert_parity(fast, slow)
    assert not torch.allclose(run(fast), before)


@pytest.mark.kernels
def test_it_runs_the_kernels():
    fast, slow = pair(attention_head_dim=48)
    ditfast.accelerate(fast, check=False)
    with ditfast.ops.use_backend("triton"):
        assert_parity(fast, slow)
        assert_same_in_inference(fast, slow)


@pytest.mark.parametrize(
    ("overrides", "activation"),
    [
        ({"activation_fn": "gelu"}, "GELU(approximate='none')"),
        ({"activation_fn": "geglu"}, "GEGLU(approximate=None)"),
        ({"activation_fn": "linear-silu"}, "LinearActivation(approximate=None)"),
    ],
)
def test_other_activations_are_left_as_they_are_within_a_block(overrides, activation):
    fast, slow = pair(**overrides)
    report = ditfast.accelerate(fast, check=False)
    assert len(report.accelerated) == DEPTH
    assert {entry.reason for entry in report.skipped} == {
        f"its activation is {activation}, the fused one GELU(approximate='tanh')"
    }
    assert_parity(fast, slow)


def test_live_dropouts_are_honoured():
    fast, slow = pair(dropout=0.3)
    assert len(ditfast.accelerate(fast).accelerated) == ALL
    assert_parity(fast, slow)  # silent in evaluation
    fast.train(), slow.train()
    assert_same(run(fast), run(slow))
    fast.eval()
    assert not torch.allclose(run(fast), run(slow))


def test_labels_are_dropped_block_by_block_in_training():
    fast, slow = pair()
    ditfast.accelerate(fast, check=False)
    slow.train(), fast.train()
    for model in (fast, slow):
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.5
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same(run(fast), run(slow))


BLOCK = {"timestep": torch.tensor([3, 500, 999]), "class_labels": torch.tensor([0, 7, 10])}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"cross_attention_kwargs": {}},
        {"attention_mask": torch.randn(3 * 2, 9, 9)},
        {"encoder_hidden_states": torch.randn(3, 5, 72)},
        {"encoder_attention_mask": torch.randn(3, 1, 9)},
        {"cross_attention_kwargs": {"scale": 1.0}},
        {"added_cond_kwargs": {"resolution": None}},
    ],
    ids=lambda arguments: "+".join(arguments) or "plain",
)
def test_arguments_of_a_block(arguments, monkeypatch):
    """With arguments that the fused forward does not know, the block runs its own."""
    original, calls = BasicTransformerBlock.forward, []

    def forward(self, *args, **kwargs):
        calls.append(type(self))
        return original(self, *args, **kwargs)

    block = lone_block().eval()
    fast = copy.deepcopy(block)
    ditfast.accelerate(fast, strict=True, check=False)
    monkeypatch.setattr(BasicTransformerBlock, "forward", forward)
    x = torch.randn(3, 9, 72)
    arguments = {**BLOCK, **arguments}
    actual, expected = fast(x, **arguments), block(x, **arguments)
    assert_same(actual, expected)
    fused = not any(len(arguments[name]) for name in arguments if name not in BLOCK)
    assert calls == ([type(block)] if fused else [type(fast), type(block)])
    positional = [arguments.get(name) for name in list(inspect.signature(original).parameters)[2:]]
    assert_same(fast(x, *positional), expected)


def test_gligen_is_not_dropped():
    block = lone_block()
    ditfast.accelerate(block, check=False)
    with pytest.raises(AttributeError, match="fuser"):  # which the block has not
        block(torch.randn(3, 9, 72), **BLOCK, cross_attention_kwargs={"gligen": {"objs": None}})


def test_chunked_feed_forward_is_the_blocks_own():
    fast, slow = pair()
    ditfast.accelerate(fast, check=False)
    sizes = []
    for model in (fast, slow):
        model.transformer_blocks[0].set_chunk_feed_forward(4, dim=1)
        model.transformer_blocks[0].ff.register_forward_hook(lambda _, args, out: sizes.append(args[0].shape[1]))
    run(fast)
    assert sizes == [4] * 4  # 16 tokens
    assert_parity(fast, slow)


class Negated(BasicTransformerBlock):
    def forward(self, hidden_states, *args, **kwargs):
        return -super().forward(hidden_states, *args, **kwargs)


class NegatedLater(BasicTransformerBlock):
    """The same signature, but another function."""

    @functools.wraps(BasicTransformerBlock.forward)
    def forward(self, hidden_states, *args, **kwargs):
        return -super().forward(hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("overrides", "change", "reason"),
    [
        ({"cross_attention_dim": 72}, None, "it has norm2 (LayerNorm), which the fused forward does not know"),
        ({"double_self_attention": True}, None, "it has norm2 (LayerNorm), which"),
        ({}, put("", "fuser", nn.Linear(2, 2)), "it has fuser (Linear), which"),
        ({"positional_embeddings": "sinusoidal", "num_positional_embeddings": 16}, None, "it has pos_embed (Sin"),
        ({"norm_elementwise_affine": True}, None, "norm3 has parameters"),
        ({}, hook("norm1"), "norm1 has hooks"),
        ({}, hook("norm1.norm"), "norm1.norm has hooks"),
        ({}, hook("norm3"), "norm3 has hooks"),
        ({}, put("norm1", "norm", nn.LayerNorm(72)), "norm1.norm has parameters"),
        ({}, put("", "norm1", nn.LayerNorm(72)), "norm1 is LayerNorm, not diffusers' AdaLayerNormZero"),
        ({}, put("norm1", "emb", None), "norm1 has no emb"),
        ({}, put("norm1", "linear", nn.Linear(72, 360)), "norm1 must have 72 features and give 6 x 72, got 72 and 360"),
        ({}, put("norm1", "gain", nn.Linear(2, 2)), "norm1 has gain, which the fused forward does not know"),
        ({}, put("", "forward", print), "its forward was replaced on the instance"),
        ({}, put("", "__class__", Negated), "its forward takes (hidden_states, args, kwargs), not (hidden_states, att"),
        ({}, put("", "__class__", NegatedLater), "its forward is another function in inference"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_refused(overrides, change, reason):
    module = lone_block(**overrides)
    if change is not None:
        change(module)
    report = ditfast.accelerate(module)  # its feed-forward is another matter
    assert [(entry.module, entry.adapter) for entry in report.skipped] == [("", "diffusers block")]
    assert report.skipped[0].reason.startswith(reason)
    assert accelerated_by(module) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook("ff.net.0"), "its activation has hooks or another forward"),
        (hook("ff.net.0.proj"), "its Linears have hooks or another forward"),
        (hook("ff.net.1"), "net.1 (Dropout) is not a dropout that nobody listens to"),
        (put("ff.net.0.proj", "forward", lambda x: x.repeat(1, 1, 4)), "its Linears have hooks or another forward"),
        (put("ff.net.2", "__class__", type("Lora", (nn.Linear,), {})), "net.2 is Lora, the fused forward reads"),
    ],
)
def test_feed_forwards_that_somebody_changed(change, reason):
    """Before acceleration they are refused; after it they run their own forward."""
    module = lone_block()
    change(module)
    [entry] = ditfast.accelerate(module, check=False).skipped
    assert entry.module == "ff" and reason in entry.reason


HOOKED = ["norm1", "norm1.emb", "norm1.norm", "norm3", "ff", "ff.net.0", "ff.net.1", "ff.net.2", "attn1.to_q"]


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_that_come_later_are_called(path):
    fast, slow = pair()
    ditfast.accelerate(fast, check=False)
    outputs = []
    for model in (fast, slow):
        inner = model.transformer_blocks[1].get_submodule(path)
        inner.register_forward_hook(lambda *args: outputs.append(args[-1]))
    assert_same_in_inference(fast, slow)
    assert len(outputs) == 3  # the copy in fp64 as well
