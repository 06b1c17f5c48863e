"""Quantised, scattered and otherwise unfit modules: which ditfast.accelerate refuses or skips, and why."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import ditfast
from ditfast.adapters import Adapter, adapter, register_adapter
from tests.adapters.conftest import assert_same
from tests.adapters.foreign_models import SMALL, Block, Mlp, Model, inputs, randomised

FC1 = "the fused forward reads an nn.Linear's weight"


class Int8Linear(nn.Module):
    """Weights as integers with one scale per row: there is no float weight to read."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias.to(x.dtype))


class Int8Weight(torch.Tensor):
    """A tensor subclass as a parameter (as torchao has): it implements linear, and little else."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=scale.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.values * weight.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of {cls.__name__}")

    @classmethod
    def of(cls, weight):
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return nn.Parameter(cls((weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)


def change(model, path, build):
    """Replaces a module of the first block."""
    parent, _, name = f"blocks.0.{path}".rpartition(".")
    setattr(model.get_submodule(parent), name, build(model.get_submodule(f"{parent}.{name}")))
    return model


def reasons(report):
    return {entry.module: entry.reason for entry in report.skipped}


def assert_same_outputs(fast, slow):
    assert_same(fast(*inputs()), slow(*inputs()))


@pytest.mark.parametrize("path", ["attn.qkv", "mlp.fc1", "adaLN_modulation.1"])
def test_linears_without_a_float_weight(path):
    """They are called as modules where the fused forward calls them, else reported; never read as floats."""
    slow = change(randomised(Model()), path, Int8Linear)
    fast = copy.deepcopy(slow)
    report = ditfast.accelerate(fast)
    assert reasons(report) == ({"blocks.0.mlp": f"fc1 is {__name__}.Int8Linear, {FC1}"} if path == "mlp.fc1" else {})
    assert_same_outputs(fast, slow)
    late = randomised(Model())
    ditfast.accelerate(late, check=False)
    assert_same_outputs(change(late, path, Int8Linear), slow)


def quantised(model, names):
    quantise = pytest.importorskip("torch.ao.quantization", reason="this torch has no torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is on its way out
        return quantise.quantize_dynamic(model, names, dtype=torch.qint8)


def test_dynamically_quantised_linears():
    kind = "torch.ao.nn.quantized.dynamic.modules.linear.Linear"
    slow = quantised(randomised(Model()).eval(), {"blocks.0.mlp.fc1", "blocks.0.attn.qkv"})
    fast = copy.deepcopy(slow)
    skipped = reasons(ditfast.accelerate(fast))
    assert set(skipped) == {"blocks.0", "blocks.0.attn", "blocks.0.mlp"}
    assert skipped["blocks.0.mlp"] == f"fc1 is {kind}, {FC1}"
    assert skipped["blocks.0.attn"].startswith("its own forward could not be checked: RuntimeError: expected scalar")
    assert_same(*(model.blocks[0](torch.ones(2, 9, 48), torch.ones(2, 48)) for model in (fast, slow)))
    everything = quantised(randomised(Model()).eval(), {nn.Linear})
    with pytest.raises(ValueError, match="nothing that ditfast can accelerate(.|\n)*no floating-point parameters"):
        ditfast.accelerate(everything)


@pytest.mark.parametrize("path", ["attn.qkv", "mlp.fc1", "adaLN_modulation.1"])
def test_weights_of_a_tensor_subclass(path):
    """They are skipped with a reason of their own. Put in later, they are not read, compiled or not."""
    slow = change(randomised(Model()), path, Int8Linear)
    parent, _, name = path.rpartition(".")

    def of_another_kind(model):
        linear = model.blocks[0].get_submodule(path)
        linear.weight = Int8Weight.of(linear.weight)
        return model

    fast = of_another_kind(randomised(Model()))
    skipped = reasons(ditfast.accelerate(fast))
    assert skipped["blocks.0"] == f"{path}.weight (Int8Weight) cannot be read: aten.abs.default of Int8Weight"
    assert_same_outputs(fast, slow)
    late = randomised(Model())
    ditfast.accelerate(late, check=False)
    assert_same_outputs(of_another_kind(late), slow)
    torch.compiler.reset()
    assert_same_outputs(torch.compile(late, backend="eager"), slow)


@pytest.mark.kernels
def test_kernels_get_no_weights_of_a_tensor_subclass():
    slow = change(randomised(Model(depth=1)), "mlp.fc1", Int8Linear)
    late = randomised(Model(depth=1))
    ditfast.accelerate(late, check=False)
    late.blocks[0].mlp.fc1.weight = Int8Weight.of(late.blocks[0].mlp.fc1.weight)
    torch.compiler.reset()
    for model in (late, torch.compile(late, backend="eager")):
        with ditfast.ops.use_backend("triton"):
            actual = model(*inputs(size=SMALL))
        assert_same(actual, slow(*inputs(size=SMALL)))


def test_parametrised_and_pruned_linears():
    for path in ("attn.qkv", "mlp.fc1", "adaLN_modulation.1"):
        slow = randomised(Model())
        parametrizations.weight_norm(slow.blocks[0].get_submodule(path))
        fast = copy.deepcopy(slow)
        skipped = reasons(ditfast.accelerate(fast))
        assert list(skipped) == (["blocks.0.mlp"] if path == "mlp.fc1" else [])
        assert_same_outputs(fast, slow)
        # pruning computes the weight in a hook
        slow, fast = randomised(Model()), randomised(Model())
        ditfast.accelerate(fast, check=False)
        for model in (slow, fast):
            prune.l1_unstructured(model.blocks[0].get_submodule(path), "weight", 0.3)
        assert_same_outputs(fast, slow)


def test_several_devices():
    model = randomised(Model())
    model.blocks[0].mlp.fc2.to("meta")
    model.blocks[1].attn.to("meta")
    skipped = reasons(ditfast.accelerate(model))
    assert set(skipped) == {"blocks.0", "blocks.0.mlp", "blocks.1", "blocks.1.attn"}
    assert set(skipped.values()) == {"it has parameters on meta: load its weights first"}


@pytest.mark.gpu
def test_cpu_and_gpu_in_one_block():
    model = randomised(Model())
    model.blocks[0].mlp.cuda()
    skipped = reasons(ditfast.accelerate(model))
    assert skipped == {"blocks.0": "its tensors are on several devices: cpu, cuda:0"}


def test_parts_that_were_accelerated_before_are_checked_by_their_own_forwards():
    """An accelerated attention has no fp64 under "triton", so the check's oracle must not use one."""
    model = randomised(Model(depth=1))
    ditfast.accelerate(model.blocks[0].attn)
    with ditfast.ops.use_backend("triton"):
        report = ditfast.accelerate(model, check=True)
    assert {entry.status for entry in report.entries} == {"accelerated", "already"}


