"""Blocks without gradients, launched one after the other without a call of each: when, and with what numbers."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ditfast import DiT, ops
from ditfast.model import dit
from ditfast.parity import judge
from ditfast.testing.inputs import random_batch, randomize_
from tests.kernels.conftest import watch
from tests.model.conftest import TINY, assert_parity, pair

CONFIG = replace(TINY, latent_size=(4, 6), depth=3)
pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def kernels_on():
    with ops.use_backend("triton"):
        yield


@pytest.fixture
def inferred(monkeypatch):
    """Of each call without gradients, whether its blocks were launched one after the other."""
    taken, original = [], dit.infer_blocks

    def noting(*arguments):
        result = original(*arguments)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(dit, "infer_blocks", noting)
    return taken


@pytest.mark.quick
@pytest.mark.parametrize("batch", [1, 3])
def test_the_models_rule(batch, inferred, monkeypatch):
    from ditfast.kernels import adaln, attention

    fast, slow = pair(CONFIG)
    launches = watch(monkeypatch, adaln.AdaLNForward, attention.AttentionForward)
    for _ in range(2):  # plans made, and kept
        launches.clear()
        with torch.no_grad():
            fast(*random_batch(CONFIG, batch))
        assert launches == ["AdaLNForward", "AttentionForward", "AdaLNForward"] * CONFIG.depth + ["AdaLNForward"]
    assert_parity(fast, slow, random_batch(CONFIG, batch))
    with torch.inference_mode():
        fast(*random_batch(CONFIG, batch))
    assert inferred == [True] * 4


def wider_mlp(model):
    block = model.blocks[1]
    block.mlp.fc1, block.mlp.fc2 = nn.Linear(72, 160), nn.Linear(160, 72)


def other_heads(model):
    attn = model.blocks[1].attn
    attn.num_heads, attn.head_dim = 3, 24


def other_eps(model):
    model.blocks[2].norm1.eps, model.blocks[1].norm2.eps = 0.1, 0.2


def without_bias(model):
    model.blocks[1].attn.qkv.bias = None
    model.blocks[2].mlp.fc1.bias = None


def larger(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


def other_layout(model):
    """Equal but for how a weight lies."""
    fc1, fc2 = model.blocks[1].mlp.fc1, model.blocks[2].mlp.fc2
    fc1.weight = nn.Parameter((fc1.weight.detach() * 2).t().contiguous().t())
    fc2.weight = nn.Parameter(torch.cat([fc2.weight.detach() * 2, torch.ones(72, 3)], 1)[:, :-3])
    fc1.bias = nn.Parameter(fc1.bias.detach()[:1].expand(len(fc1.bias)))


@pytest.mark.parametrize(
    "change",
    [wider_mlp, other_heads, other_eps, without_bias, larger, other_layout],
)
def test_blocks_that_differ(change, inferred):
    """Also where plans of the model as it was are kept."""
    fast, slow = pair(CONFIG)
    inputs = random_batch(CONFIG, 2)
    with torch.no_grad():
        before = fast(*inputs)
    for model in (fast, slow):
        torch.manual_seed(3)
        change(model)
    with torch.no_grad():
        assert not torch.allclose(fast(*inputs), before)
    assert_parity(fast, slow, inputs)
    assert all(inferred)


def test_what_is_no_parameter():
    fast, slow = pair(CONFIG)
    linear = fast.blocks[1].attn.qkv
    bias = linear.bias.detach() * 2
    del linear.bias
    linear.register_buffer("bias", bias)
    vars(fast.blocks[2].mlp.fc1)["weight"] = fast.blocks[2].mlp.fc1.weight.detach() * 2
    with torch.no_grad():  # the same as parameters
        slow.blocks[1].attn.qkv.bias.mul_(2)
        slow.blocks[2].mlp.fc1.weight.mul_(2)
    assert_parity(fast, slow, random_batch(CONFIG, 2))


def assert_inferred(fast, slow, inputs, dtype, context=nullcontext):
    exact = copy.deepcopy(slow).double()(inputs[0].double(), *inputs[1:])
    with torch.no_grad(), context():
        verdict = judge("model", fast(*inputs), slow(*inputs), exact, dtype)
    assert verdict.ok, verdict


def test_dtypes_that_change(inferred):
    fast, slow = pair(CONFIG)
    x, t, y = random_batch(CONFIG, 2)
    for dtype in (torch.float32, torch.float16):
        assert_inferred(fast.to(dtype), copy.deepcopy(slow).to(dtype), (x.to(dtype), t, y), dtype)
    fast.float().blocks[1].mlp.fc1.half()  # as by its operators: an error, not other numbers
    with torch.no_grad(), pytest.raises(TypeError, match=r"weight must have x's dtype|w1 must have x's dtype"):
        fast(x, t, y)


def test_a_bias_that_does_not_fit():
    fast, _ = pair(CONFIG)
    inputs = random_batch(CONFIG, 2)
    with torch.no_grad():
        fast(*inputs)
        fast.blocks[1].mlp.fc1.bias = nn.Parameter(torch.zeros(1))
        with pytest.raises(ValueError, match="bias must have shape"):
            fast(*inputs)


def called(model):
    """Notes by a hook on a block, which must be called as a module."""
    seen = []
    model.blocks[1].register_forward_hook(lambda *_: seen.append(True))
    return seen


def subclassed(model):
    kind = type(model.blocks[1])
    seen = []

    class Other(kind):
        def forward(self, *args, **kwargs):
            seen.append(True)
            return super().forward(*args, **kwargs)

    model.blocks[1].__class__ = Other
    return seen


def replaced_forward(model):
    seen, original = [], model.blocks[1].forward
    model.blocks[1].forward = lambda *args: seen.append(True) or original(*args)
    return seen


def compiled(model):
    seen = []
    model.blocks[1].compile(backend=lambda graph, _: seen.append(True) or graph.forward)
    return seen


def hooked_linear(model):
    seen = []
    model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda *_: seen.append(True))
    return seen


def wrapped_linear(model):
    seen = []

    class Wrapped(nn.Linear):
        def forward(self, x):
            seen.append(True)
            return super().forward(x)

    model.blocks[1].attn.proj.__class__ = Wrapped
    return seen


def other_attention(model):
    seen = []

    class Other(type(model.blocks[1].attn)):
        def forward(self, x):
            seen.append(True)
            return super().forward(x)

    model.blocks[1].attn.__class__ = Other
    return seen


def compiled_mlp(model):
    seen = []
    model.blocks[1].mlp.compile(backend=lambda graph, _: seen.append(True) or graph.forward)
    return seen


def wrapped_blocks(model):
    seen = []

    class Noting(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.block, name)

        def forward(self, *args):
            seen.append(True)
            return self.block(*args)

    model.blocks[1] = Noting(model.blocks[1])
    model.blocks[2] = checkpoint_wrapper(model.blocks[2])
    return seen


LISTENERS = [
    *(called, subclassed, replaced_forward, compiled, hooked_linear, wrapped_linear),
    *(other_attention, compiled_mlp, wrapped_blocks),
]


@pytest.mark.parametrize("listen", LISTENERS)
def test_blocks_that_are_called(listen, inferred):
    fast, slow = pair(CONFIG)
    seen = listen(fast)
    inputs = random_batch(CONFIG, 2)
    with torch.no_grad():
        fast(*inputs)
    assert seen and not inferred
    assert_parity(fast, slow, inputs)


def test_hooks_around_every_module(inferred):
    fast, _ = pair(CONFIG)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with torch.no_grad():
            fast(*random_batch(CONFIG, 2))
    finally:
        handle.remove()
    assert seen.count("FusedAdaLNZeroBlock") == CONFIG.depth and seen.count("Linear") > 4 * CONFIG.depth
    assert not inferred


def test_a_patched_class(inferred, monkeypatch):
    fast, slow = pair(CONFIG)
    seen, kind = [], type(fast.blocks[0].mlp)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: seen.append(True) or original(self, x))
    with torch.no_grad():
        fast(*random_batch(CONFIG, 2))
    assert len(seen) == CONFIG.depth and not inferred
    assert_parity(fast, slow, random_batch(CONFIG, 2))


def test_blocks_in_a_list():
    fast, slow = pair(CONFIG)
    blocks = [*fast.blocks]
    del fast.blocks
    fast.blocks = blocks
    assert_parity(fast, slow, random_batch(CONFIG, 2))


def test_autocast_and_other_designs(inferred):
    fast, slow = pair(CONFIG)
    inputs = random_batch(CONFIG, 2)
    assert_inferred(fast, slow, inputs, torch.float16, lambda: torch.autocast("cpu", torch.float16))
    assert inferred == [False]
    other, reference = pair(replace(CONFIG, conditioning="adaln"))
    assert_parity(other, reference, inputs)
    assert inferred == [False]


def test_a_library_attends(inferred, monkeypatch):
    """A head dim that the libraries take, without a demand for the kernels."""
    monkeypatch.setattr("ditfast.ops.inference.attention_backend", lambda *_, **__: "sdpa")
    fast, slow = pair(replace(CONFIG, hidden_size=64, num_heads=1))
    assert_parity(fast, slow, random_batch(CONFIG, 2))
    assert inferred == [True]


def test_weights_of_a_replica(inferred):
    """As DataParallel makes them: tensors in the place of parameters."""
    fast, _ = pair(CONFIG)
    replica = randomize_(DiT(CONFIG)).eval()
    replica.load_state_dict(fast.state_dict())
    for module in replica.modules():
        for name, parameter in [*module._parameters.items()]:
            del module._parameters[name]
            setattr(module, name, None if parameter is None else parameter.detach())
    inputs = random_batch(CONFIG, 2)
    with torch.no_grad():
        assert torch.equal(replica(*inputs), fast(*inputs))
    assert inferred == [True, True]
