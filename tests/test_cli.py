"""The command line: help, versions, info, convert, and one line with exit code 2 for a user's mistake."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import ditfast
import ditfast.cli.info
from ditfast.cli.command import app
from ditfast.testing.inputs import random_batch, randomize_

CONFIG = ditfast.DiTConfig(depth=2, hidden_size=72, num_heads=2, num_classes=10, latent_size=(8, 4))


def _ditfast(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _refused(*arguments: str | Path) -> str:
    """The one line that answers a user's mistake."""
    result = _ditfast(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def model() -> ditfast.DiT:
    model = ditfast.DiT(CONFIG)
    randomize_(model)
    return model.eval()


@pytest.fixture
def official(model: ditfast.DiT, tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    ditfast.save_checkpoint(model, path)
    return path


def test_no_arguments_and_help_list_the_commands() -> None:
    for arguments in ([], ["--help"]):
        result = _ditfast(*arguments)
        for command in ("info", "convert", "bench"):
            assert command in result.output
    assert _ditfast("--help").exit_code == 0


def test_version() -> None:
    result = _ditfast("--version")
    assert (result.exit_code, result.stdout) == (0, f"ditfast {ditfast.__version__}\n")


@pytest.mark.quick
def test_the_module_is_the_command_and_help_waits_for_torch() -> None:
    script = (
        "import runpy, sys; sys.argv = ['ditfast', '--help']\n"
        "try: runpy.run_module('ditfast', run_name='__main__')\n"
        "finally: print('heavy:', [name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules])"
    )
    root = Path(ditfast.__file__).parents[1]
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "convert" in result.stdout
    assert result.stdout.endswith("heavy: []\n")


@pytest.mark.quick
def test_info_json() -> None:
    result = _ditfast("info", "--json")
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    assert facts["versions"]["ditfast"] == ditfast.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["devices"][0]["type"] == "cpu"
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert (facts["no_gpu"] is None) == torch.cuda.is_available()
    listed = [(entry["operator"], entry["backend"], entry["reason"]) for entry in facts["backends"]]
    assert listed == ditfast.ops.available_backends()
    assert all(entry["available"] == (entry["reason"] is None) for entry in facts["backends"])


@pytest.mark.parametrize(("value", "words"), [("1", "interpreter: on"), ("0", "interpreter: off")])
def test_info_says_whether_the_interpreter_is_on(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert words in _ditfast("info").stdout


def test_info_says_why_a_backend_is_unavailable() -> None:
    text = _ditfast("info").stdout
    for operator, backend, reason in ditfast.ops.available_backends():
        (line,) = (line for line in text.splitlines() if line.split()[:2] == [operator, backend])
        assert line.endswith(reason or "available")


def test_info_says_which_attention_a_shape_takes() -> None:
    facts = json.loads(_ditfast("info", "--json").stdout)
    assert {entry["shape"] for entry in facts["attention"]} == set(ditfast.cli.info.SHAPES)
    options = ("--attention", "100x3x20", "--dtype", "fp16")
    [entry] = json.loads(_ditfast("info", "--json", *options).stdout)["attention"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv = torch.empty(2, 100, 180, dtype=torch.float16, device=device)
    for training in (False, True):
        taken = ditfast.ops.attention_backend(qkv, 100, 20, training=training)
        assert entry["training" if training else "inference"] == taken
    assert entry["reasons"] == ditfast.ops.attention_backends(qkv, 3)
    text = _ditfast("info", *options).stdout
    assert f"100x3x20 fp16: {entry['inference']} in inference, {entry['training']} in training" in text
    assert all(reason in text for reason in entry["reasons"].values() if reason)


@pytest.mark.parametrize("shape", ["100x3", "100x3x0", "100x3xD", "2x100x3x20"])
def test_info_refuses_a_bad_shape(shape: str) -> None:
    result = _ditfast("info", "--attention", shape)
    assert result.exit_code == 2
    assert f"shape must look like 256x16x72 (T x H x head_dim), got {shape!r}" in result.stderr



@pytest.mark.quick
def test_convert_there_and_back_computes_the_same(model: ditfast.DiT, official: Path, tmp_path: Path) -> None:
    middle, last = tmp_path / "model.safetensors", tmp_path / "back.pt"
    # a model of no named size: the official file does not tell its heads
    result = _ditfast("convert", official, middle, "--to", "safetensors", "--num-heads", "2", "--image-size", "64x32")
    assert result.exit_code == 0, result.output
    assert str(middle) in result.stdout
    assert _ditfast("convert", middle, last, "--to", "official").exit_code == 0
    loaded = ditfast.load_checkpoint(last, num_heads=2)
    assert loaded.config == CONFIG
    inputs = random_batch(CONFIG, 3)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model(*inputs))


def test_convert_to_diffusers_is_refused_where_it_would_be_inexact(tmp_path: Path) -> None:
    square = ditfast.DiT(ditfast.DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=8))
    randomize_(square)
    source, folder = tmp_path / "model.safetensors", tmp_path / "folder"
    ditfast.save_checkpoint(square, source)
    assert "timestep" in _refused("convert", source, folder, "--to", "diffusers")
    assert not folder.exists()
    assert _ditfast("convert", source, folder, "--to", "diffusers", "--allow-inexact").exit_code == 0
    assert json.loads((folder / "config.json").read_text())["num_layers"] == 2


def test_convert_takes_the_weights_it_is_asked_for(model: ditfast.DiT, tmp_path: Path) -> None:
    source, target = tmp_path / "training.pt", tmp_path / "model.safetensors"
    ema = {name: tensor + 1 if name != "pos_embed" else tensor for name, tensor in model.state_dict().items()}
    best = {name: tensor.clone() for name, tensor in ema.items()}
    best["final_layer.linear.bias"] += 1
    torch.save({"model": model.state_dict(), "ema": ema, "best.3": best}, source)
    for weights, state in (("best.3", best), ("model", model.state_dict()), ("ema", ema), ("auto", ema)):
        result = _ditfast("convert", source, target, "--weights", weights, "--num-heads", "2")
        assert result.exit_code == 0, result.output
        loaded = ditfast.load_checkpoint(target).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.quick
def test_bad_input_is_one_line_and_exit_code_2(official: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    absent, text = tmp_path / "absent.pt", tmp_path / "text.pt"
    text.write_text("not a checkpoint, but a line of text")
    assert str(absent) in _refused("convert", absent, target)
    assert str(text) in _refused("convert", text, target)
    assert "num_heads" in _refused("convert", official, target)
    assert "image-size" in _refused("convert", official, target, "--num-heads", "2", "--image-size", "64by32")
    assert not target.exists()


def test_bad_usage_is_exit_code_2(official: Path, tmp_path: Path) -> None:
    for arguments in (
        ["convert", official],
        ["convert", official, tmp_path / "x", "--to", "onnx"],
        ["convert", official, tmp_path / "x", "--weights", "mean"],
        ["transmogrify"],
    ):
        result = _ditfast(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr


def test_traceback_shows_where_an_error_came_from(tmp_path: Path) -> None:
    result = _ditfast("--traceback", "convert", tmp_path / "absent.pt", tmp_path / "out.pt")
    assert isinstance(result.exception, ValueError)
    assert "absent.pt" in str(result.exception)


def test_an_error_that_is_no_users_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("ditfast.cli.info.collect", broken)
    result = _ditfast("info")
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("diffusers", "bench sample --device cpu", "samplers need the package diffusers, which is not installed"),
        ("diffusers", "bench cost --providers diffusers", "the package diffusers is not installed"),
        ("diffusers", "bench models --device cpu --providers diffusers", "the package diffusers is not installed"),
        ("torch_fidelity", "evaluate --npz x.npz --metrics is", "torch_fidelity is not installed"),
        ("matplotlib", "bench report RESULTS --out report", "the report's plots need matplotlib"),
    ],
)
def test_a_missing_package_is_one_line_that_says_how_to_get_it(
    package: str, arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = next((Path(__file__).resolve().parents[1] / "bench" / "results").glob("*.json"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    line = _refused(*arguments.replace("RESULTS", str(results)).split())
    assert message in line and re.search(r"pip install '?ditfast\[\w+\]", line)


@pytest.mark.parametrize(("name", "known"), [("no_such_package", True), ("ditfast.no_such_module", False)])
def test_a_module_of_our_own_that_is_missing_keeps_its_traceback(
    name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(ditfast.cli.info, "collect", fail)
    if known:
        assert _refused("info") == f"error: No module named {name!r}"
    else:
        assert isinstance(_ditfast("info").exception, ModuleNotFoundError)
    assert isinstance(_ditfast("--traceback", "info").exception, ModuleNotFoundError)
