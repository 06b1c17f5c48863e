"""ditfast.accelerate on timm's own Attention, Mlp, DropPath and vision transformers, beside the untouched."""

import copy

import pytest
import torch
from torch import nn

import ditfast
from ditfast.adapters.swap import accelerated_by
from ditfast.model.blocks import GeluMlp, PackedAttention
from tests.adapters.conftest import (
    ALL,
    KERNELS,
    assert_judged,
    assert_same,
    assert_trained_alike,
    assert_trained_alike_by_kernels,
    pair,
)
from tests.adapters.foreign_models import inputs, randomised
from tests.adapters.timm_parts import timm

layers = timm.layers
WIDTH, HEADS = 48, 2


def attention(fused=True, kind=layers.Attention, **options):
    module = kind(options.pop("dim", WIDTH), HEADS, **options)
    module.fused_attn = fused
    return module


def mlp(act_layer=layers.GELUTanh, **options):
    return layers.Mlp(WIDTH, 4 * WIDTH, act_layer=act_layer, **options)


def tanh_gelu():
    return nn.GELU(approximate="tanh")


def from_timm(drop_path=0.0, dim=WIDTH, act_layer=tanh_gelu, **options):
    """A change to a model: its blocks get timm's parts, as the official release builds them."""

    def change(model):
        for block in model.blocks:
            block.attn = attention(dim=dim, **{"qkv_bias": True, **options})
            block.mlp = layers.Mlp(dim, 4 * dim, act_layer=act_layer, drop=0)
            block.drop_path = layers.DropPath(drop_path)
        randomised(model)

    return change


def results(module, x, **options):
    """Output and every gradient of a lone module."""
    x = x.to(next(module.parameters())).requires_grad_()
    out = module(x, **options)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    names = [f"gradient of {name}" for name in ("x", *(name for name, _ in module.named_parameters()))]
    gradients = torch.autograd.grad(out, [x, *module.parameters()], incoming)
    return {"output": out.detach(), **dict(zip(names, gradients, strict=True))}


def assert_judged_alone(fast, slow, x, **options):
    models = (fast, slow, copy.deepcopy(slow).double())
    assert_judged(*(results(module, x, **options) for module in models), join=True)


def assert_alike(fast, slow, x=None):
    """By the rule, in training and in evaluation; x (3, 9, 48)."""
    x = torch.randn(3, 9, WIDTH) if x is None else x
    for training in (True, False):
        assert_judged_alone(fast.train(training), slow.train(training), x)


def fused_calls(monkeypatch):
    """The modules that run a fused forward from here on, by name."""
    calls = []
    for kind in (PackedAttention, GeluMlp):
        original = kind.fused

        def fused(self, x, original=original):
            calls.append(accelerated_by(self)[1].__name__)
            return original(self, x)

        monkeypatch.setattr(kind, "fused", fused)
    return calls


# --- attention

MATCHED = [
    {},
    {"qkv_bias": True},
    {"fused": False},
    {"proj_bias": False},
    {"attn_drop": 0.3, "proj_drop": 0.2},  # alike in evaluation; below in training
    {"attn_head_dim": 16, "dim_out": 56},
]


@pytest.mark.parametrize("options", MATCHED, ids=str)
def test_attention(options, monkeypatch):
    slow = randomised(attention(**options))
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, strict=True)
    calls = fused_calls(monkeypatch)
    x = torch.randn(3, 9, WIDTH)
    if "attn_drop" in options:
        computed = []
        for module in (fast.train(), slow.train()):
            torch.manual_seed(0)
            computed.append(results(module, x))
        assert not calls
        for name in computed[0]:
            assert_same(computed[0][name], computed[1][name])
        assert_judged_alone(fast.eval(), slow.eval(), x)
    else:
        assert_alike(fast, slow, x)
    assert calls and set(calls) == {"Attention"}


MASKS = [{"attn_mask": None, "is_causal": False}, {"attn_mask": "float"}, {"attn_mask": "bool"}, {"is_causal": True}]


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_masks(fused, options, monkeypatch):
    """As timm's blocks pass them: without a mask the fused forward runs, else timm's own."""
    slow = randomised(attention(fused=fused))
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, strict=True)
    calls = fused_calls(monkeypatch)
    kind = options.get("attn_mask")
    masks = {None: None, "bool": torch.ones(9, 9).tril().bool(), "float": torch.randn(9, 9)}
    x, computed = torch.randn(3, 9, WIDTH), []
    for module in (fast, slow, copy.deepcopy(slow).double()):
        mask = masks[kind].to(next(module.parameters())) if kind == "float" else masks[kind]
        computed.append(results(module, x, **{**options, "attn_mask": mask}))
    assert_judged(*computed, join=True)
    assert bool(calls) == (kind is None and not options["is_causal"])


