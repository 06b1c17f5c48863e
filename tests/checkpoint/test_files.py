"""Official and safetensors checkpoints: what comes back, what is inferred or changed on load, safe saves."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import ditfast
from ditfast import MODELS, DiT, DiTConfig, load_checkpoint, reference, save_checkpoint
from ditfast.checkpoint.files import CheckpointError, convert
from ditfast.checkpoint.infer import infer_config
from ditfast.config import CONDITIONINGS
from ditfast.reference import ops
from ditfast.testing.inputs import random_batch, randomize_

TINY = DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=(8, 12), num_classes=10)
TABLE = "y_embedder.embedding_table.weight"


def _random(config: DiTConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    model = DiT(config).to(dtype)
    randomize_(model, seed)
    return model.eval()


def _training_file(path: Path, **entries: Any) -> Path:
    args = argparse.Namespace(model="DiT-XL/2", image_size=256)
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"opt": optimizer, "args": args, **entries}, path)
    return path


def _equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first
    )


@pytest.mark.quick
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_round_trip_of_every_design(tmp_path: Path, suffix: str, conditioning: Any) -> None:
    config = replace(TINY, conditioning=conditioning, qk_norm=suffix == ".pth", learn_sigma=suffix != ".ckpt")
    model = _random(config)
    save_checkpoint(model, tmp_path / f"model{suffix}")
    loaded = load_checkpoint(tmp_path / f"model{suffix}", num_heads=2)
    assert type(loaded) is ditfast.DiT and not loaded.training
    assert loaded.config == config
    assert _equal(loaded, model)
    batch = random_batch(config, 3)
    with torch.no_grad():
        assert torch.equal(loaded(*batch), model(*batch))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_official_files_are_bare_state_dicts_and_the_reference_saves_too(tmp_path: Path) -> None:
    model = reference.DiT(TINY)
    randomize_(model)
    save_checkpoint(model, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(content) == list(model.state_dict())
    assert all(type(value) is Tensor for value in content.values())
    reference.DiT(TINY).load_state_dict(content, strict=True)


@pytest.mark.quick
def test_safetensors_carries_what_tensors_cannot_show(tmp_path: Path) -> None:
    config = replace(
        TINY,
        num_heads=3,
        norm1_eps=1e-4,
        norm2_eps=1e-5,
        timestep_freq_shift=1.0,
        class_dropout_prob=0.0,
        mlp_ratio=2.5,
    )
    model = _random(config)
    with torch.no_grad():
        model.pos_embed.mul_(0.5)  # no grid's table
    save_checkpoint(model, tmp_path / "a.safetensors")
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert loaded.config == config and _equal(loaded, model)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert DiTConfig.from_dict(json.loads(file.metadata()["ditfast_config"])) == config
    # without the metadata the config is inferred from the tensors as far as possible
    safetensors.torch.save_file(model.state_dict(), tmp_path / "b.safetensors")
    inferred = load_checkpoint(tmp_path / "b.safetensors", num_heads=3, latent_size=(8, 12), num_classes=9)
    assert inferred.config == DiTConfig(
        depth=2, hidden_size=72, num_heads=3, latent_size=(8, 12), num_classes=9, mlp_ratio=2.5
    )


def test_safetensors_whose_first_byte_opens_a_pickle(tmp_path: Path) -> None:
    """The file begins with its header's length: one in 32 has the byte that a bare pickle begins with."""
    config = replace(TINY, timestep_freq_shift=1.0, norm2_eps=1e-5)
    model, path = _random(config), tmp_path / "m.safetensors"
    save_checkpoint(model, path)
    with safe_open(path, framework="pt") as handle:
        metadata = dict(handle.metadata())
    for padding in range(0, 512, 8):
        safetensors.torch.save_file(model.state_dict(), path, metadata={**metadata, "padding": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no padding gave the byte")
    assert load_checkpoint(path).config == config
    assert load_checkpoint(path.rename(tmp_path / "m.other")).config == config


@pytest.mark.quick
@pytest.mark.parametrize("weights", ["auto", "ema", "model"])
def test_training_files(tmp_path: Path, weights: Any) -> None:
    model, ema = _random(seed=1), _random(seed=2)
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    path = _training_file(tmp_path / "0050000.pt", model=wrapped, ema=ema.state_dict())
    loaded = load_checkpoint(path, weights=weights, num_heads=2)
    assert _equal(loaded, model if weights == "model" else ema)


def test_auto_takes_the_model_where_there_is_no_ema(tmp_path: Path) -> None:
    model = _random()
    path = _training_file(tmp_path / "a.pt", model=model.state_dict(), ema=None)
    assert _equal(load_checkpoint(path, num_heads=2), model)


def test_files_of_torch_before_zip(tmp_path: Path) -> None:
    model = _random()
    torch.save(model.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert _equal(load_checkpoint(tmp_path / "a.pt", num_heads=2), model)


# every patch size with every design, every width with three of the four
_NAMED = [(name, CONDITIONINGS[place % len(CONDITIONINGS)]) for place, name in enumerate(MODELS)]


@pytest.mark.parametrize(("name", "conditioning"), _NAMED)
def test_config_of_named_models_is_inferred(name: str, conditioning: Any) -> None:
    config = DiTConfig.named(name, image_size=(256, 512), conditioning=conditioning, num_classes=7)
    with torch.device("meta"):
        state = reference.DiT(config).state_dict()
    state["pos_embed"] = ops.sincos_position_table(config.hidden_size, *config.grid_size).float().unsqueeze(0)
    assert infer_config(state, "x.pt", model=name) == config
    assert infer_config(state, "x.pt") == config


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("latent_size", [(2, 2), (4, 16), (16, 4), (2, 32), (6, 10)])
def test_the_grid_is_read_from_the_position_table(latent_size: Any, dtype: torch.dtype) -> None:
    config = replace(TINY, latent_size=latent_size, hidden_size=24)
    state = DiT(config).to(dtype).state_dict()
    assert infer_config(state, "x.pt", num_heads=2) == config


def test_a_grid_that_is_not_in_the_table_is_asked_for(tmp_path: Path) -> None:
    model = _random()
    with torch.no_grad():
        model.pos_embed.normal_()
    save_checkpoint(model, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"'pos_embed' holds 24 positions .* give latent_size= or image_size="
    ):
        load_checkpoint(tmp_path / "a.pt", num_heads=2)
    sizes: list[dict[str, Any]] = [{"latent_size": (8, 12)}, {"image_size": (64, 96)}]
    for size in sizes:
        loaded = load_checkpoint(tmp_path / "a.pt", num_heads=2, **size)
        assert loaded.config == TINY and _equal(loaded, model)


def test_the_number_of_heads_is_asked_for_or_read_from_qk_norm(tmp_path: Path) -> None:
    save_checkpoint(_random(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="give num_heads= or config="):
        load_checkpoint(tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", config=TINY).config == TINY
    config = replace(TINY, num_heads=6, qk_norm=True)
    save_checkpoint(_random(config), tmp_path / "b.pt")
    assert load_checkpoint(tmp_path / "b.pt").config == config


@pytest.mark.parametrize("num_classes", [4, 10, 13])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_changing_the_class_count(tmp_path: Path, num_classes: int, dropout: float) -> None:
    model = _random(replace(TINY, class_dropout_prob=dropout))
    save_checkpoint(model, tmp_path / "a.safetensors")
    loaded = load_checkpoint(tmp_path / "a.safetensors", num_classes=num_classes)
    assert loaded.config == replace(TINY, class_dropout_prob=dropout, num_classes=num_classes)
    old, new = model.state_dict(), loaded.state_dict()
    shared = min(10, num_classes)
    assert new[TABLE].shape[0] == loaded.config.num_embeddings
    assert torch.equal(new[TABLE][:shared], old[TABLE][:shared])
    fresh = new[TABLE][shared:num_classes]
    if dropout:
        assert torch.equal(new[TABLE][-1], old[TABLE][-1])
        # the null class predicts what it did, under its new label
        (x, t, _), y = random_batch(TINY, 3), torch.full((3,), 10)
        with torch.no_grad():
            assert torch.equal(loaded(x, t, torch.full((3,), num_classes)), model(x, t, y))
    if fresh.numel():
        assert 0.01 < fresh.std() < 0.03 and fresh.std(dim=1).min() > 0
    assert all(torch.equal(old[key], new[key]) for key in old if key != TABLE)


def test_new_rows_come_from_torchs_generator(tmp_path: Path) -> None:
    save_checkpoint(_random(), tmp_path / "a.safetensors")
    tables = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tables.append(load_checkpoint(tmp_path / "a.safetensors", num_classes=12).state_dict()[TABLE])
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_or_converted(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    model, path = _random(dtype=dtype), tmp_path / f"a{suffix}"
    save_checkpoint(model, path)
    assert _equal(load_checkpoint(path, num_heads=2), model)
    assert _equal(load_checkpoint(path, num_heads=2, dtype=torch.float32), model.float())


def test_mixed_dtypes(tmp_path: Path) -> None:
    state = _random(dtype=torch.bfloat16).state_dict()
    state["pos_embed"] = ops.sincos_position_table(72, 4, 6).float().unsqueeze(0)
    torch.save(state, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt", num_heads=2)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"].float()
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(
        CheckpointError, match=r"b\.pt.*bfloat16 .*float32 \(final_layer.linear.bias\); give dtype="
    ):
        load_checkpoint(tmp_path / "b.pt", num_heads=2)
    loaded = load_checkpoint(tmp_path / "b.pt", num_heads=2, dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    # the rounded table is on the same grid, and no bit is invented
    assert torch.equal(loaded.state_dict()["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_training_a_loaded_model_leaves_the_file_alone_and_the_file_the_model(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    save_checkpoint(_random(), path)
    content = path.read_bytes()
    loaded = load_checkpoint(path, num_heads=2).train()
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1)
    loaded(*random_batch(TINY, 3)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(loaded.final_layer.linear.bias, _random().final_layer.linear.bias)
    assert path.read_bytes() == content
    untrained = load_checkpoint(path, num_heads=2)
    with open(path, "r+b") as file:
        file.write(b"\0" * len(content))
    assert _equal(untrained, _random())


def test_files_are_mapped_and_weights_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(_random(), tmp_path / "a.pt")
    load, initialize = torch.load, reference.DiT.initialize_weights
    calls: list[dict[str, Any]] = []
    devices: set[str] = set()

    def spy_load(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return load(*args, **options)

    def spy_initialize(self: reference.DiT) -> None:
        devices.update(parameter.device.type for parameter in self.parameters())
        initialize(self)

    monkeypatch.setattr(torch, "load", spy_load)
    monkeypatch.setattr(reference.DiT, "initialize_weights", spy_initialize)
    load_checkpoint(tmp_path / "a.pt", num_heads=2)
    assert len(calls) == 1 and calls[0]["mmap"] is True and calls[0]["weights_only"] is True
    assert devices == {"meta"}


def test_tied_and_viewed_weights_are_saved_whole_and_alone(tmp_path: Path) -> None:
    model = _random()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        flat = torch.randn(1000)
        model.blocks[0].attn.proj.bias = nn.Parameter(flat[100:172])
    for name in ("a.pt", "a.safetensors"):
        save_checkpoint(model, tmp_path / name)
        loaded = load_checkpoint(tmp_path / name, num_heads=2)
        assert _equal(loaded, model)
        first, second = (loaded.get_parameter(f"blocks.{i}.mlp.fc1.weight") for i in range(2))
        assert first.data_ptr() != second.data_ptr()
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["blocks.0.attn.proj.bias"].untyped_storage().nbytes() == 72 * 4


def _fail_midway(*args: Any, **_: Any) -> None:
    path = next(Path(arg) for arg in args if isinstance(arg, (str, os.PathLike)))
    path.write_bytes(b"half")
    raise RuntimeError("the disk is full")


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.quick
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a"])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("step", "failure"), [("write", _fail_midway), ("write", _interrupt), ("os.replace", _interrupt)]
)
def test_a_failed_save_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, existing: bool, step: str, failure: Any
) -> None:
    config = replace(TINY, latent_size=8, timestep_freq_shift=1.0 if name == "a" else 0.0)
    if existing:
        save_checkpoint(_random(config, seed=1), tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    writer = "torch.save" if name == "a.pt" else "safetensors.torch.save_file"
    with monkeypatch.context() as patch:
        patch.setattr(writer if step == "write" else step, failure)
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            save_checkpoint(_random(config, seed=2), tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert existing or not list(tmp_path.iterdir())
    save_checkpoint(_random(config, seed=2), tmp_path / name)
    assert _equal(load_checkpoint(tmp_path / name, num_heads=2), _random(config, seed=2))


@pytest.mark.quick
def test_saving_over_the_loaded_file_and_through_a_link(tmp_path: Path) -> None:
    save_checkpoint(_random(), tmp_path / "a.pt")
    (tmp_path / "link.pt").symlink_to("a.pt")
    loaded = load_checkpoint(tmp_path / "link.pt", num_heads=2)
    with torch.no_grad():
        loaded.final_layer.linear.bias.add_(1.0)
    save_checkpoint(loaded, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and {p.name for p in tmp_path.iterdir()} == {"a.pt", "link.pt"}
    assert _equal(load_checkpoint(tmp_path / "a.pt", num_heads=2), loaded)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_files_get_the_usual_permissions(tmp_path: Path, name: str) -> None:
    (tmp_path / "plain").touch()
    save_checkpoint(_random(), tmp_path / name)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_convert(tmp_path: Path) -> None:
    model, ema = _random(seed=1), _random(seed=2)
    path = _training_file(tmp_path / "0050000.pt", model=model.state_dict(), ema=ema.state_dict())
    assert convert(path, tmp_path / "a.safetensors", num_heads=2) == TINY
    assert _equal(load_checkpoint(tmp_path / "a.safetensors"), ema)
    convert(path, tmp_path / "b.bin", to="official", num_heads=2, weights="model", dtype=torch.bfloat16)
    assert _equal(load_checkpoint(tmp_path / "b.bin", num_heads=2), model.bfloat16())


def test_an_official_file_cannot_say_other_constants(tmp_path: Path) -> None:
    model = _random(replace(TINY, timestep_freq_shift=1.0, norm2_eps=1e-5))
    message = r"a\.pt.*norm2_eps becomes 1e-06 instead of 1e-05, timestep_freq_shift becomes 0.*t=100.*allow_"
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(model, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
    save_checkpoint(model, tmp_path / "a.pt", allow_inexact=True)
    assert load_checkpoint(tmp_path / "a.pt", num_heads=2).config == TINY
    assert _equal(load_checkpoint(tmp_path / "a.pt", config=model.config), model)
    assert load_checkpoint(tmp_path / "a.pt", config=model.config).config == model.config
