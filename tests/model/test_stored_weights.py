"""Weights stored in another dtype than they are computed in: quantised, cast layer by layer, without a dtype."""

import copy

import pytest
import torch
from torch import nn

import ditfast
from ditfast.inference import Engine, Guidance, Sampler, ScheduleTable
from ditfast.inference.table import takes_table
from ditfast.parity import relative_error
from ditfast.reference import dit
from ditfast.testing.inputs import random_batch, randomize_
from tests.adapters import foreign_models
from tests.model.conftest import inference, pair

CONFIG = ditfast.DiTConfig(depth=2, hidden_size=64, num_heads=4, latent_size=8, num_classes=10)
LAYERS = (nn.Linear, nn.Conv2d)
PARTS = (dit.PatchEmbed, dit.TimestepEmbedder, dit.Attention, dit.Mlp, dit.FinalLayer)


class Uint8Linear(nn.Linear):
    """As in 4-bit and 8-bit libraries: uint8 codes in one dimension; it computes in its input's dtype."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.scale = linear.weight.detach().abs().amax() / 127
        codes = (linear.weight.detach() / self.scale).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        weight = (self.weight.view(self.out_features, -1).to(x.dtype) - 128) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


class Int8Weight(torch.Tensor):
    """As in torchao: a tensor that reports the dtype it is computed in, and stores another."""

    @staticmethod
    def __new__(cls, codes, scale):
        shape, dtype = codes.shape, scale.dtype
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, requires_grad=False)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        return function(*(x.codes * x.scale if isinstance(x, cls) else x for x in args), **(kwargs or {}))


def with_int8_weight(linear):
    scale = linear.weight.detach().abs().amax() / 127
    codes = (linear.weight.detach() / scale).round().to(torch.int8)
    linear.weight = nn.Parameter(Int8Weight(codes, scale), requires_grad=False)
    return linear


class Wrapper(nn.Module):
    """Of a layer, without a weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def replaced(model, kinds, by):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in kinds:
                setattr(module, name, by(child))
    return model


def cast_by_layer(storage, compute, kinds=LAYERS):
    """By torch's own hooks."""

    def apply(model):
        for layer in model.to(compute).modules():
            if isinstance(layer, kinds):
                layer.to(storage)
                layer.register_forward_pre_hook(lambda layer, args: layer.to(compute) and None)
                layer.register_forward_hook(lambda layer, args, output: layer.to(storage) and None)
        return model

    return apply


def by_diffusers(storage, compute):
    def apply(model):
        hooks = pytest.importorskip("diffusers.hooks", reason="needs the package diffusers")
        hooks.apply_layerwise_casting(model.to(compute), storage, compute)
        return model

    return apply


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


CHANGES = {
    "dynamic": (dynamic, torch.float32),
    "uint8": (lambda model: replaced(model, (nn.Linear,), Uint8Linear), torch.float32),
    "uint8 bf16": (lambda model: replaced(model.bfloat16(), (nn.Linear,), Uint8Linear), torch.bfloat16),
    "tensor subclass": (lambda model: replaced(model, (nn.Linear,), with_int8_weight), torch.float32),
    "wrappers": (lambda model: replaced(model.bfloat16(), LAYERS, Wrapper), torch.bfloat16),
    "bf16 to fp32": (cast_by_layer(torch.bfloat16, torch.float32), torch.float32),
    "bf16 to fp32 by parts": (cast_by_layer(torch.bfloat16, torch.float32, PARTS), torch.float32),
    "fp8 to bf16": (cast_by_layer(torch.float8_e4m3fn, torch.bfloat16), torch.bfloat16),
    "diffusers, bf16 to fp32": (by_diffusers(torch.bfloat16, torch.float32), torch.float32),
    "diffusers, fp8 to bf16": (by_diffusers(torch.float8_e4m3fn, torch.bfloat16), torch.bfloat16),
}


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.tensor([3, 500, 999]), torch.tensor([1, 10, 7])


def changed(change, conditioning="adaln_zero"):
    """(fast, reference, the same before the change, the dtype to compute in)."""
    apply, dtype = CHANGES[change]
    fast, slow = pair(ditfast.DiTConfig(**{**vars(CONFIG), "conditioning": conditioning}))
    return apply(fast), apply(copy.deepcopy(slow)), slow, dtype


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
def test_weights_in_a_storage_dtype(change, conditioning):
    fast, slow, exact, dtype = changed(change, conditioning)
    actual, expected = inference(fast, inputs()), inference(slow, inputs())
    assert fast.dtype == actual.dtype == expected.dtype == dtype
    assert relative_error(actual, expected.double()) <= 20 * torch.finfo(dtype).eps
    # fp8 keeps 4 bits of a weight, the others 8
    assert relative_error(expected, inference(exact, inputs()).double()) < 0.2


@pytest.mark.kernels
@pytest.mark.parametrize("change", ["uint8 bf16", "bf16 to fp32"])
def test_by_the_kernels(change):
    fast, slow, _, dtype = changed(change)
    with ditfast.ops.use_backend("triton"):
        actual = inference(fast, inputs())
    assert relative_error(actual, inference(slow, inputs()).double()) <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("change", ["dynamic", "uint8", "bf16 to fp32"])
def test_sampled_with_a_table(change):
    fast, slow, _, _ = changed(change)
    assert takes_table(fast) == (change != "dynamic")  # which scales by the whole batch
    noise, guidance = torch.randn(2, 4, 8, 8), Guidance(2.0)
    actual, expected = (Engine(model, Sampler("ddim", 3), guidance)(noise, [1, 7]) for model in (fast, slow))
    assert relative_error(actual, expected.double()) <= 1e-4


@pytest.mark.parametrize("change", ["dynamic", "uint8", "tensor subclass", "bf16 to fp32"])
def test_accelerated(change):
    apply, slow = CHANGES[change][0], foreign_models.randomised(foreign_models.Model()).eval()
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, check=False)
    fast, slow, inputs = apply(fast), apply(slow), foreign_models.inputs()
    assert relative_error(inference(fast, inputs), inference(slow, inputs).double()) <= 1e-5


def test_a_tables_size_is_that_of_what_it_holds():
    fast, _, _, _ = changed("uint8")
    plain, _ = pair(CONFIG)
    sizes = [ScheduleTable(model, torch.tensor([3, 9]), [1, 2], 64).mib for model in (fast, plain)]
    assert sizes[0] == sizes[1]


def subclassed(embedder):
    class Own(type(embedder)):
        def forward(self, t):
            return super().forward(t)

    embedder.__class__ = Own


def patched(embedder):
    forward = embedder.forward
    embedder.forward = lambda t: forward(t)


def hooked(embedder):
    def hook(module, args):
        (t,) = args

    embedder.register_forward_pre_hook(hook)


@pytest.mark.parametrize("change", [subclassed, patched, hooked])
@pytest.mark.parametrize("kind", [ditfast.DiT, ditfast.reference.DiT])
def test_embedders_of_ones_own_are_given_the_timesteps_alone(change, kind):
    model = randomize_(kind(CONFIG)).eval()
    inputs = random_batch(CONFIG, 2)
    expected = model(*inputs)
    change(model.t_embedder)
    assert torch.equal(model(*inputs), expected)


def test_an_embedder_called_alone():
    embedder = ditfast.DiT(CONFIG).bfloat16().t_embedder
    t = torch.tensor([3, 7])
    expected = embedder(t)
    embedder.mlp[0].register_forward_pre_hook(lambda module, args: None)
    assert torch.equal(embedder(t), expected)
