"""The reference DiT against the paper's counts, direct formulas, and its own four designs."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ditfast import MODELS, DiT, DiTConfig, load_checkpoint, reference, save_checkpoint
from ditfast.config import CONDITIONINGS
from ditfast.parity import relative_error
from ditfast.reference import ops
from ditfast.testing.inputs import random_batch, randomize_

# model at 256 px: exact parameters, the paper's GMAC
PAPER = {
    "DiT-S/8": (33_148_160, 0.36),
    "DiT-S/4": (32_945_024, 1.41),
    "DiT-S/2": (32_963_360, 6.06),
    "DiT-B/8": (130_881_536, 1.42),
    "DiT-B/4": (130_475_648, 5.56),
    "DiT-B/2": (130_512_416, 23.01),
    "DiT-L/8": (458_594_816, 5.01),
    "DiT-L/4": (458_053_760, 19.70),
    "DiT-L/2": (458_102_816, 80.71),
    "DiT-XL/8": (675_683_072, 7.39),
    "DiT-XL/4": (675_074_432, 29.05),
    "DiT-XL/2": (675_129_632, 118.64),
}
XL = MODELS["DiT-XL/2"]
CASES = [(MODELS[name], *figures) for name, figures in PAPER.items()] + [
    (DiTConfig.named("DiT-XL/2", image_size=512), 676_014_368, 524.60),
    (replace(XL, conditioning="in_context"), 449_455_136, 119.37),
    (replace(XL, conditioning="cross_attention"), 598_090_784, 137.62),
    (replace(XL, conditioning="adaln"), 600_747_296, 118.56),
]
TINY = DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=(8, 12), num_classes=10)


@pytest.mark.parametrize(
    ("config", "parameters", "gmac"),
    CASES,
    ids=lambda case: f"{case.name}-{case.conditioning}" if isinstance(case, DiTConfig) else "",
)
def test_parameters_and_gmacs_of_the_paper(config, parameters, gmac):
    with torch.device("meta"):
        model = reference.DiT(config).eval()
        inputs = torch.empty(1, 4, *config.latent_size), torch.empty(1), torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert abs(counter.get_total_flops() / 2e9 - gmac) <= max(0.02, 0.001 * gmac)


def test_official_state_dict_names():
    with torch.device("meta"):
        names = set(reference.DiT(XL).state_dict())
    block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    layers = [f"blocks.{i}.{name}" for i in range(28) for name in block]
    layers += ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += ["final_layer.adaLN_modulation.1"]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert names == expected | {"pos_embed", "y_embedder.embedding_table.weight"}
    assert len(names) == 292


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_fresh_model_outputs_zero(conditioning):
    model = reference.DiT(replace(TINY, conditioning=conditioning)).eval()
    assert not model(*random_batch(TINY, 2)).any()
    if conditioning == "adaln_zero":
        x = torch.randn(2, 24, 72)
        assert torch.equal(model.blocks[0](x, torch.randn(2, 72)), x)  # the block is the identity
    if conditioning == "adaln":
        assert model.blocks[0].adaLN_modulation[1].weight.any()
    assert randomize_(model)(*random_batch(TINY, 2)).any()


def test_position_table_puts_the_width_coordinate_first():
    rows, columns, width = 3, 5, 16
    table = ops.sincos_position_table(width, rows, columns).numpy()
    frequencies = [10000 ** (-i / (width / 4)) for i in range(width // 4)]
    for row in range(rows):
        for column in range(columns):
            direct = [
                function(position * frequency)
                for position in (column, row)
                for function in (math.sin, math.cos)
                for frequency in frequencies
            ]
            np.testing.assert_allclose(table[row * columns + column], direct, rtol=1e-14, atol=1e-14)
    assert torch.equal(reference.DiT(TINY).pos_embed[0], ops.sincos_position_table(72, 4, 6).float())
    assert not reference.DiT(TINY).pos_embed.requires_grad


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_timestep_embedding_against_a_direct_formula(shift):
    t = torch.tensor([0, 1, 500, 999])
    embedding = ops.timestep_embedding(t, 256, shift, torch.float64).numpy()
    for i in (0, 1, 63, 127):
        angles = t.numpy() * math.exp(-math.log(10000) * i / (128 - shift))
        np.testing.assert_allclose(embedding[:, i], np.cos(angles), rtol=0, atol=1e-12)
        np.testing.assert_allclose(embedding[:, 128 + i], np.sin(angles), rtol=0, atol=1e-12)


def test_patch_vectors_put_the_channel_last():
    x = torch.randn(2, 3, 4, 6)
    patches = ops.patchify(x, 2)
    assert torch.equal(patches[1, 4].view(2, 2, 3)[1, 0], x[1, :, 3, 2])  # patch (1, 1), position (1, 0)
    assert torch.equal(ops.unpatchify(patches, 2, (2, 3)), x)


def test_adaln_zero_block_written_out():
    """The whole forward of a one-block model, from the paper's equations, in fp64."""
    config = replace(TINY, depth=1)
    model = randomize_(reference.DiT(config)).double().eval()
    x, t, y = random_batch(config, 3, dtype=torch.float64)
    weights = model.state_dict()

    def linear(name, value):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(value):
        return value / (1 + (-value).exp())

    def norm(value):
        mean = value.mean(-1, keepdim=True)
        return (value - mean) / ((value - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(value):
        return 0.5 * value * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    def heads(value):  # (B, T, D) -> (B, H, T, head_dim)
        return torch.stack(value.split(36, dim=-1), dim=1)

    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(3, 24, 16)
    h = patches @ weights["x_embedder.proj.weight"].reshape(72, 16).T + weights["x_embedder.proj.bias"]
    h = h + weights["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", sinusoid)))
    c = c + weights["y_embedder.embedding_table.weight"][y]
    modulation = linear("blocks.0.adaLN_modulation.1", silu(c))[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[..., i * 72 : (i + 1) * 72] for i in range(6))
    qkv = linear("blocks.0.attn.qkv", norm(h) * (1 + scale1) + shift1)
    q, k, v = (heads(qkv[..., i * 72 : (i + 1) * 72]) for i in range(3))
    attention = torch.softmax(q @ k.mT / 6.0, dim=-1) @ v
    h = h + gate1 * linear("blocks.0.attn.proj", torch.cat(attention.unbind(1), dim=-1))
    hidden = gelu(linear("blocks.0.mlp.fc1", norm(h) * (1 + scale2) + shift2))
    h = h + gate2 * linear("blocks.0.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c))[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    out = torch.einsum("nhwpqc->nchpwq", out.view(3, 4, 6, 2, 2, 8)).reshape(3, 8, 8, 12)
    assert (model(x, t, y) - out).norm() <= 1e-12 * out.norm()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_dtype_and_batch_independence(conditioning, dtype):
    config = replace(TINY, conditioning=conditioning, qk_norm=True)
    model = randomize_(reference.DiT(config)).eval()
    x, t, y = random_batch(config, 3)
    oracle = reference.DiT(config).double().eval()
    oracle.load_state_dict(model.state_dict())
    model = model.to(dtype)
    out = model(x, t, y)  # fp32 latents into a model of any dtype
    assert out.dtype == dtype
    assert out.shape == (3, 8, 8, 12)
    # no yardstick stands above the reference: two layers may lose a few roundings
    assert relative_error(out, oracle(x, t, y)) < 16 * torch.finfo(dtype).eps
    alone = model.double()(x[1:2], t[1:2], y[1:2])
    assert (alone - model(x, t, y)[1:2]).norm() <= 1e-12 * alone.norm()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_parameter_and_input_matters(conditioning):
    config = replace(TINY, conditioning=conditioning)
    model = randomize_(reference.DiT(config)).double().train()
    x, t, y = random_batch(config, 3, dtype=torch.float64)
    model(x, t, y).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    model.eval()
    out = model(x, t, y)
    assert not torch.equal(out, model(x, t + 1, y))
    assert not torch.equal(out, model(x, t, (y + 1) % 10))


@pytest.mark.parametrize(("guided_channels", "guided"), [(3, 3), (1, 1), ("all", 4)])
def test_guidance(guided_channels, guided):
    model = randomize_(reference.DiT(TINY)).double().eval()
    x, t, y = random_batch(TINY, 3, dtype=torch.float64)
    null = torch.full_like(y, 10)
    conditional, unconditional = model(x, t, y), model(x, t, null)
    expected = unconditional[:, :guided] + 4.0 * (conditional - unconditional)[:, :guided]
    double = torch.cat([x, torch.full_like(x, torch.nan)]), torch.cat([t, t])  # the second half of x is not read
    for labels in (y, torch.cat([y, null])):
        out = model.forward_with_cfg(*double, labels, 4.0, guided_channels=guided_channels)
        assert out.shape == (6, 8, 8, 12)
        tolerance = 1e-12 * out.norm()
        for half, branch in zip(out.chunk(2), (conditional, unconditional), strict=True):
            assert (half[:, :guided] - expected).norm() <= tolerance
            assert (half[:, guided:] - branch[:, guided:]).norm() <= tolerance


def test_guidance_of_few_channels():
    """Guiding the official three channels equals guiding all of them if the latent has fewer."""
    config = replace(TINY, in_channels=2)
    model = randomize_(reference.DiT(config)).double().eval()
    x, t, y = random_batch(config, 2, dtype=torch.float64)
    double = torch.cat([x, x]), torch.cat([t, t]), y
    default, everything = (model.forward_with_cfg(*double, 4.0, **extra) for extra in ({}, {"guided_channels": "all"}))
    assert torch.equal(default, everything)


def test_guidance_refuses():
    model = reference.DiT(TINY)
    x, t, y = random_batch(TINY, 4)
    with pytest.raises(ValueError, match="batch of 2N"):
        model.forward_with_cfg(x[:3], t[:3], y[:3], 4.0)
    with pytest.raises(ValueError, match="guided_channels"):
        model.forward_with_cfg(x, t, y, 4.0, guided_channels=5)
    with pytest.raises(ValueError, match="y must have shape"):
        model.forward_with_cfg(x, t, y[:3], 4.0)
    without_null = reference.DiT(replace(TINY, class_dropout_prob=0.0))
    with pytest.raises(ValueError, match="needs a null class"):
        without_null.forward_with_cfg(x, t, y[:2], 4.0)


def test_labels_are_dropped_in_training_only():
    embedder = randomize_(reference.DiT(replace(TINY, class_dropout_prob=0.25))).y_embedder
    y = torch.zeros(4000, dtype=torch.long)
    table = embedder.embedding_table.weight
    dropped = (embedder.train()(y) == table[10]).all(dim=1)
    unchanged = (embedder(y) == table[0]).all(dim=1)
    assert 800 < dropped.sum() < 1200  # 7 standard deviations around 1000
    assert unchanged.any()
    assert torch.equal(embedder.eval()(y), table[0].expand(4000, -1))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"x must have shape \(B, 4, 8, 12\), got \(2, 4, 8, 8\)", {"x": torch.zeros(2, 4, 8, 8)}),
        (TypeError, "x must have a floating dtype", {"x": torch.zeros(2, 4, 8, 12, dtype=torch.int64)}),
        (ValueError, r"t must have shape \(2,\), got \(1,\)", {"t": torch.zeros(1)}),
        (ValueError, r"y must have shape \(2,\), got \(3,\)", {"y": torch.zeros(3, dtype=torch.int64)}),
        (TypeError, "y must be int64 or int32", {"y": torch.zeros(2)}),
    ],
)
def test_bad_inputs(error, message, change):
    x, t, y = random_batch(TINY, 2)
    with pytest.raises(error, match=message):
        reference.DiT(TINY)(**{"x": x, "t": t, "y": y, **change})


