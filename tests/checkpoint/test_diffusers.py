"""Conversions from and to diffusers' folder, against the real ``DiTTransformer2DModel`` in fp64 and fp32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditfast import DiT, DiTConfig, load_checkpoint, reference, save_checkpoint
from ditfast.checkpoint.files import CheckpointError, convert
from ditfast.parity import judge, relative_error
from ditfast.testing.inputs import randomize_

DiTTransformer2DModel = pytest.importorskip("diffusers", reason="needs the package diffusers").DiTTransformer2DModel

# what a DiTTransformer2DModel of these sizes computes
CONFIG = DiTConfig(
    depth=3,
    hidden_size=72,
    num_heads=2,
    num_classes=10,
    latent_size=16,
    norm2_eps=1e-5,
    timestep_freq_shift=1.0,
)
EMBEDDER = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.weight"


class _Fp64Timesteps(nn.Module):
    """The class's sinusoid in fp64, with the constants found in it; its own is in fp32 in every dtype."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        assert original.flip_sin_to_cos and original.scale == 1
        half = original.num_channels // 2
        exponent = torch.arange(half, dtype=torch.float64) / (half - original.downscale_freq_shift)
        # the same power as ditfast's, so that only the models differ; the fp32 runs keep the class's own
        self.frequencies = 10000.0**-exponent

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None].double() * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _diffusers_model(seed: int = 0, **overrides: Any) -> Any:
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 36,
        "num_layers": 3,
        "sample_size": 16,
        "num_embeds_ada_norm": 10,
        "out_channels": 8,
    }
    model: Any = randomize_(DiTTransformer2DModel(**{**sizes, **overrides}), seed).eval()
    # a DiT has one time and one label embedder, which the class repeats in every block
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def _ditfast_model(config: DiTConfig = CONFIG, seed: int = 0) -> DiT:
    model = DiT(config)
    randomize_(model, seed)
    return model.eval()


def _batch(config: DiTConfig = CONFIG) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, config.in_channels, *config.latent_hw, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([7, 500, 999]), torch.tensor([3, config.num_classes, 0])


@torch.no_grad()
def _run(model: Any, batch: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype = torch.float64) -> Any:
    x, t, y = batch
    model = model.to(dtype)
    if isinstance(model, reference.DiT):
        return model(x.to(dtype), t, y)
    if dtype == torch.float64:
        for block in model.transformer_blocks:
            if not isinstance(block.norm1.emb.time_proj, _Fp64Timesteps):
                block.norm1.emb.time_proj = _Fp64Timesteps(block.norm1.emb.time_proj)
    return model(x.to(dtype), timestep=t, class_labels=y).sample


def _agree(a: Tensor, b: Tensor, single: Tensor) -> bool:
    """Whether two fp64 outputs are those of one function, given that function's output in fp32.

    The yardstick of the model rule in fp64 is its error in fp32, scaled by the ratio of the epsilons; each
    output may be as far from the exact result as the rule allows, so the two may be twice that apart.
    """
    bound = judge("model", single, single, a, torch.float32).bound
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return relative_error(b, a) <= 2 * bound * scale


def _same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_eps": 1e-3},
    {"out_channels": None, "in_channels": 3},
    {"patch_size": 4, "num_attention_heads": 3, "attention_head_dim": 8},
    {"sample_size": 8, "num_embeds_ada_norm": 1000},
]


