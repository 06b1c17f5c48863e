"""ditfast.accelerate: what is matched, what is refused and why; only the modules' classes change."""

import copy
import pickle
import re
import threading

import pytest
import torch
from torch import nn

import ditfast
from ditfast.adapters import Adapter, register_adapter
from ditfast.adapters import accelerate as accelerate_module
from ditfast.adapters import adapter as adapter_module
from ditfast.adapters.swap import accelerated_by
from ditfast.parity import judge
from tests.adapters.conftest import assert_same
from tests.adapters.foreign_models import SMALL, Attention, Block, DropPath, Model, inputs, randomised

ALL = 7  # two blocks with attention and MLP, a final layer


def pair(**block):
    slow = randomised(Model(**block))
    return copy.deepcopy(slow), slow


def assert_parity(fast, slow, arguments=None):
    """Outputs and every gradient, by the rule for models."""
    arguments = arguments or inputs()
    oracle = copy.deepcopy(slow).double()
    exact = oracle(arguments[0].double(), *arguments[1:])
    outputs = [model(*arguments) for model in (fast, slow)]
    incoming = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = [
        torch.autograd.grad(out, [p for p in model.parameters() if p.requires_grad], incoming.to(out.dtype))
        for out, model in zip((*outputs, exact), (fast, slow, oracle), strict=True)
    ]
    for actual, yardstick, true in [(*outputs, exact), *zip(*gradients, strict=True)]:
        verdict = judge("model", actual.detach(), yardstick.detach(), true.detach(), torch.float32)
        assert verdict.ok, verdict


@pytest.mark.parametrize(
    "block",
    [pytest.param({}, marks=pytest.mark.quick), {"fused_attn": False}, {"qkv_bias": False}, {"eps": 1e-3}],
    ids=str,
)
def test_a_model_in_the_official_style(block):
    fast, slow = pair(**block)
    keys = list(fast.state_dict())
    report = ditfast.accelerate(fast)
    assert (len(report.accelerated), len(report.skipped)) == (ALL, 0), str(report)
    assert list(fast.state_dict()) == keys
    assert all(isinstance(fast_block, Block) for fast_block in fast.blocks)
    assert repr(fast) == repr(slow)
    assert_parity(fast, slow)
    slow.load_state_dict(fast.state_dict())
    fast.load_state_dict(slow.state_dict())