def test_config_type():
    with pytest.raises(TypeError, match="config must be a DiTConfig, got str"):
        reference.DiT("DiT-XL/2")


def test_zero_batch():
    for conditioning in CONDITIONINGS:
        model = reference.DiT(replace(TINY, conditioning=conditioning)).eval()
        assert model(*random_batch(TINY, 0)).shape == (0, 8, 8, 12)


@pytest.mark.parametrize("kind", [reference.DiT, DiT])
def test_channels_last(kind, tmp_path):
    """Parameters follow the seed, not the layout; results and files are the same."""
    torch.manual_seed(0)
    plain, model = kind(TINY).eval(), kind(TINY).to(memory_format=torch.channels_last).eval()
    weight = model.x_embedder.proj.weight
    for each in (plain, model):
        torch.manual_seed(1)
        each.initialize_weights()
    assert not weight.is_contiguous() and weight is model.x_embedder.proj.weight
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.load_state_dict(randomize_(plain).state_dict())
    x, t, y = random_batch(TINY, 2)
    actual, expected = model(x.contiguous(memory_format=torch.channels_last), t, y), plain(x, t, y)
    torch.testing.assert_close(actual, expected)
    for out in (actual, expected):
        out.square().mean().backward()
    torch.testing.assert_close(weight.grad, plain.x_embedder.proj.weight.grad)
    if kind is DiT:
        save_checkpoint(model, tmp_path / "model.safetensors")
        loaded = load_checkpoint(tmp_path / "model.safetensors").state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("kind", [reference.DiT, DiT])
def test_rounded_timesteps_are_warned_of_once(kind):
    model, (x, t, y) = kind(TINY).eval(), random_batch(TINY, 2)
    calls = [model, *([lambda x, t, y: model.modulation(t, y)] if kind is DiT else [])]
    for call in calls:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            for _ in range(2):
                call(x, t.bfloat16(), y)
        (warning,) = warned
        assert warning.category is UserWarning and "timestep 999 has become 1000" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for times in (t, t.float(), t.half()):  # integers up to 2048
            model.bfloat16()(x, times, y)