@pytest.mark.quick
@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_from_diffusers_computes_the_same(tmp_path: Path, overrides: dict[str, Any]) -> None:
    transformer = _diffusers_model(**overrides)
    transformer.save_pretrained(tmp_path)
    dit = load_checkpoint(tmp_path)
    values = transformer.config
    assert dit.config == DiTConfig(
        depth=3,
        hidden_size=values.num_attention_heads * values.attention_head_dim,
        num_heads=values.num_attention_heads,
        patch_size=values.patch_size,
        in_channels=values.in_channels,
        num_classes=values.num_embeds_ada_norm,
        learn_sigma=values.out_channels is not None,
        latent_size=values.sample_size,
        norm2_eps=values.norm_eps,
        timestep_freq_shift=1.0,
    )
    # the table is the class's own, bit for bit
    assert torch.equal(dit.pos_embed.data, transformer.pos_embed.pos_embed)
    batch = _batch(dit.config)
    dit_fp32, transformer_fp32 = _run(dit, batch, torch.float32), _run(transformer, batch, torch.float32)
    oracle, dit_fp64 = _run(transformer, batch), _run(dit, batch)
    assert judge("model", dit_fp32, transformer_fp32, oracle, torch.float32).ok
    assert _agree(oracle, dit_fp64, dit_fp32)


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_to_diffusers_loads_strictly_and_computes_the_same(tmp_path: Path, overrides: dict[str, Any]) -> None:
    _diffusers_model(**overrides).save_pretrained(tmp_path / "in")
    config = load_checkpoint(tmp_path / "in").config
    dit = _ditfast_model(config, seed=1)
    save_checkpoint(dit, tmp_path / "out")
    transformer, info = DiTTransformer2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert type(transformer) is DiTTransformer2DModel
    batch = _batch(config)
    dit_fp32, transformer_fp32 = _run(dit, batch, torch.float32), _run(transformer, batch, torch.float32)
    oracle, transformer_fp64 = _run(dit, batch), _run(transformer, batch)
    assert judge("model", dit_fp32, transformer_fp32, oracle, torch.float32).ok
    assert _agree(oracle, transformer_fp64, dit_fp32)


@pytest.mark.parametrize("change", [{"norm2_eps": 1e-6}, {"timestep_freq_shift": 0.0}, {"norm1_eps": 1e-5}])
def test_the_comparison_sees_every_constant(tmp_path: Path, change: dict[str, Any]) -> None:
    transformer = _diffusers_model()
    transformer.save_pretrained(tmp_path)
    dit = load_checkpoint(tmp_path, config=replace(CONFIG, **change))
    single = _run(dit, _batch(), torch.float32)
    assert not _agree(_run(transformer, _batch()), _run(dit, _batch()), single)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trips_keep_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    transformer = _diffusers_model().to(dtype)
    transformer.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "again")
    reconverted = DiTTransformer2DModel.from_pretrained(tmp_path / "again", torch_dtype=dtype)
    assert _same_state(transformer, reconverted)
    first, second = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "again")
    )
    # only the version of the library that wrote it is left out
    assert first.pop("_diffusers_version") and first == second

    dit = _ditfast_model().to(dtype)
    save_checkpoint(dit, tmp_path / "folder")
    loaded = load_checkpoint(tmp_path / "folder")
    assert loaded.config == CONFIG and _same_state(dit, loaded)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_official_constants_are_refused_unless_inexact_is_allowed(tmp_path: Path) -> None:
    official = _ditfast_model(replace(CONFIG, norm2_eps=1e-6, timestep_freq_shift=0.0, norm1_eps=1e-5))
    save_checkpoint(official, tmp_path / "in.safetensors")
    message = (
        r"out.*norm1_eps becomes 1e-06 instead of 1e-05, timestep_freq_shift becomes 1 instead of 0, "
        r"which moves the timestep sinusoid by a relative L2 distance of 0\.13 at t=100, 0\.61 at t=500, "
        r"1\.01 at t=999\. allow_inexact=True \(--allow-inexact\)"
    )
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "in.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "in.safetensors", tmp_path / "out", allow_inexact=True)
    # what was written is the same weights under diffusers' constants; the second norm's epsilon is carried
    constants = replace(official.config, timestep_freq_shift=1.0, norm1_eps=1e-6)
    assert load_checkpoint(tmp_path / "out").config == constants
    moved = DiT(constants).eval()
    moved.load_state_dict(official.state_dict())
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    single = _run(moved, _batch(), torch.float32)
    assert _agree(_run(moved, _batch()), _run(transformer, _batch()), single)
    # a user who knows the weights' origin gets them back
    restored = load_checkpoint(tmp_path / "out", config=official.config)
    assert restored.config == official.config and _same_state(restored, official)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"conditioning": "adaln"}, "conditioning='adaln'"),
        ({"conditioning": "in_context"}, "conditioning='in_context'"),
        ({"conditioning": "cross_attention"}, "conditioning='cross_attention'"),
        ({"qk_norm": True}, "qk_norm"),
        ({"latent_size": (16, 8)}, r"latent_size=\(16, 8\)"),
        ({"mlp_ratio": 2.0}, "mlp_ratio=2.0"),
        ({"class_dropout_prob": 0.0}, "class_dropout_prob=0"),
        ({"frequency_embedding_size": 128}, "frequency_embedding_size=128"),
    ],
)
def test_models_the_class_does_not_have_are_always_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=f"out: .* cannot hold this model: {named}"):
        save_checkpoint(_ditfast_model(replace(CONFIG, **change)), tmp_path / "out", allow_inexact=True)
    assert not list(tmp_path.iterdir())


