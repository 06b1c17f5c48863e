"""Folders: diffusers' variants and shards, training folders, accelerate's; others are refused by name."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint
from torch import Tensor

from ditfast import DiT, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.checkpoint.files import CheckpointError
from ditfast.checkpoint.read import read
from ditfast.testing.inputs import randomize_

# what diffusers' class can hold
CONFIG = DiTConfig(
    depth=2,
    hidden_size=24,
    num_heads=2,
    latent_size=8,
    num_classes=10,
    norm2_eps=1e-5,
    timestep_freq_shift=1.0,
)
STEM = "diffusion_pytorch_model"


def _model(seed: int) -> DiT:
    return randomize_(DiT(CONFIG), seed).eval()


raw, ema = _model(1), _model(2)


def _same(path: Path, model: DiT, **options: Any) -> bool:
    state, loaded = model.state_dict(), load_checkpoint(path, **options).state_dict()
    return all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
        for name, value in state.items()
    )


def _plain(path: Path, model: DiT, **options: Any) -> bool:
    return _same(path, model, num_heads=2, **options)


def _refused(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **{"num_heads": 2, **options})
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves the raw model as diffusers itself does."""
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    ours = tmp_path_factory.mktemp("ours")
    save_checkpoint(raw, ours)

    def save(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        diffusers.DiTTransformer2DModel.from_pretrained(ours, torch_dtype=dtype).save_pretrained(
            folder, **options
        )
        return folder

    return save


@pytest.mark.quick
@pytest.mark.parametrize("shard", [{}, {"max_shard_size": "40KB"}], ids=["whole", "sharded"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_diffusers_writes_is_read(
    tmp_path: Path, saved: Any, shard: Any, safe: bool, variant: str | None
) -> None:
    dtype = torch.float32 if variant is None else torch.float16
    folder = saved(
        tmp_path / "pipeline" / "transformer", dtype, variant=variant, safe_serialization=safe, **shard
    )
    written = {path.name for path in folder.iterdir()}
    assert len(written) > 3 if shard else len(written) == 2
    rounded = _model(1).to(dtype)
    for path in (folder, tmp_path / "pipeline"):
        assert _same(path, rounded)
        assert {file.name for file in read(path, "auto").files} == written
    # a path to one of the files is enough if its config.json lies beside it
    weights_file = next(path for path in folder.iterdir() if path.name != "config.json" and "-of-" not in path.name)
    assert _same(weights_file, rounded)
    (folder / "config.json").unlink()
    for path in (weights_file, folder):
        assert (
            "names are those of diffusers' DiTTransformer2DModel, which needs its config.json; give the folder"
            in _refused(path)
        )


def test_the_plain_file_goes_before_its_variants(tmp_path: Path, saved: Any) -> None:
    saved(tmp_path, torch.float16, variant="fp16")
    saved(tmp_path, torch.bfloat16, variant="bf16")
    message = f"several that could be meant: '{STEM}.bf16', '{STEM}.fp16'; choose one by name"
    assert message in _refused(tmp_path)
    assert _same(tmp_path, _model(1).half(), weights="fp16") and _same(
        tmp_path, _model(1).bfloat16(), weights="bf16"
    )
    saved(tmp_path, safe_serialization=False)
    assert _same(tmp_path, raw) and _same(tmp_path, raw, weights="model")
    shutil.copy(tmp_path / f"{STEM}.fp16.safetensors", tmp_path / f"{STEM}.non_ema.safetensors")
    assert _same(tmp_path, raw) and _same(tmp_path, _model(1).half(), weights="non_ema")
    shutil.copy(tmp_path / f"{STEM}.fp16.safetensors", tmp_path / f"{STEM}.ema.safetensors")
    assert _same(tmp_path, _model(1).half()) and _same(tmp_path, raw, weights="model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda values: values["weight_map"].update({"proj_out_2.bias": "../secret.safetensors"}),
            "got ../secret.safetensors",
        ),
        (
            lambda values: values["weight_map"].update({"proj_out_2.bias": "/etc/passwd"}),
            "beside the index, got /etc/passwd",
        ),
        (
            lambda values: values["weight_map"].update({"proj_out_2.bias": "a\\b"}),
            "beside the index, got a\\b",
        ),
        (lambda values: values["weight_map"].update({"proj_out_2.bias": ".."}), "beside the index, got .."),
        (lambda values: values["weight_map"].update({"proj_out_2.bias": 3}), "shards are missing: 3"),
        (
            lambda values: values["weight_map"].update({"proj_out_2.bias": "x.bin"}),
            "1 of {} shards are missing: x.bin",
        ),
        (
            lambda values: values["weight_map"].update({"proj_out_9.bias": "{}"}),
            "tensor 'proj_out_9.bias' is missing, which",
        ),
        (lambda values: values["weight_map"].pop("proj_out_2.bias"), "1 missing: proj_out_2.bias (32,)"),
        (lambda values: values.pop("weight_map"), "no index of shards, a JSON object with a 'weight_map'"),
        (lambda values: values.update(weight_map=[1]), "no index of shards"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, saved: Any, change: Any, message: str) -> None:
    saved(tmp_path, max_shard_size="40KB")
    index = tmp_path / f"{STEM}.safetensors.index.json"
    shards = sorted(path.name for path in tmp_path.glob("*-of-*"))
    values = json.loads(index.read_text())
    change(values)
    index.write_text(json.dumps(values).replace('"{}"', f'"{shards[0]}"'))
    assert message.replace("{}", str(len(shards) + 1)) in _refused(tmp_path)


def test_missing_shards(tmp_path: Path, saved: Any) -> None:
    saved(tmp_path, max_shard_size="40KB")
    first = sorted(tmp_path.glob("*-of-*"))[0]
    first.unlink()
    assert f"shards are missing: {first.name}" in _refused(tmp_path)
    (tmp_path / f"{STEM}.safetensors.index.json").write_text("{")
    assert "index.json: no index of shards" in _refused(tmp_path)


def test_a_training_folder_of_diffusers(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    save_checkpoint(raw, folder / "transformer")
    torch.save({"state": {}}, folder / "optimizer.bin")
    assert _same(folder, raw) and _same(folder, raw, weights="model")
    assert "no 'ema' in it; it holds 'transformer'" in _refused(folder, weights="ema")
    save_checkpoint(ema, folder / "transformer_ema")
    (folder / "transformer_ema" / "config.json").write_text(
        json.dumps(
            {**json.loads((folder / "transformer/config.json").read_text()), "decay": 0.9, "power": 0.7}
        )
    )
    assert _same(folder, ema) and _same(folder, ema, weights="transformer_ema")
    assert _same(folder, raw, weights="model") and _same(folder / "transformer", raw)
    # diffusers' EMAModel, registered for accelerate's checkpoints
    shutil.rmtree(folder / "transformer_ema")
    torch.save(
        {"decay": 0.9, "shadow_params": [*ema.state_dict().values()]}, folder / "custom_checkpoint_0.pkl"
    )
    assert "holds an average that cannot be taken" in _refused(folder)
    assert "custom_checkpoint_0.shadow_params" in _refused(folder)
    assert _same(folder, raw, weights="model")


def _accelerate(folder: Path, state: dict[str, Tensor], safe: bool = True) -> Path:
    """What ``Accelerator.save_state`` leaves."""
    folder.mkdir(exist_ok=True)
    if safe:
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")
    torch.save({"step": 3}, folder / "random_states_0.pkl")
    return folder


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_accelerate(tmp_path: Path, safe: bool) -> None:
    folder = _accelerate(tmp_path / "a", raw.state_dict(), safe)
    options = {"config": CONFIG}
    assert _same(folder, raw, **options) and _same(folder, raw, weights="model", **options)
    torch.save({"steps": 3}, folder / "custom_checkpoint_0.pkl")
    assert _same(folder, raw, **options)
    # another model's weights: nothing says that they are an average
    torch.save(ema.state_dict(), folder / "custom_checkpoint_1.pkl")
    assert "'custom_checkpoint_1', 'model'; choose one by name" in _refused(folder)
    assert _same(folder, ema, weights="custom_checkpoint_1", **options) and _same(
        folder, raw, weights="model", **options
    )
    torch.save({"ema": ema.state_dict(), "decay": 0.9}, folder / "custom_checkpoint_1.pkl")
    assert _same(folder, ema, **options) and _same(folder, raw, weights="model", **options)
    # a pickle that would run code is not read, so it may hold an average
    torch.save({"path": Path("x"), "ema": ema.state_dict()}, folder / "custom_checkpoint_1.pkl")
    assert "it could run code: custom_checkpoint_1; weights='model'" in _refused(folder)
    assert _same(folder, raw, weights="model", **options)


def test_accelerates_shards_and_averages_beside(tmp_path: Path) -> None:
    state, folder = raw.state_dict(), tmp_path
    halves = [dict(list(state.items())[:10]), dict(list(state.items())[10:])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for half, name in zip(halves, names, strict=True):
        safetensors.torch.save_file(half, folder / name)
    weight_map = {key: name for half, name in zip(halves, names, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert _same(folder, raw, config=CONFIG) and len(read(folder, "auto").files) == 3
    for subfolder in ("ema", "model_ema"):
        (folder / subfolder).mkdir()
        torch.save(ema.state_dict(), folder / subfolder / "pytorch_model.bin")
        assert _same(folder, ema, config=CONFIG) and _same(folder, raw, config=CONFIG, weights="model")
        shutil.rmtree(folder / subfolder)
    save_checkpoint(ema, folder / "ema.pt", allow_inexact=True)
    assert _same(folder, ema, config=CONFIG) and _same(folder, raw, config=CONFIG, weights="model")


def test_a_folder_of_torchs_distributed_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, target = tmp_path / "step 3", tmp_path / "out.pt"
    content = {"app": {"model": raw.state_dict(), "ema": ema.state_dict(), "step": 3}}
    torch.distributed.checkpoint.save(content, checkpoint_id=folder, no_dist=True)
    for path in (folder, folder / ".metadata", folder / "__0_0.distcp"):
        with pytest.raises(
            CheckpointError, match="unpickles what it reads, so the folder must be one that you trust"
        ) as caught:
            load_checkpoint(path)
    command = re.search(r"python (-m .* OUT\.pt);", str(caught.value))
    assert command
    # the command that the message gives, as it stands
    _, module, *arguments = shlex.split(command[1])
    monkeypatch.setattr(sys, "argv", [module, *arguments[:-1], str(target)])
    monkeypatch.delitem(sys.modules, module, raising=False)
    runpy.run_module(module, run_name="__main__")
    assert _same(target, ema, config=CONFIG) and _same(target, raw, config=CONFIG, weights="model")
    # the place of FSDP's own shards in accelerate's folder
    outer = tmp_path / "accelerate"
    shutil.copytree(folder, outer / "pytorch_model_fsdp_0")
    assert "dcp_to_torch" in _refused(outer) and str(outer / "pytorch_model_fsdp_0") in _refused(outer)
    torch.save({"steps": 3}, outer / "custom_checkpoint_0.pkl")
    assert "dcp_to_torch" in _refused(outer)
    # raw weights are not taken if the average is in such a folder
    os.rename(outer / "pytorch_model_fsdp_0", outer / "ema")
    _accelerate(outer, raw.state_dict())
    assert "holds an average that cannot be taken" in _refused(outer)
    assert _same(outer, raw, config=CONFIG, weights="model")


def test_a_folder_of_deepspeed_and_one_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "zero_to_fp32.py").write_text("raise SystemExit")
    assert f"python {tmp_path}/zero_to_fp32.py {tmp_path} OUT" in _refused(tmp_path)
    (tmp_path / "zero_to_fp32.py").unlink()
    assert "no weights in this folder or in transformer/; wanted diffusers' config.json" in _refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save({"fc.weight": torch.zeros(3)}))
    assert "tensor 'x_embedder.proj.weight' is missing" in _refused(tmp_path)
