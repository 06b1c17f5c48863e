"""Files that are broken, hostile or another model's are refused; the error names file, tensor and expectation."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ditfast import DiT, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.checkpoint.files import CheckpointError, convert
from ditfast.testing.inputs import randomize_

TINY = DiTConfig(depth=2, hidden_size=24, num_heads=2, latent_size=8, num_classes=10)
QKV = "blocks.1.attn.qkv.weight"


def _state(config: DiTConfig = TINY) -> dict[str, Any]:
    return randomize_(DiT(config)).state_dict()


def _write(path: Path, content: Any, metadata: dict[str, str] | None = None) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path, metadata=metadata)
    else:
        torch.save(content, path)
    return path


def _message(path: Path, **options: Any) -> str:
    """The message of a refused load; it always names the file."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **{"num_heads": 2, **options})
    assert str(path) in str(caught.value)
    return str(caught.value)


class _Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def _bare_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def _legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.quick
@pytest.mark.parametrize("write", [torch.save, _legacy, _bare_pickle])
@pytest.mark.parametrize("location", ["entry", "args", "whole"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, write: Callable[[Any, Path], None], location: str) -> None:
    canary = tmp_path / "canary"
    content: Any = {"ema": _state(), "args": argparse.Namespace(model=_Canary(canary))}
    if location == "entry":
        content = {**_state(), "x": _Canary(canary)}
    elif location == "whole":
        content = _Canary(canary)
    path = tmp_path / "a.pt"
    write(content, path)
    message = _message(path)
    if (
        write is not _bare_pickle
    ):  # a bare pickle is refused before its content is read
        assert f"refused, because its pickle calls for {os.mkdir.__module__}.mkdir" in message
        assert "weights_only" not in message  # torch's own advice is to switch the guard off
    assert not canary.exists()
    pickle.loads(pickle.dumps(_Canary(canary)))  # unguarded, the canary does run
    assert canary.exists()


def test_only_the_namespace_is_allowed(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "a.pt", {"ema": _state(), "args": argparse.Namespace(results=Path("results"), lr=1e-4)}
    )
    assert "refused, because its pickle calls for pathlib" in _message(path)
    path = _write(
        tmp_path / "b.pt", {"ema": _state(), "args": argparse.Namespace(results="results", lr=1e-4)}
    )
    load_checkpoint(path, num_heads=2)
    with pytest.raises(pickle.UnpicklingError):  # and only while ditfast loads
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_at_any_point(tmp_path: Path, suffix: str) -> None:
    content = _write(tmp_path / f"whole{suffix}", _state()).read_bytes()
    path = tmp_path / f"a{suffix}"
    cuts = {1, 4, 8, 9, 100, len(content) - 1, *(len(content) * i // 16 for i in range(1, 16))}
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        message = _message(path)
        assert "truncated or damaged" in message or "not a checkpoint" in message
    assert "truncated or damaged" in message


def test_a_truncated_file_of_torch_before_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    _legacy(_state(), path)
    content = path.read_bytes()
    for cut in (1, 2, 50, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        assert "truncated or damaged PyTorch file" in _message(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"a", "not a checkpoint; wanted a PyTorch file, a safetensors file, or a folder of diffusers or accelerate"),
        (b"Dear reader, this is a text.\n", "not a checkpoint"),
        (b"A text {with a brace} in place", "not a checkpoint"),
        (b"{1: 'a'}{", "damaged safetensors file"),
        (b"\x00" * 4096, "not a checkpoint"),
        (b"PK\x03\x04" + b"\x00" * 64, "truncated or damaged PyTorch file"),
        (b"\x80\x02.", "truncated or damaged PyTorch file"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert message in _message(path)


def test_missing_files_and_broken_configs(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in _message(tmp_path / "none.pt")
    save_checkpoint(DiT(replace(TINY, timestep_freq_shift=1.0)), tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("{")
    assert "config.json: not valid JSON" in _message(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("[]")
    assert "wanted a JSON object, got list" in _message(tmp_path / "folder")
    (tmp_path / "folder" / "diffusion_pytorch_model.safetensors").unlink()
    assert "no weights in this folder or in transformer/; wanted diffusers' config.json and" in _message(
        tmp_path / "folder"
    )


def test_truncated_weights_in_a_folder(tmp_path: Path) -> None:
    save_checkpoint(DiT(replace(TINY, timestep_freq_shift=1.0)), tmp_path / "folder")
    weights = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "diffusion_pytorch_model.safetensors: truncated or damaged" in _message(tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "wanted a state dict or a training file, got a list"),
        (torch.zeros(3), "wanted a state dict or a training file, got a Tensor"),
        ({}, "holds no tensors"),
        ({"ema": {}}, "['ema']: holds no tensors"),
        ({"model": [1]}, "got a list under 'model'"),
        ({"state_dict": {"a": torch.zeros(3)}}, "['state_dict']: tensor 'x_embedder.proj.weight' is missing"),
        ({3: torch.zeros(3)}, "got a Tensor under 3"),
        (
            {"fc.weight": torch.zeros(3)},
            "tensor 'x_embedder.proj.weight' is missing; wanted a DiT's state dict",
        ),
    ],
)
def test_contents_that_are_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    assert message in _message(_write(tmp_path / "a.pt", content))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", 7, "got a int under 'step'"),
        (QKV, torch.zeros(72, 24, dtype=torch.int8), f"tensor '{QKV}' must be dense and float32,"),
        (QKV, torch.zeros(72, 24, dtype=torch.float8_e4m3fn), "got torch.strided, torch.float8_e4m3fn"),
        (QKV, torch.eye(24).to_sparse(), "got torch.sparse_coo"),
        (QKV, torch.zeros(72, 23), f"1 of the wrong shape: {QKV} (72, 23) (wanted (72, 24))"),
        ("extra.weight", torch.zeros(3), "1 unexpected: extra.weight (3,)"),
        ("blocks.4.x", torch.zeros(3), "tensors 'blocks.2.*' are missing; wanted blocks 0 to 4"),
        ("x_embedder.proj.weight", torch.zeros(24, 4), "must have 4 non-empty dimensions, got shape (24, 4)"),
        ("x_embedder.proj.weight", torch.zeros(24, 4, 2, 0), "must have 4 non-empty dimensions"),
        ("x_embedder.proj.weight", torch.zeros(24, 4, 2, 4), "must be square, got 2x4"),
        ("final_layer.linear.weight", torch.zeros(17, 24), "must have 16 rows (patch_size^2 * channels)"),
        (
            "blocks.0.adaLN_modulation.1.weight",
            torch.zeros(48, 24),
            "must have 144 rows (adaln_zero) or 96 (adaln)",
        ),
        ("y_embedder.embedding_table.weight", torch.zeros(1, 24), "num_classes must be at least 1, got 0"),
        ("t_embedder.mlp.0.weight", torch.zeros(24, 255), "frequency_embedding_size must be even"),
    ],
)
def test_one_wrong_entry(tmp_path: Path, name: str, value: Any, message: str) -> None:
    assert message in _message(_write(tmp_path / "a.pt", {**_state(), name: value}))


@pytest.mark.quick
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_missing_and_unexpected_are_counted_and_five_named(tmp_path: Path, suffix: str) -> None:
    state = {
        name: value
        for name, value in _state().items()
        if "blocks.1.mlp" not in name and "attn.proj" not in name
    }
    state |= {f"ema_{i}": torch.zeros(i) for i in range(1, 8)}
    message = _message(_write(tmp_path / f"a{suffix}", state))
    assert "not those of DiT(2 x 24, 2 heads)/2 (adaln_zero)" in message
    assert "8 missing: blocks.0.attn.proj.weight (24, 24), " in message
    assert "7 unexpected: ema_1 (1,), ema_2 (2,), ema_3 (3,), ema_4 (4,), ema_5 (5,), ..." in message


def test_training_files_without_the_requested_weights(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.pt", {"model": _state(), "opt": {}})
    assert "no 'ema' in it; it holds 'model'" in _message(path, weights="ema")
    path = _write(tmp_path / "b.pt", _state())
    assert "no 'ema' in it: this is a bare state dict, wanted a training file" in _message(
        path, weights="ema"
    )
    path = _write(tmp_path / "c.pt", {"ema": {**_state(), QKV: torch.zeros(2)}})
    assert (
        "c.pt['ema']: the tensors are not those of DiT(2 x 24, 2 heads)/2 (adaln_zero); "
        f"1 of the wrong shape: {QKV}" in (_message(path))
    )


@pytest.mark.parametrize(
    "metadata",
    [
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        "{}x",
        '{"depth": "two"}',
        '{"widht": 3}',
        '{"num_heads": 5}',
        '{"depth": 0}',
    ],
)
def test_broken_metadata(tmp_path: Path, metadata: str) -> None:
    path = _write(tmp_path / "a.safetensors", _state(), {"ditfast_config": metadata})
    assert "metadata 'ditfast_config' is no DiTConfig in JSON: " in _message(path)


def test_metadata_that_does_not_fit_the_tensors(tmp_path: Path) -> None:
    def written(config: DiTConfig) -> Path:
        return _write(tmp_path / "a.safetensors", _state(), {"ditfast_config": json.dumps(config.to_dict())})

    assert load_checkpoint(written(TINY)).config == TINY
    assert "missing: blocks.2.attn.qkv.weight" in _message(written(replace(TINY, depth=3)))
    assert "the configuration has 1000000000 blocks" in _message(written(replace(TINY, depth=10**9)))
    assert "'pos_embed' is the table of a grid of 4x4 patches, wanted 2x8" in _message(
        written(replace(TINY, latent_size=(4, 16)))
    )
    assert "the file holds a model of num_heads=2 (wanted 3)" in _message(written(TINY), num_heads=3)


def test_another_model_than_the_named_one(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.pt", _state())
    message = (
        "wanted DiT-XL/2, but the file holds another model: depth=2 (wanted 28), hidden_size=24 (wanted 1152)"
    )
    assert message in _message(path, model="DiT-XL/2", num_heads=None)
    with pytest.raises(ValueError, match=r"model must be one of DiT-S/2.*did you mean 'DiT-XL/2'"):
        load_checkpoint(path, model="DiT-XL-2")


def test_another_grid_than_the_file_holds(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.pt", _state())
    assert "holds 16 positions; latent_size (16, 16) in patches of 2 wants 64" in _message(
        path, image_size=128
    )
    message = "'pos_embed' is the table of a grid of 4x4 patches, wanted 2x8 (latent_size (4, 16))"
    assert message in _message(path, latent_size=(4, 16))
    assert message in _message(path, config=replace(TINY, latent_size=(4, 16)))
    assert "latent_size height must be a multiple of patch_size=2" in _message(path, latent_size=(9, 8))


def test_a_config_that_does_not_fit(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.pt", _state())
    message = _message(path, config=replace(TINY, num_classes=7))
    assert "1 of the wrong shape: y_embedder.embedding_table.weight (11, 24) (wanted (8, 24))" in message
    message = _message(path, config=replace(TINY, conditioning="in_context"))
    assert (
        "missing: blocks.0.norm1.weight (24,), " in message
        and "unexpected: blocks.0.adaLN_modulation" in message
    )
    assert "num_heads=2 (wanted 3)" in _message(path, config=TINY, num_heads=3)


def test_a_class_count_that_could_mean_two_things(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.pt", _state(replace(TINY, class_dropout_prob=0.0, num_classes=11)))
    assert "has 11 rows: 11 classes, or 10 and the null class; give config=" in _message(path, num_classes=11)
    for config in (TINY, replace(TINY, num_classes=11, class_dropout_prob=0.0)):
        loaded = load_checkpoint(path, config=config, num_classes=11)
        assert loaded.config == replace(config, num_classes=11)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (TypeError, {"weights": None}, "weights must be auto, ema, model or the name of an entry, got None"),
        (TypeError, {"weights": ""}, "weights must be auto, ema, model or the name of an entry, got ''"),
        (ValueError, {"dtype": torch.int8}, "dtype must be one of torch.float32, .* got torch.int8"),
        (TypeError, {"config": {}}, "config must be a DiTConfig, got dict"),
        (TypeError, {"image_size": 64, "latent_size": 8}, "give image_size or latent_size, not both"),
        (ValueError, {"image_size": 100}, r"image_size must be .* multiples of 8, got 100"),
        (ValueError, {"latent_size": (8, 8, 8)}, r"latent_size must be an int or \(height, width\)"),
        (ValueError, {"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_load(tmp_path: Path, error: type[Exception], options: Any, message: str) -> None:
    path = _write(tmp_path / "a.pt", _state())
    with pytest.raises(error, match=message):
        load_checkpoint(path, **{"num_heads": 2, **options})


def test_wrong_arguments_of_save(tmp_path: Path) -> None:
    model = DiT(TINY)
    with pytest.raises(TypeError, match="model must be a ditfast.DiT or ditfast.reference.DiT, got Linear"):
        save_checkpoint(nn.Linear(2, 2), tmp_path / "a.pt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="to must be one of official, safetensors, diffusers, got 'onnx'"):
        save_checkpoint(model, tmp_path / "a.pt", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"to must be given where the suffix does not imply it .* got .*a\.bin"
    ):
        save_checkpoint(model, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"path must have a suffix of the format 'safetensors', got .*a\.pt"):
        save_checkpoint(model, tmp_path / "a.pt", to="safetensors")
    with pytest.raises(ValueError, match="path must be in a folder that exists"):
        save_checkpoint(model, tmp_path / "none" / "a.pt")
    with pytest.raises(ValueError, match="path must be a file for official"):
        save_checkpoint(model, tmp_path, to="official")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="path must be a folder for diffusers"):
        save_checkpoint(model, tmp_path / "file")
    with torch.device("meta"):
        absent = DiT(TINY)
    with pytest.raises(ValueError, match="its pos_embed is on the meta device"):
        save_checkpoint(absent, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="to must be given"):
        convert(tmp_path / "none.pt", tmp_path / "a.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_refused_conversion_leaves_no_file(tmp_path: Path) -> None:
    broken: dict[str, Tensor] = {**_state(), QKV: torch.zeros(2)}
    with pytest.raises(CheckpointError, match=QKV):
        convert(_write(tmp_path / "a.pt", broken), tmp_path / "b.safetensors", num_heads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 4_000_000_000, "num_heads": 2, "depth": 2}, "no model has the configuration's sizes"),
        ({"num_heads": 2, "depth": 2, "latent_size": [8_000_000, 8_000_000]}, "tokens, at most"),
    ],
)
def test_hostile_sizes_are_refused_before_memory_is_taken(tmp_path: Path, sizes: Any, message: str) -> None:
    path = _write(tmp_path / "m.safetensors", _state(), {"ditfast_config": json.dumps(sizes)})
    assert message in _message(path, num_heads=None)


def test_torchs_advice_to_switch_the_guard_off_is_not_relayed(tmp_path: Path) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(_Canary(tmp_path / "canary"), protocol=4))
    message = _message(path)
    assert "weights_only" not in message
    assert "nothing in it was run" in message
    assert not (tmp_path / "canary").exists()