@pytest.mark.kernels
def test_it_runs_the_kernels():
    """In Triton's interpreter, training and inference, where a block's halves are one node each."""
    fast, slow = pair(dim=96, depth=1)  # gradients of enough elements to be judged one by one
    ditfast.accelerate(fast)
    with ditfast.ops.use_backend("triton"):
        out = fast(*inputs(3, size=SMALL))
        names = set()
        stack = [out.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in names:
                names.add(node)
                stack += [parent for parent, _ in node.next_functions]
        assert {"_NormAttentionBackward", "_NormMlpBackward"} <= {type(node).__name__ for node in names}
        assert_parity(fast, slow, inputs(4, size=SMALL))


@pytest.mark.parametrize(
    ("block", "module", "reason"),
    [
        ({"qk_norm": True}, "blocks.0.attn", "q_norm is LayerNorm: normalised queries and keys are no longer packed"),
        ({"act": nn.GELU()}, "blocks.1.mlp", "its activation is GELU(approximate='none'), the fused one"),
        ({"act": nn.SiLU()}, "blocks.1.mlp", "its activation is SiLU(), the fused one"),
    ],
)
def test_what_is_left_as_it_is_within_a_block(block, module, reason):
    """The block around it is fused nevertheless, and calls it as a module."""
    fast, slow = pair(**block)
    report = ditfast.accelerate(fast)
    assert len(report.accelerated) == ALL - 2
    [entry] = [entry for entry in report.skipped if entry.module == module]
    assert entry.reason.startswith(reason)
    assert module in str(report) and reason in str(report)
    assert_parity(fast, slow)


class RmsNorm(nn.Module):
    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class BiasedAttention(Attention):
    """With a relative-position bias of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias_table = nn.Parameter(torch.zeros(16, 16))

    def forward(self, x):
        return super().forward(x, self.bias_table)


class OtherOrder(Block):
    """The same names and shapes, but another function."""

    def forward(self, x, c):
        scale1, shift1, gate1, scale2, shift2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None])
        return x + gate2[:, None] * self.mlp(self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None])


def changed(change):
    model = randomised(Model(depth=1))
    change(model)
    return model


def replace_class(kind):
    def change(model):
        model.blocks[0].__class__ = kind

    return change


def set_child(path, value):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, value)

    return change


def poison(model):
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "module", "reason"),
    [
        (set_child("blocks.0.norm1", RmsNorm()), "blocks.0", "norm1 is RmsNorm, not torch's LayerNorm"),
        (set_child("blocks.0.norm2", nn.LayerNorm(48)), "blocks.0", "norm2 has parameters"),
        (set_child("blocks.0.attn", BiasedAttention(48, 2)), "blocks.0.attn", "it has bias_table, which the fused"),
        (set_child("blocks.0.scale", nn.Linear(2, 2)), "blocks.0", r"it has scale \(Linear\), which the fused"),
        (
            set_child("blocks.0.adaLN_modulation", nn.Sequential(nn.SiLU(), nn.Linear(48, 48 * 4))),
            "blocks.0",
            "adaLN_modulation must give 6 x 48 features, got 192",
        ),
        (replace_class(OtherOrder), "blocks.0", "its forward is another function in inference"),
        (
            lambda model: model.blocks[0].norm1.register_forward_hook(lambda *_: None),
            "blocks.0",
            "norm1 has hooks, which the fused forward would skip",
        ),
        (
            lambda model: setattr(model.blocks[0], "forward", model.blocks[0].forward),
            "blocks.0",
            "its forward was replaced on the instance",
        ),
        (lambda model: model.blocks.to("meta"), "blocks.0", "it has parameters on meta: load its weights first"),
        (lambda model: model.blocks[0].mlp.to("meta"), "blocks.0", "it has parameters on meta"),
        (poison, "blocks.0.mlp", "fc1.weight holds values that are not finite"),
        (set_child("blocks.0.attn.num_heads", 7), "blocks.0.attn", "qkv must give three equal parts of 7 heads"),
    ],
)
def test_what_is_refused(change, module, reason):
    model = changed(change)
    types = {path: type(part) for path, part in model.named_modules()}
    with pytest.raises(ValueError, match="strict=True, and .* were skipped"):
        ditfast.accelerate(model, strict=True)
    assert {path: type(part) for path, part in model.named_modules()} == types
    report = ditfast.accelerate(model)
    [entry] = [entry for entry in report.skipped if entry.module == module]
    assert re.match(reason, entry.reason), entry.reason
    assert accelerated_by(model.get_submodule(module)) is None
    assert types[module] is type(model.get_submodule(module))


@pytest.mark.quick
def test_without_the_check_only_the_structure_is_compared():
    model = changed(replace_class(OtherOrder))
    assert "blocks.0" in {entry.module for entry in ditfast.accelerate(model, check=False).accelerated}


def test_a_fresh_model_is_checked_with_open_gates():
    """adaLN-Zero starts as the identity, whatever its blocks compute."""
    model = Model(depth=1)
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    model.blocks[0].__class__ = OtherOrder
    before = copy.deepcopy(model.state_dict())
    assert "another function" in next(e.reason for e in ditfast.accelerate(model).skipped if e.module == "blocks.0")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropouts_and_drop_paths_are_honoured():
    fast, slow = pair(attn_drop=0.3, proj_drop=0.2, drop_path=DropPath(0.4))
    report = ditfast.accelerate(fast)
    assert len(report.accelerated) == ALL, str(report)
    for mode in (True, False):
        fast.train(mode), slow.train(mode)
        outputs = []
        for model in (fast, slow):
            torch.manual_seed(0)
            outputs.append(model(*inputs()))
        assert_same(*outputs)


@pytest.mark.quick
def test_arguments_that_the_fused_forward_does_not_know():
    attention = randomised(Attention(48, 2))
    slow = copy.deepcopy(attention)
    ditfast.accelerate(attention)
    x, mask = torch.randn(2, 9, 48), torch.randn(9, 9)
    assert_same(attention(x), slow(x))
    assert_same(attention(x, attn_mask=mask), slow(x, mask))
    assert_same(attention(x, mask), slow(x, mask))


@pytest.mark.quick
def test_copies_and_pickles_stay_accelerated():
    fast, slow = pair()
    ditfast.accelerate(fast)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert [type(part) for part in copied.modules()] == [type(part) for part in fast.modules()]
        assert_same(copied(*inputs()), fast(*inputs()))
        assert ditfast.restore(copied) == ALL or copied.blocks is fast.blocks
        assert_same(copied(*inputs()), slow(*inputs()))
        ditfast.accelerate(fast)
    assert len(ditfast.accelerate(fast).accelerated) == ALL


class Locked(Block):
    """Defines its own __reduce__."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.lock = threading.Lock()

    def __reduce__(self):
        return Locked, (48, 2), {key: value for key, value in vars(self).items() if key != "lock"}


def test_a_block_with_its_own_reduce():
    block = randomised(Locked(48, 2))
    ditfast.accelerate(block, strict=True)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert accelerated_by(copied) == accelerated_by(block) and copied.lock is not block.lock
        assert_same(copied(torch.ones(2, 3, 48), torch.ones(2, 48)), block(torch.ones(2, 3, 48), torch.ones(2, 48)))
        assert ditfast.restore(copied) == 3 and type(copied) is Locked


@pytest.mark.quick
def test_twice_and_back():
    fast, slow = pair()
    types = [type(part) for part in fast.modules()]
    assert {entry.status for entry in ditfast.accelerate(fast).entries} == {"accelerated"}
    assert {entry.status for entry in ditfast.accelerate(fast).entries} == {"already"}
    assert ditfast.restore(fast) == ALL and ditfast.restore(fast) == 0
    assert [type(part) for part in fast.modules()] == types
    with ditfast.accelerated(fast) as inside:
        assert inside is fast and accelerated_by(fast.blocks[0])
    assert [type(part) for part in fast.modules()] == types
    ditfast.accelerate(fast.blocks[0])
    with pytest.raises(RuntimeError, match="inside"), ditfast.accelerated(fast):
        raise RuntimeError("inside")
    assert accelerated_by(fast.blocks[0]) and not accelerated_by(fast.blocks[1])  # as before the with


def test_two_models_do_not_influence_each_other():
    fast, slow = pair()
    ditfast.accelerate(fast)
    assert not any(accelerated_by(part) for part in slow.modules())
    with ditfast.accelerated(slow):
        pass
    assert accelerated_by(fast.blocks[0]) and type(slow.blocks[0]) is Block


@pytest.mark.parametrize("after", [False, True])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(after, monkeypatch):
    model = randomised(Model())
    types = [type(part) for part in model.modules()]
    swap, calls = accelerate_module.swap, []

    def failing(module, mixin):
        calls.append(module)
        if len(calls) == 4 and not after:
            raise KeyboardInterrupt
        swap(module, mixin)
        if len(calls) == 4:
            raise KeyboardInterrupt  # a hook may come at any moment

    monkeypatch.setattr(accelerate_module, "swap", failing)
    with pytest.raises(KeyboardInterrupt):
        ditfast.accelerate(model, check=False)
    assert len(calls) == 4 and [type(part) for part in model.modules()] == types


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("a path", TypeError, "model must be a torch.nn.Module, got str"),
        (nn.Linear(2, 2), ValueError, r"model \(Linear\) has nothing that ditfast can accelerate"),
        (Model().to("meta"), ValueError, "has nothing that ditfast can accelerate:.*on meta"),
        (ditfast.DiT(ditfast.DiTConfig(depth=1, hidden_size=48, num_heads=2)), ValueError, "is ditfast's own"),
    ],
)
def test_nothing_to_accelerate(model, error, message):
    with pytest.raises(error) as raised:
        ditfast.accelerate(model)
    assert re.search(message, str(raised.value), re.DOTALL)