UNKNOWN = "which the fused forward does not know"
PACKED = "normalised queries and keys are no longer packed"
REFUSED = [
    ({"qk_norm": True, "norm_layer": nn.LayerNorm}, f"q_norm is LayerNorm: {PACKED}"),
    ({"qk_norm": True, "norm_layer": layers.RmsNorm}, f"q_norm is RmsNorm: {PACKED}"),
    ({"scale_norm": True, "norm_layer": nn.LayerNorm}, f"it has norm (LayerNorm), {UNKNOWN}"),
    ({"gated": True}, f"it has gate (Linear), {UNKNOWN}"),
    ({"kind": layers.DiffAttention}, f"it has lambda_q1, {UNKNOWN}"),
    ({"kind": layers.AttentionRope}, "its forward takes rope: rotated queries and keys are no longer packed"),
    ({"kind": layers.Attention2d}, "qkv (Conv2d) does not tell its in_features and out_features"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_attention_of_another_kind_is_left_as_it_is(options, reason):
    module = nn.Sequential(attention(**options), mlp())
    before = type(module[0])
    [entry] = ditfast.accelerate(module).skipped
    assert (entry.module, entry.adapter, entry.reason) == ("0", "timm attention", reason)
    assert type(module[0]) is before


# --- mlp


@pytest.mark.parametrize(
    "options",
    [{}, {"act_layer": tanh_gelu}, {"bias": False}, {"bias": (True, False)}, {"out_features": 40}],
    ids=["GELUTanh", "nn.GELU", "no bias", "one bias", "narrower"],
)
def test_mlp(options, monkeypatch):
    slow = randomised(mlp(**options))
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, strict=True)
    calls = fused_calls(monkeypatch)
    for shape in [(3, 9, WIDTH), (5, WIDTH), (2, 3, 5, WIDTH)]:
        assert_alike(fast, slow, torch.randn(shape))
    assert_alike(fast, slow, torch.randn(3, WIDTH, 9).transpose(1, 2))
    assert calls == ["Mlp"] * 8


GELU = "the fused one GELU(approximate='tanh')"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (mlp(nn.GELU), f"its activation is GELU(approximate='none'), {GELU}"),
        (mlp(layers.get_act_layer("gelu")), f"its activation is GELU(), {GELU}"),
        (mlp(layers.get_act_layer("quick_gelu")), f"its activation is QuickGELU(), {GELU}"),
        (mlp(nn.SiLU), f"its activation is SiLU(), {GELU}"),
        (mlp(lambda: nn.Sequential(nn.SiLU())), f"its activation is Sequential( (0): SiLU() ), {GELU}"),
        (mlp(norm_layer=nn.LayerNorm), f"it has norm (LayerNorm), {UNKNOWN}"),
        (
            mlp(use_conv=True),
            "fc1 is torch.nn.modules.conv.Conv2d, the fused forward reads an nn.Linear's weight",
        ),
        (layers.GluMlp(WIDTH, 96, act_layer=tanh_gelu), "fc1 gives 96 features and fc2 takes 48, as in a gated MLP"),
        (layers.GlobalResponseNormMlp(WIDTH, 96, act_layer=tanh_gelu), f"it has grn (GlobalResponseNorm), {UNKNOWN}"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_mlp_of_another_kind_is_left_as_it_is(module, reason):
    before = type(module)
    [entry] = ditfast.accelerate(nn.Sequential(attention(), module)).skipped
    assert entry.adapter == "timm mlp" and entry.reason.startswith(reason) and type(module) is before


def test_a_subclass_of_gelu():
    """A subclass of GELU, put in after the check, may compute anything."""

    class Twice(nn.GELU):
        def forward(self, x):
            return 2 * super().forward(x)

    slow = randomised(mlp())
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast)
    for module in (fast, slow):
        module.act = Twice(approximate="tanh")
    assert_alike(fast, slow)


# --- in blocks in the official release's style


@pytest.mark.parametrize(
    ("fused", "act_layer"),
    [(True, tanh_gelu), (False, tanh_gelu), (True, layers.GELUTanh), (True, nn.GELU)],
    ids=["fused_attn", "attention by hand", "GELUTanh", "exact GELU"],
)
def test_a_model_of_timms_parts(fused, act_layer):
    fast, slow = pair(before=from_timm(fused=fused, act_layer=act_layer))
    report = ditfast.accelerate(fast)
    left = {entry.module for entry in report.skipped}
    assert left == ({"blocks.0.mlp", "blocks.1.mlp"} if act_layer is nn.GELU else set()), str(report)
    assert_trained_alike(fast, slow, x_learns=True, join=True)
    fast.eval(), slow.eval()
    assert_trained_alike(fast, slow, autocast=torch.bfloat16, join=True)


def test_a_model_of_timms_parts_in_inference(monkeypatch):
    fast, slow = pair(before=from_timm())
    calls = fused_calls(monkeypatch)
    with torch.inference_mode():
        x, t, y = inputs()
        outputs = [{"output": model(x, t, y)} for model in (fast, slow)]
        assert_judged(*outputs, {"output": copy.deepcopy(slow).double()(x.double(), t, y)})
    assert calls == ["Attention", "Mlp"] * 2


@pytest.mark.kernels
def test_a_model_of_timms_parts_on_the_kernels():
    fast, slow = pair(before=from_timm(dim=KERNELS["dim"], act_layer=layers.GELUTanh), **KERNELS)
    assert not ditfast.accelerate(fast).skipped
    assert_trained_alike_by_kernels(fast, slow, join=True)


def test_a_model_of_timms_parts_compiled():
    torch.compiler.reset()
    fast, slow = pair(before=from_timm(act_layer=layers.GELUTanh))
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert_trained_alike(
        fast, slow, call=lambda model, *arguments: (compiled if model is fast else model)(*arguments), join=True
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_drop_path_and_dropouts(when):
    """In training they run timm's own code with its own random numbers; in evaluation they do nothing."""
    fast, slow = pair(**{when: from_timm(drop_path=0.4, attn_drop=0.3, proj_drop=0.2)})
    if when == "before":
        assert len(ditfast.accelerate(fast).accelerated) == ALL
    computed = []
    for model in (fast.train(), slow.train()):
        torch.manual_seed(0)
        out = model(*inputs())
        computed.append([out.detach(), *torch.autograd.grad(out.square().mean(), list(model.parameters()))])
    for actual, expected in zip(*computed, strict=True):
        assert_same(actual, expected)
    torch.manual_seed(1)
    assert not torch.allclose(fast(*inputs()), computed[0][0], rtol=0.01)
    fast.eval(), slow.eval()
    assert_trained_alike(fast, slow, join=True)


# --- timm's own models


def vit(**options):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "num_heads": HEADS, "depth": 2, "num_classes": 10}
    return randomised(timm.models.VisionTransformer(**sizes, **options))


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "qkv_bias": False}, {"drop_path_rate": 0.2}], ids=str)
def test_a_vision_transformer(options, monkeypatch):
    """Its blocks have affine norms and no modulation: attention and MLP are fused, and in use."""
    slow = vit(act_layer="gelu_tanh", **options).eval()
    fast = copy.deepcopy(slow)
    report = ditfast.accelerate(fast, strict=True)
    parts = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")]
    assert [entry.module for entry in report.entries] == parts
    calls = fused_calls(monkeypatch)
    x = torch.randn(3, 3, 16, 16)
    for training in (False, True):
        for model in (fast, slow):
            model.train(training and "drop_path_rate" not in options)
        calls.clear()
        assert_judged_alone(fast, slow, x)
        assert calls == ["Attention", "Mlp"] * 2
    outputs = []
    for model in (fast.train(), slow.train()):
        torch.manual_seed(0)
        outputs.append(model(x))
    assert_same(*outputs)


def test_a_vision_transformer_with_the_exact_gelu_keeps_its_mlp():
    slow = vit()
    fast = copy.deepcopy(slow)
    report = ditfast.accelerate(fast)
    assert {entry.module for entry in report.accelerated} == {"blocks.0.attn", "blocks.1.attn"}
    assert {entry.reason for entry in report.skipped} == {f"its activation is GELU(approximate='none'), {GELU}"}
    assert_alike(fast, slow, torch.randn(3, 3, 16, 16))
