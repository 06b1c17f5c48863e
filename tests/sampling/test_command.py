"""``ditfast sample`` in one process: PNGs, npz, latents, continued runs."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditfast
from ditfast.files import PART
from ditfast.inference.engine import Engine
from ditfast.inference.guidance import Guidance
from ditfast.inference.samplers import Sampler
from ditfast.sampling import output
from ditfast.sampling.decode import Decoder
from ditfast.sampling.plan import Plan
from ditfast.sampling.work import Batch, start
from tests.sampling.conftest import (
    CONFIG,
    IMAGE,
    SHAPE,
    STEPS,
    arrays,
    files,
    make_checkpoint,
    refused,
    sample,
    sampled,
    stored_settings,
)

pytest.importorskip("diffusers", reason="needs the package diffusers")


def by_hand(assets: Path, labels: list[int], first: int, **guidance: Any) -> torch.Tensor:
    """The latents of a batch with these labels."""
    model = ditfast.load_checkpoint(assets / "tiny.safetensors")
    sampler = Sampler("ddpm", STEPS, in_channels=4)
    engine = Engine(model, sampler, Guidance(4.0, span=sampler.span, **guidance))
    begin = start(Batch(0, first, len(labels)), 0, None, CONFIG.num_classes, SHAPE)
    return engine(begin.noise, labels, begin.generators)


@pytest.mark.quick
def test_pngs_and_a_grid(assets: Path, images: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "new" / "images"
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {label}\n" for label in range(10)))
    options = {**images, "classes": "7,1", "num": 5, "class_file": names, "out": out}
    result = sampled(**options)
    assert result.stdout == f"{out / 'grid.png'}\n"
    assert re.search(r"^5 images in .* s, .* images/s$", result.stderr, re.MULTILINE)
    pngs = [f"{image:06d}.png" for image in range(5)]
    assert sorted(files(out)) == [*pngs, "grid.png", "settings.json"]
    decoder = Decoder(assets / "vae", 4)
    expected = np.concatenate([decoder(by_hand(assets, [7, 1, 7], 0)), decoder(by_hand(assets, [1, 7], 3))])
    for name, image, label in zip(pngs, expected, [7, 1, 7, 1, 7], strict=True):
        assert np.array_equal(output.load_png(out / name), image)
        with Image.open(out / name) as png:
            assert png.info["class"] == f"{label} thing {label}"
    assert len({image.tobytes() for image in expected}) == 5
    assert np.array_equal(output.load_png(out / "grid.png")[4 : 4 + 64 * 3 : 3, 4 : 4 + 32 * 3 : 3], expected[0])
    before = files(out)
    second_run = sampled(**options)
    assert second_run.stdout == result.stdout and "complete already" in second_run.stderr
    assert files(out) == before


def test_many_images_make_no_grid(images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "GRID_LIMIT", 3)
    assert sampled(**images, num=4, out=tmp_path).stdout == f"{tmp_path}\n"
    assert sorted(files(tmp_path)) == [*(f"{image:06d}.png" for image in range(4)), "settings.json"]


def test_imagenets_names(images: dict[str, Any], tmp_path: Path) -> None:
    config = ditfast.DiTConfig(**{**CONFIG.to_dict(), "num_classes": 1000})
    options = {**images, "checkpoint": make_checkpoint(tmp_path / "thousand.safetensors", config)}
    sampled(**options, class_names="golden retriever, otter", npz=tmp_path / "x.npz")
    assert arrays(tmp_path / "x.npz")[1].tolist() == [207, 360]
    line = refused(**options, class_names="goldn retriever", npz=tmp_path / "y.npz")
    assert "unknown class name 'goldn retriever' in ImageNet; the nearest: golden retriever (207)" in line
    assert "'crane' is ambiguous in ImageNet: 134 (crane) and 517 (crane)" in refused(
        **options, class_names="crane", npz=tmp_path / "y.npz"
    )


@pytest.mark.quick
def test_npz_for_the_evaluation_suite(assets: Path, images: dict[str, Any], tmp_path: Path) -> None:
    npz, out = tmp_path / "samples.npz", tmp_path / "png"
    assert sampled(**images, num=7, npz=npz).stdout == f"{npz}\n"
    assert os.listdir(tmp_path) == ["samples.npz"]
    array, labels = arrays(npz)
    assert array.shape == (7, *IMAGE) and array.dtype == np.uint8
    # labels come from the streams, in the order of the images
    assert labels.tolist() == start(Batch(0, 0, 7), 0, None, 10, SHAPE).labels
    sampled(**images, num=7, out=out)
    for image in range(7):
        assert np.array_equal(array[image], output.load_png(out / f"{image:06d}.png"))
    before = npz.read_bytes()
    assert "complete already" in sampled(**images, num=7, npz=npz).stderr
    assert npz.read_bytes() == before and os.listdir(tmp_path / "png").count("settings.json") == 1


def test_npz_with_a_folder_for_the_batches(images: dict[str, Any], tmp_path: Path) -> None:
    one, two, out = tmp_path / "one.npz", tmp_path / "two.npz", tmp_path / "work"
    sampled(**images, num=4, npz=one)
    sampled(**images, num=4, npz=two, out=out)
    assert one.read_bytes() == two.read_bytes()
    assert os.listdir(out) == ["settings.json"]


def test_latents_without_an_autoencoder(assets: Path, latents: dict[str, Any], tmp_path: Path) -> None:
    result = sampled("--latents", **latents, classes="7,1,7", out=tmp_path)
    assert result.stdout == f"{tmp_path / 'latents.npz'}\n"
    array, labels = arrays(tmp_path / "latents.npz")
    assert array.dtype == np.float32 and labels.tolist() == [7, 1, 7]
    assert np.array_equal(array, by_hand(assets, [7, 1, 7], 0).numpy())


def test_the_options_of_guidance_arrive(assets: Path, latents: dict[str, Any], tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> Any:
        sampled("--latents", **{**latents, **options}, classes="7,1,7", npz=tmp_path / f"{name}.npz")
        return arrays(tmp_path / f"{name}.npz")[0]

    assert np.array_equal(run("all", guided_channels="all"), by_hand(assets, [7, 1, 7], 0, channels="all").numpy())
    options = {"guidance_interval": "100,700", "guidance_rescale": 0.5, "guidance_power": 2}
    expected = by_hand(assets, [7, 1, 7], 0, interval=(100.0, 700.0), rescale=0.5, power=2.0)
    assert np.array_equal(run("shaped", **options), expected.numpy())
    model = ditfast.load_checkpoint(assets / "tiny.safetensors")
    begin = start(Batch(0, 0, 3), 0, None, 10, SHAPE)
    plain = Engine(model, Sampler("ddim", 5, in_channels=4))(begin.noise, [7, 1, 7], begin.generators)
    assert np.array_equal(run("plain", cfg_scale=1, sampler="ddim", steps=5), plain.numpy())


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler", "heun"])
def test_every_sampler(sampler: str, latents: dict[str, Any], tmp_path: Path) -> None:
    sampled("--latents", **latents, sampler=sampler, num=2, out=tmp_path)
    assert np.isfinite(arrays(tmp_path / "latents.npz")[0]).all()


def test_an_image_is_the_same_whatever_the_batch_size_within_rounding(latents: dict[str, Any], tmp_path: Path) -> None:
    results = {}
    for size in (1, 2, 6):
        options = {**latents, "batch_size": size, "num": 6, "npz": tmp_path / f"{size}.npz"}
        sampled("--latents", **options)
        results[size] = arrays(tmp_path / f"{size}.npz")
    for size in (1, 2):
        assert np.array_equal(results[size][1], results[6][1])
        # a GEMM of another height may sum in another order, which the steps carry on
        assert np.linalg.norm(results[size][0] - results[6][0]) <= 1e-4 * np.linalg.norm(results[6][0])


def test_two_runs_are_byte_equal_and_seeds_differ(images: dict[str, Any], tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        sampled(**images, num=4, seed=seed, npz=tmp_path / f"{name}.npz")
    one, two, three = ((tmp_path / f"{name}.npz").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_bf16_and_training_files(assets: Path, latents: dict[str, Any], tmp_path: Path) -> None:
    model = ditfast.load_checkpoint(assets / "tiny.safetensors")
    state = model.state_dict()
    zero = {name: tensor if name == "pos_embed" else torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": zero, "ema": state}, tmp_path / "training.pt")
    options = {**latents, "checkpoint": tmp_path / "training.pt", "num_heads": 2, "num": 2, "dtype": "bf16"}
    results = {}
    for weights in ("auto", "model"):
        # an official state dict gives the grid of 8 x 4 by its table alone
        sampled("--latents", **options, weights=weights, npz=tmp_path / f"{weights}.npz")
        results[weights] = arrays(tmp_path / f"{weights}.npz")[0]
    assert not np.array_equal(results["auto"], results["model"])


@pytest.mark.quick
def test_a_continued_run_writes_the_same_bytes(images: dict[str, Any], tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    sampled(**images, num=8, out=whole)
    sampled(**images, num=8, out=part)
    for image in (1, 6, 7):
        (part / f"{image:06d}.png").unlink()
    (part / "grid.png").unlink()
    (part / f".000001.png.01234567{PART}").write_bytes(b"half")
    result = sampled(**images, num=8, out=part)
    assert "5 images in" in result.stderr  # the two batches of three and two that were not whole
    assert files(part) == files(whole)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_an_interruption_keeps_finished_batches(
    kind: str, images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(name: str) -> dict[str, Any]:
        target = {"out": tmp_path / name} if kind == "png" else {"npz": tmp_path / f"{name}.npz"}
        return {**images, "num": 8, **target}

    compute, calls = Plan.compute, []

    def interrupted(self: Plan, batch: Batch, on_step: Any) -> Any:
        calls.append(batch.index)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT if kind == "png" else signal.SIGTERM)
        return compute(self, batch, on_step)

    monkeypatch.setattr(Plan, "compute", interrupted)
    result = sample(**options("a"))
    assert result.exit_code == 130
    assert result.stderr == "interrupted; 3 of 8 images are kept, the same command goes on\n"
    assert not (tmp_path / "a.npz").exists()
    sampled(**options("a"))
    assert calls == [0, 1, 1, 2]
    sampled(**options("b"))
    if kind == "npz":
        assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    else:
        assert files(tmp_path / "a") == files(tmp_path / "b")


def test_settings_leave_out_ranks_and_paths(images: dict[str, Any], tmp_path: Path) -> None:
    sampled(**images, num=2, out=tmp_path)
    settings = stored_settings(tmp_path)
    assert settings["checkpoint"].keys() == settings["vae"].keys() == {"bytes", "sha256"}
    assert settings["torch"] == torch.__version__ and settings["ditfast"] == ditfast.__version__
    assert settings["threads"] == torch.get_num_threads() == 1
    line = refused(**images, num=2, out=tmp_path, threads=2)
    assert "threads 2 (there: 1)" in line
    text = json.dumps(settings)
    assert "rank" not in text and str(tmp_path) not in text
