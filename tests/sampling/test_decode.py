"""The autoencoder: which latents it takes, how it rounds, and its slices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ditfast.sampling.decode import Decoder, autoencoder_files
from tests.sampling.conftest import make_autoencoder, sampling_assets

pytest.importorskip("diffusers", reason="needs the package diffusers")

LATENTS = torch.Size((5, 4, 8, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sampling_assets(tmp_path_factory.mktemp("decode")) as assets:
        yield assets / "vae"


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return Decoder(folder, 4)


@pytest.mark.quick
def test_pixels_are_the_official_rule_of_the_decoded(decoder: Decoder) -> None:
    latents = torch.randn(LATENTS) * 3
    images = decoder(latents)
    assert images.shape == (5, 64, 32, 3) and images.dtype == np.uint8 and images.flags.c_contiguous
    with torch.no_grad():
        decoded = decoder.vae.decode(latents / 0.18215).sample
    # by rounding, as torchvision's save_image does, and by the formula of the official npz: the same numbers
    rounded = ((decoded / 2 + 0.5) * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    exact = (decoded.double() / 2 + 0.5) * 255
    assert np.abs(images.astype(int) - rounded.permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1
    error = torch.from_numpy(images).permute(0, 3, 1, 2) - exact.clamp(0, 255)
    assert error.abs().max() <= 0.5 + 1e-4
    assert len(np.unique(images)) > 50


def test_extremes_are_clamped(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 0.99, 1.0, 9.0]).view(1, 1, 1, 8).expand(1, 3, 1, 8)
    monkeypatch.setattr(decoder.vae, "decode", lambda latents: type("Found", (), {"sample": values}))
    assert decoder(torch.zeros(1, 4, 1, 1))[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 254, 255, 255]


def test_slices_stay_within_the_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # four copies of 64 x 32 positions of 4 channels in fp32
    image_mib = 4 * 64 * 32 * 4 * 4 / 2**20
    whole = Decoder(folder, 4, budget_mib=5 * image_mib)(torch.ones(LATENTS))
    for budget, expected in ((5 * image_mib, [5]), (2.5 * image_mib, [2, 2, 1]), (image_mib / 2, [1] * 5)):
        decoder = Decoder(folder, 4, budget_mib=budget)
        decode, sizes = decoder.vae.decode, []
        monkeypatch.setattr(decoder.vae, "decode", lambda x, f=decode, s=sizes: (s.append(len(x)), f(x))[1])
        assert decoder.slice_size((8, 4)) == expected[0]
        images = decoder(torch.ones(LATENTS))
        assert sizes == expected
        # a convolution may sum another batch in another order, which may move a value across a rounding
        assert np.abs(images.astype(int) - whole.astype(int)).max() <= 1
    assert Decoder(folder, 4, dtype=torch.bfloat16, budget_mib=2 * image_mib).slice_size((8, 4)) == 4
    with pytest.raises(ValueError, match="--decode-mib must be above 0, got 0"):
        Decoder(folder, 4, budget_mib=0)


def test_an_image_that_is_not_finite_is_named(decoder: Decoder) -> None:
    latents = torch.randn(LATENTS)
    latents[3, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite for image 3 of the batch; try --vae-dtype fp32"):
        decoder(latents)


def test_channels_must_be_the_checkpoints(folder: Path) -> None:
    with pytest.raises(ValueError, match="must decode the checkpoint's 16 latent channels, got an autoencoder of 4"):
        Decoder(folder, 16)


def test_scaling_must_be_the_checkpoints(tmp_path: Path) -> None:
    folder = make_autoencoder(tmp_path / "vae", scaling_factor=0.13025, shift_factor=0.5)
    with pytest.raises(ValueError, match="--vae must scale as .*, 0.18215, got scaling_factor 0.13025: .*--latent-sc"):
        Decoder(folder, 4)
    decoder, latents = Decoder(folder, 4, scaling=0.13025), torch.randn(LATENTS)
    with torch.no_grad():
        decoded = decoder.vae.decode(latents / 0.13025 + 0.5).sample
    expected = (127.5 * decoded + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(decoder(latents), expected.numpy())


def test_a_pipelines_folder_has_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").symlink_to(folder)
    assert [path.name for path in autoencoder_files(tmp_path)] == ["config.json", "diffusion_pytorch_model.safetensors"]
    latents = torch.randn(LATENTS)
    assert np.array_equal(Decoder(tmp_path, 4)(latents), Decoder(folder, 4)(latents))


def test_what_is_no_autoencoder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--vae must be the folder of a diffusers AutoencoderKL, .*, got .*absent"):
        Decoder(tmp_path / "absent", 4)
    other = tmp_path / "vae"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="--vae must be a diffusers AutoencoderKL, got AutoencoderTiny"):
        Decoder(other, 4)
    (other / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="--vae cannot be loaded from "):
        Decoder(other, 4)


def test_without_diffusers_the_message_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ValueError, match="--vae needs the package diffusers .*--latents needs none"):
        Decoder(folder, 4)
