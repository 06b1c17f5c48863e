"""Bad input of ``ditfast sample``: one line that names it, and nothing half-written under a final name."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ditfast
from ditfast.inference.engine import Engine
from ditfast.sampling import folder as folder_module
from ditfast.sampling import request as request_module
from ditfast.sampling.plan import Plan
from tests.sampling.conftest import (
    CONFIG,
    IMAGE,
    STEPS,
    arrays,
    files,
    make_autoencoder,
    make_checkpoint,
    refused,
    sample,
    sampled,
)

pytest.importorskip("diffusers", reason="needs the package diffusers")


def test_other_settings_are_refused_naming_the_difference(images: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    out, npz = tmp_path / "out", tmp_path / "x.npz"
    sampled(**images, num=2, out=out)
    before = files(out)
    line = refused(**{**images, "steps": 4}, num=2, seed=1, out=out)
    assert f"{out} was made with other settings: steps 4 (there: {STEPS}), seed 1 (there: 0);" in line
    assert "num 3 (there: 2)" in refused(**images, num=3, out=out)
    assert "batch-size 2 (there: 3)" in refused(**{**images, "batch_size": 2}, num=2, out=out)
    assert "classes [1, 2] (there: null)" in refused(**images, classes="1,2", out=out)
    other = make_checkpoint(tmp_path / "other.safetensors", ditfast.DiTConfig(**{**CONFIG.to_dict(), "depth": 1}))
    assert "checkpoint {" in refused(**{**images, "checkpoint": other}, num=2, out=out)
    # the same weights at another path are accepted
    shutil.copytree(assets / "vae", tmp_path / "vae")
    shutil.copy(assets / "tiny.safetensors", tmp_path / "copy.safetensors")
    same = {**images, "vae": tmp_path / "vae", "checkpoint": tmp_path / "copy.safetensors"}
    assert "complete already" in sampled(**same, num=2, out=out).stderr
    assert files(out) == before
    sampled(**images, num=2, npz=npz)
    assert f"{npz} was made with other settings: seed 1 (there: 0)" in refused(**images, num=2, seed=1, npz=npz)


def test_files_of_others_are_left_alone(images: dict[str, Any], tmp_path: Path) -> None:
    out, npz = tmp_path / "out", tmp_path / "x.npz"
    out.mkdir()
    (out / "000001.png").write_bytes(b"mine")
    assert f"{out} holds 000001.png but no settings.json" in refused(**images, num=2, out=out)
    assert files(out) == {"000001.png": b"mine"}
    np.savez(npz, np.zeros(3))
    assert f"{npz} exists and is none of ditfast's" in refused(**images, num=2, npz=npz)
    (tmp_path / "folder.npz").mkdir()
    assert "exists and is none of ditfast's" in refused(**images, num=2, npz=tmp_path / "folder.npz")
    (out / "000001.png").unlink()
    (out / "settings.json").write_text("[1]")
    assert "settings.json is no settings of a run: wanted a JSON object, got list" in refused(**images, num=2, out=out)


def test_a_folder_in_use_is_refused(images: dict[str, Any], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="needs locks")
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert f"{tmp_path} is being written by another run" in refused(**images, num=2, out=tmp_path)
    os.close(handle)
    sampled(**images, num=2, out=tmp_path)


def test_a_damaged_batch_is_named(images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz = tmp_path / "x.npz"
    monkeypatch.setattr(folder_module.RunFolder, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert sample(**images, num=4, npz=npz).exit_code == 130
    monkeypatch.undo()
    batch = tmp_path / "x.npz.parts" / "batch-000000.npy"
    batch.write_bytes(batch.read_bytes()[:-5])
    assert f"{batch} is damaged" in refused(**images, num=4, npz=npz)
    assert not npz.exists()
    batch.unlink()
    sampled(**images, num=4, npz=npz)


def test_a_full_disk(images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.sampling.test_output import no_file_beyond

    npz = tmp_path / "x.npz"
    with no_file_beyond(10_000):  # the settings fit, a batch of three images does not
        result = sample(**images, num=4, npz=npz)
    assert result.exit_code == 2
    parts = tmp_path / "x.npz.parts"
    assert result.stderr.splitlines()[-1] == f"error: {parts / 'batch-000000.npy'}: File too large"
    assert os.listdir(parts) == ["settings.json"] and not npz.exists()
    with no_file_beyond(20_000):  # a batch fits, the npz does not
        result = sample(**images, num=4, npz=npz)
    assert result.stderr.splitlines()[-1] == f"error: {npz}: File too large"
    assert sorted(os.listdir(tmp_path)) == ["x.npz.parts"]
    sampled(**images, num=4, npz=npz)
    assert arrays(npz)[0].shape == (4, *IMAGE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10))  # type: ignore[attr-defined]
    line = refused(**images, num=4, npz=tmp_path / "y.npz")
    assert "must have 0.00 GiB free for the batches and the npz, got 0.00" in line


def test_an_unwritable_folder(images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file")
    computed: list[object] = []
    monkeypatch.setattr(Plan, "compute", lambda *arguments: computed.append(arguments))
    assert f"error: {tmp_path / 'file'}: " in refused(**images, num=2, out=tmp_path / "file")
    assert f"error: {tmp_path / 'file' / 'x.npz'}: " in refused(**images, num=2, npz=tmp_path / "file" / "x.npz")
    if os.geteuid():  # root writes anywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "Permission denied" in refused(**images, num=2, out=closed)
        assert "Permission denied" in refused(**images, num=2, npz=closed / "x.npz")
    if Path("/proc/self").exists():  # not even by root
        assert "error: /proc/ditfast: " in refused(**images, num=2, out="/proc/ditfast")
        assert "error: /proc/settings.json: " in refused(**images, num=2, out="/proc")
        assert "error: /proc/x.npz: " in refused(**images, num=2, npz="/proc/x.npz")
        assert "error: /proc/x.npz: " in refused(**images, num=2, npz="/proc/x.npz", out=tmp_path / "work")
    assert not computed


def test_latents_that_are_not_finite(assets: Path, latents: dict[str, Any], tmp_path: Path) -> None:
    broken = make_checkpoint(tmp_path / "broken.safetensors", broken="final_layer.linear.bias")
    line = refused("--latents", **{**latents, "checkpoint": broken}, num=4, npz=tmp_path / "first.npz")
    assert re.search(r"image 0, class \d+.*: latents are not finite from step 1 of 3 on", line), line
    model = ditfast.load_checkpoint(assets / "tiny.safetensors")
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[5] = float("nan")
    ditfast.save_checkpoint(model, broken)
    options = {**latents, "checkpoint": broken, "classes": "1,2,3,4,5", "npz": tmp_path / "x.npz"}
    line = refused("--latents", **options)
    assert "image 4, class 5: latents are not finite from step 1 of 3 on" in line, line
    # finished batches are kept; nothing has the final name
    assert sorted(files(tmp_path / "x.npz.parts")) == ["batch-000000.npy", "settings.json"]
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": "10"}, "--classes must be in 0..9 for this checkpoint, got 10"),
        ({"class_names": "golden retriever"}, "--class-names needs the names of the 10 classes: give --class-file"),
        ({"num": 0}, "--num must be in 1..2^32, got 0"),
        ({"num": None}, "give --num, how many images, or --classes or --class-names"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"steps": 1001}, "steps must be an integer in 2..1000 for 'ddpm', got 1001"),
        ({"steps": 1000, "sampler": "dpm++"}, "steps must be an integer in 1..999 for 'dpm++', got 1000"),
        ({"steps": 0}, "steps must be"),
        ({"cfg_scale": -1}, "scale must be a finite number >= 0, got -1.0"),
        ({"cfg_scale": "nan"}, "scale must be a finite number >= 0, got nan"),
        ({"guided_channels": "some"}, "--guided-channels must be \"all\" or a number of channels, got 'some'"),
        ({"guided_channels": 0}, '--guided-channels must be "all" or a number of channels'),
        ({"guidance_interval": "700"}, "--guidance-interval must be two times between a comma, LOW,HIGH, got '700'"),
        ({"guidance_interval": "700,100"}, "interval must be None or (low, high)"),
        ({"guidance_rescale": 2}, "rescale must be a number in [0, 1], got 2.0"),
        ({"guidance_power": 0}, "power must be None or a finite number > 0, got 0.0"),
        ({"seed": -1}, "--seed must be in 0..2^64 - 1, got -1"),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"table_mib": -1}, "--table-mib must be 0 or more, got -1.0"),
        ({"decode_mib": 0}, "--decode-mib must be above 0, got 0.0"),
        ({"latent_scaling": 0.5}, "--vae must scale as the checkpoint's latents are, 0.5, got scaling_factor 0.18215"),
        ({"device": "tpu"}, "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "mps"}, "--device must be cpu, cuda or cuda:N, got 'mps'"),
        ({"vae": None}, "give --vae PATH, an autoencoder's folder, for images, or --latents"),
        ({"vae": "absent"}, "--vae must be the folder of a diffusers AutoencoderKL"),
        ({"checkpoint": "absent.pt"}, "--checkpoint: no such file or folder: absent.pt"),
        ({"out": None}, "give --out DIR for PNGs and a grid, or --npz FILE"),
        ({"npz": "samples.zip"}, "--npz must be a file name that ends in .npz, got samples.zip"),
    ],
)
def test_bad_input(changed: dict[str, Any], message: str, images: dict[str, Any], tmp_path: Path) -> None:
    options = {**images, "num": 2, "out": tmp_path / "out", **changed}
    if "classes" in changed or "class_names" in changed:
        del options["num"]
    line = refused(**{name: value for name, value in options.items() if value is not None})
    assert message in line
    assert os.listdir(tmp_path) == []


def test_an_autoencoder_of_other_channels(images: dict[str, Any], tmp_path: Path) -> None:
    vae = make_autoencoder(tmp_path / "vae", channels=8)
    line = refused(**{**images, "vae": vae}, num=2, out=tmp_path / "out")
    assert "--vae must decode the checkpoint's 4 latent channels, got an autoencoder of 8" in line
    assert "--latents is without an autoencoder" in refused("--latents", **images, num=2, out=tmp_path / "out")


def test_guidance_needs_a_null_class(latents: dict[str, Any], tmp_path: Path) -> None:
    config = ditfast.DiTConfig(**{**CONFIG.to_dict(), "class_dropout_prob": 0.0})
    checkpoint = make_checkpoint(tmp_path / "no-null.safetensors", config)
    options = {**latents, "checkpoint": checkpoint, "num": 2, "npz": tmp_path / "x.npz"}
    assert "--cfg-scale must be 1, no guidance: the checkpoint has no null class" in refused("--latents", **options)
    sampled("--latents", **options, cfg_scale=1)


def test_without_diffusers(latents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = refused("--latents", **latents, num=2, out=tmp_path / "out")
    assert "samplers need the package diffusers, which is not installed: pip install ditfast[diffusers]" in line


def test_without_pillow(images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "package_version", lambda package: None)
    line = refused(**images, num=2, out=tmp_path / "out")
    assert "PNGs need the package pillow (pip install pillow); --npz FILE needs none" in line


def test_memory_that_runs_out(images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(Engine, "__call__", out_of_memory)
    line = refused(**images, num=4, out=tmp_path / "out")
    assert "memory ran out in images 0 to 2: a smaller --batch-size, --table-mib or --decode-mib takes less" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_scale": -1}, "--cfg-scale must be a finite number >= 0, got -1.0"),
        ({"steps": 1}, "--steps must be an integer in 2..1000 for 'ddpm', got 1"),
        ({"guided_channels": 5}, '--guided-channels must be "all" or in 1..4 for this latent, got 5'),
        ({"guidance_interval": "700,100"}, "--guidance-interval must be None or (low, high)"),
        ({"guidance_rescale": 2}, "--guidance-rescale must be a number in [0, 1], got 2.0"),
        ({"guidance_power": 0}, "--guidance-power must be None or a finite number > 0, got 0.0"),
        ({"table_mib": -1}, "--table-mib must be 0 or more, got -1.0"),
        ({"latent_scaling": "nan"}, "--latent-scaling must be a finite number above 0, got nan"),
    ],
    ids=str,
)
def test_the_option_is_named_before_anything_is_made(
    options: dict[str, Any], message: str, latents: dict[str, Any], tmp_path: Path
) -> None:
    assert refused("--latents", **{**latents, **options}, num=2, out=tmp_path / "out").startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_run_that_made_nothing_leaves_the_folder_to_others(latents: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = "images 0 to 1: --table-mib must hold at least one step"
    assert message in refused("--latents", **latents, num=2, table_mib=1e-4, out=out)
    sampled("--latents", **latents, num=2, out=out)  # as the message says
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "settings.json").write_text("{}")
    refused("--latents", **latents, num=2, out=foreign)
    assert (foreign / "settings.json").read_text() == "{}"