class Helped(Block):
    """Its own forward, which runs with a further argument, calls a helper named like one of the fused forward's."""

    def _takes_nodes(self, modulation):
        return [part[:, None] for part in modulation.chunk(6, -1)]

    def forward(self, x, c, more=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self._takes_nodes(self.adaLN_modulation(c))
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x if more is None else x + more


def test_helpers_of_the_same_name():
    slow = randomised(Model(depth=1))
    slow.blocks[0] = Helped(48, 2)
    slow.blocks[0].attn.fused = True
    fast = copy.deepcopy(slow)
    skipped = reasons(ditfast.accelerate(fast))
    assert skipped == {
        "blocks.0": "it has _takes_nodes, a name that the fused forward has a use of its own for",
        "blocks.0.attn": "it has fused, a name that the fused forward has a use of its own for",
    }
    x, c = torch.randn(2, 9, 48), torch.randn(2, 48)
    assert_same(fast.blocks[0](x, c, 1.0), slow.blocks[0](x, c, 1.0))


class Hearing(Mlp):
    """An MLP for an adapter that forgets about hooks."""


class Forgetful(nn.Module):
    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.fc1.weight, self.fc1.bias), approximate="tanh"), self.fc2.weight,
                        self.fc2.bias)  # fmt: skip


class ForgetfulAdapter(Adapter):
    name, mixin = "forgetful", Forgetful

    def recognises(self, module):
        return type(module) is Hearing

    def refuses(self, module):
        return None

    def inputs(self, module, generator):
        return (torch.randn(2, 3, 16, generator=generator),)


def test_the_check_counts_calls_of_hooked_modules(monkeypatch):
    """A verdict is not reused across hooks: the first of two equal modules has none."""
    monkeypatch.setattr(adapter, "_ADAPTERS", list(adapter._ADAPTERS))
    register_adapter(ForgetfulAdapter())
    model = nn.Sequential(Hearing(16, 32), Hearing(16, 32))
    model[1].fc1.register_forward_hook(lambda *_: None)
    report = ditfast.accelerate(model)
    assert [entry.module for entry in report.accelerated] == ["0"]
    assert reasons(report) == {"1": "fc1 has hooks, which the fused forward would skip"}


def test_parts_in_torchscript_are_skipped():
    """The forward of such a part is no method of its class."""
    slow = randomised(Model(depth=1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is on its way out
        slow.blocks[0].attn = torch.jit.trace(slow.blocks[0].attn, torch.randn(3, 16, 48))
        scripted = torch.jit.script(Mlp(16, 32))
    fast = copy.deepcopy(slow)
    report = ditfast.accelerate(fast)
    assert [entry.module for entry in report.accelerated] == ["blocks.0.mlp", "final_layer"]
    assert reasons(report)["blocks.0"].startswith("it could not be checked: ")  # a trace has no other parameters
    assert_same_outputs(fast, slow)
    with pytest.raises(ValueError, match="nothing that ditfast can accelerate"):
        ditfast.accelerate(scripted)