def test_the_reference_is_a_model_in_the_official_style():
    config = ditfast.DiTConfig(depth=2, hidden_size=48, num_heads=2, latent_size=(8, 8), num_classes=10)
    slow = randomised(ditfast.reference.DiT(config))
    fast = copy.deepcopy(slow)
    report = ditfast.accelerate(fast)
    assert "official final layer" in {entry.adapter for entry in report.accelerated}
    assert_parity(fast, slow)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return 2 * x * self.weight


class FastTwice(nn.Module):
    def forward(self, x):
        return x * self.weight + x * self.weight


class TwiceAdapter(Adapter):
    name, mixin = "twice", FastTwice

    def recognises(self, module):
        return type(module) is Twice

    def refuses(self, module):
        return None

    def inputs(self, module, generator):
        return (torch.randn(2, 3, generator=generator),)


def test_an_adapter_of_ones_own(monkeypatch):
    monkeypatch.setattr(adapter_module, "_ADAPTERS", list(adapter_module._ADAPTERS))
    with pytest.raises(ValueError, match="nothing that ditfast can accelerate"):
        ditfast.accelerate(Twice())
    register_adapter(TwiceAdapter())
    model = Twice()
    assert [entry.adapter for entry in ditfast.accelerate(model).accelerated] == ["twice"]
    assert isinstance(model, FastTwice) and torch.equal(model(torch.ones(3)), torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="an adapter named 'twice' is registered already"):
        register_adapter(TwiceAdapter())
    with pytest.raises(TypeError, match="adapter must be a ditfast.adapters.Adapter, got ABCMeta"):
        register_adapter(TwiceAdapter)


@pytest.mark.parametrize("level", ["block", "model"])
def test_an_adapter_that_names_a_level(level, monkeypatch):
    monkeypatch.setattr(adapter_module, "_ADAPTERS", list(adapter_module._ADAPTERS))
    monkeypatch.setattr(TwiceAdapter, "level", level, raising=False)
    if level == "model":
        with pytest.raises(ValueError, match="adapter.level is 'model': no levels any more"):
            register_adapter(TwiceAdapter())
    else:
        register_adapter(TwiceAdapter())
        assert ditfast.accelerate(Twice()).accelerated


@pytest.mark.parametrize("function", ["accelerate", "accelerated"])
def test_removed_arguments(function):
    model = Model(depth=1)

    def call(**arguments):
        result = getattr(ditfast, function)(model, **arguments)
        if function == "accelerated":
            result.__enter__()

    with pytest.raises(TypeError, match=f"^{function} takes no level any more: .*leave it out$"):
        call(level="model")
    with pytest.raises(TypeError, match=rf"^{function}\(\) got an unexpected keyword argument 'levels'$"):
        call(levels=2)
    assert not any(map(accelerated_by, model.modules()))