def test_another_position_table_is_inexact(tmp_path: Path) -> None:
    model = _ditfast_model()
    with torch.no_grad():
        model.pos_embed.mul_(0.5)
    with pytest.raises(CheckpointError, match="pos_embed becomes the sine-cosine table"):
        save_checkpoint(model, tmp_path / "out")
    save_checkpoint(model, tmp_path / "out", allow_inexact=True)


def test_a_pipelines_folder_and_older_files(tmp_path: Path) -> None:
    transformer = _diffusers_model()
    transformer.save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    expected = load_checkpoint(tmp_path / "pipeline")
    # before diffusers 0.28: another class, no norm_eps in its config, and pickles
    old = tmp_path / "old"
    transformer.save_pretrained(old, safe_serialization=False)
    values = json.loads((old / "config.json").read_text())
    values.update(_class_name="Transformer2DModel", cross_attention_dim=None, num_vector_embeds=None)
    del values["norm_eps"]
    (old / "config.json").write_text(json.dumps(values))
    assert (old / "diffusion_pytorch_model.bin").exists()
    loaded = load_checkpoint(old, model=None, latent_size=16)
    assert loaded.config == expected.config == CONFIG and _same_state(loaded, expected)


def test_embedders_that_differ_between_blocks_are_refused(tmp_path: Path) -> None:
    transformer = _diffusers_model()
    with torch.no_grad():
        transformer.get_parameter(EMBEDDER)[3, 4] += 1e-6
    transformer.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=f"diffusion_pytorch_model.safetensors: tensor '{EMBEDDER}' differs"
    ):
        load_checkpoint(tmp_path)


def test_the_class_count_changes_on_load_here_too(tmp_path: Path) -> None:
    _diffusers_model().save_pretrained(tmp_path / "in")
    loaded = load_checkpoint(tmp_path / "in", num_classes=4)
    assert loaded.config == replace(CONFIG, num_classes=4)
    save_checkpoint(loaded, tmp_path / "out")
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    batch = _batch(loaded.config)
    single = _run(loaded, batch, torch.float32)
    assert _agree(_run(loaded, batch), _run(transformer, batch), single)
    before, after = _run(load_checkpoint(tmp_path / "in"), _batch()), _run(loaded, batch)
    assert torch.equal(before, after)  # labels 3, null, 0 are in both


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "gelu"}, "activation_fn must be 'gelu-approximate' for a DiT, got 'gelu'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine must be False"),
        ({"attention_bias": False}, "attention_bias must be True"),
        ({"dropout": 0.1}, "dropout must be 0.0"),
        ({"norm_type": "ada_norm"}, "norm_type must be 'ada_norm_zero'"),
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "_class_name must be one of DiTTransformer2DModel, .*'PixArt",
        ),
        ({"_class_name": None}, "_class_name must be one of .* got None"),
        ({"out_channels": 5}, "out_channels must be in_channels=4 or twice that, got 5"),
        ({"num_attention_heads": "2"}, "hidden_size must be an int"),
        ({"num_layers": 4}, r"19 missing: transformer_blocks\.3\.norm1\.emb\S+ \(72, 256\), .*, \.\.\."),
        ({"num_layers": 10**9}, "the configuration has 1000000000 blocks"),
        ({"num_embeds_ada_norm": 11}, r"embedding_table.weight \(11, 72\) \(wanted \(12, 72\)\)"),
        ({"sample_size": 15}, "latent_size height must be a multiple of patch_size=2, got 15"),
    ],
    ids=str,
)
def test_other_configurations_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _diffusers_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_config_that_contradicts_the_folder_is_refused(tmp_path: Path) -> None:
    _diffusers_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"the file holds a model of num_heads=2 \(wanted 4\)"):
        load_checkpoint(tmp_path, config=replace(CONFIG, num_heads=4))
    with pytest.raises(CheckpointError, match=r"latent_size=\(16, 16\) \(wanted \(8, 32\)\)"):
        load_checkpoint(tmp_path, latent_size=(8, 32))
    with pytest.raises(
        CheckpointError, match=r"wanted DiT-S/2, but the file holds another model: depth=3 \(wanted 12\)"
    ):
        load_checkpoint(tmp_path, model="DiT-S/2")
