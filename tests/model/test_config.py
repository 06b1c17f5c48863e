"""DiTConfig: the named models, derived sizes, and what is refused."""

import dataclasses
import json

import pytest

from ditfast import MODELS, DiTConfig

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def test_models_are_the_papers_twelve():
    assert set(MODELS) == {f"DiT-{size}/{p}" for size in SIZES for p in (2, 4, 8)}
    for name, config in MODELS.items():
        size, patch = name.removeprefix("DiT-").split("/")
        assert (config.depth, config.hidden_size, config.num_heads) == SIZES[size]
        assert config.patch_size == int(patch)
        assert config.latent_size == (32, 32)
        assert config.name == name
    with pytest.raises(TypeError):
        MODELS["DiT-XXL/2"] = MODELS["DiT-XL/2"]  # read-only


def test_named():
    config = DiTConfig.named("DiT-XL/2", image_size=(256, 512), conditioning="adaln", num_classes=10)
    assert config.latent_size == (32, 64)
    assert config.grid_size == (16, 32)
    assert config.num_tokens == 512
    assert config.head_dim == 72
    assert config.null_class == 10
    assert config.num_embeddings == 11
    assert config.out_channels == 8
    assert config.conditioning == "adaln"
    assert DiTConfig.named("DiT-S/2", latent_size=16).latent_size == (16, 16)
    assert DiTConfig.named("DiT-S/2").latent_size == (32, 32)
    assert DiTConfig.named("DiT-S/2", class_dropout_prob=0.0).null_class is None
    assert DiTConfig.named("DiT-S/2", class_dropout_prob=0.0).num_embeddings == 1000
    assert dataclasses.replace(config, depth=2).depth == 2


def test_dict_round_trip_through_json():
    config = DiTConfig.named("DiT-S/4", image_size=(256, 512), norm2_eps=1e-5, timestep_freq_shift=1.0)
    assert DiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("error", "message", "fields"),
    [
        (ValueError, "depth must be at least 1, got 0", {"depth": 0}),
        (TypeError, "depth must be an int, got 2.0", {"depth": 2.0}),
        (TypeError, "depth must be an int, got True", {"depth": True}),
        (ValueError, "hidden_size must be a multiple of num_heads=16, got 1000", {"hidden_size": 1000}),
        (ValueError, "hidden_size must be a multiple of 4", {"hidden_size": 6, "num_heads": 3}),
        (ValueError, "conditioning must be one of in_context.*got 'adaLN'", {"conditioning": "adaLN"}),
        (ValueError, r"class_dropout_prob must be in \[0, 1\), got 1", {"class_dropout_prob": 1.0}),
        (ValueError, "latent_size width must be a multiple of patch_size=2, got 33", {"latent_size": (32, 33)}),
        (TypeError, r"latent_size must be an int or a pair \(height, width\)", {"latent_size": "32"}),
        (TypeError, r"latent_size must be an int or a pair", {"latent_size": (1, 2, 3)}),
        (ValueError, "norm2_eps must be above 0", {"norm2_eps": 0.0}),
        (TypeError, "norm1_eps must be a number", {"norm1_eps": "1e-6"}),
        (TypeError, "learn_sigma must be a bool, got 1", {"learn_sigma": 1}),
        (ValueError, "timestep_freq_shift must be in", {"timestep_freq_shift": 128}),
        (ValueError, "mlp_ratio must give", {"mlp_ratio": -1.0}),
        (ValueError, "frequency_embedding_size must be even", {"frequency_embedding_size": 255}),
    ],
)
def test_bad_fields(error, message, fields):
    with pytest.raises(error, match=message):
        DiTConfig(**fields)


def test_bad_names():
    with pytest.raises(ValueError, match="did you mean 'DiT-XL/2'"):
        DiTConfig.named("DiT-XL2")
    with pytest.raises(TypeError, match="no field 'n_classes'; did you mean 'num_classes'"):
        DiTConfig.named("DiT-S/2", n_classes=10)
    with pytest.raises(TypeError, match="image_size or latent_size, not both"):
        DiTConfig.named("DiT-S/2", image_size=256, latent_size=32)
    with pytest.raises(ValueError, match=r"image_size width must be a multiple of 8 \* patch_size=2, got 250"):
        DiTConfig.named("DiT-S/2", image_size=(256, 250))
