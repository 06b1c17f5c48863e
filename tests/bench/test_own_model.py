"""``ditfast explain`` and ``ditfast bench --provider-module``: a user's own model by PATH:FACTORY."""

from __future__ import annotations

import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ditfast.bench.cases.factory import make_model
from ditfast.bench.suites import own_model
from ditfast.bench.suites.own_model import first_tensor
from ditfast.cli.command import app
from tests.adapters.foreign_models import Model, inputs

CPU = torch.device("cpu")
FILE = """
import torch
from tests.adapters.foreign_models import Model, inputs

def make():
    return Model(depth=1), inputs()

def alone():
    return Model(depth=1)

def other():
    return torch.nn.Linear(2, 2), torch.randn(3, 2)

def number():
    return 3

def broken():
    raise KeyError("a bug")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(FILE)
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_explain_prints_the_report(file: Path) -> None:
    result = invoke("explain", f"{file}:make")
    assert result.exit_code == 0, result.output
    assert "blocks.0.attn" in result.stdout and "4 accelerated, 0 skipped" in result.stdout
    assert invoke("explain", f"{file}:make", "--level", "model").exit_code == 2
    entries = json.loads(invoke("explain", f"{file}:alone", "--json", "--no-check").stdout)
    assert {entry["status"] for entry in entries} == {"accelerated"} and len(entries) == 4


@pytest.mark.parametrize("factory", ["scripts_of_mine/script.py:make", "package_of_mine.module:make"])
def test_a_factory_file_with_imports(factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file imports its neighbours and from the working directory, as a script or module does."""
    script = "/" in factory
    folder = tmp_path / ("scripts_of_mine" if script else "package_of_mine")
    folder.mkdir()
    (folder / "neighbour_of_mine.py").write_text(FILE)
    (tmp_path / "settings_of_mine.py").write_text("")
    neighbour = "neighbour_of_mine" if script else "package_of_mine.neighbour_of_mine"
    own_file = folder / ("script.py" if script else "module.py")
    own_file.write_text(f"import settings_of_mine\nfrom {neighbour} import make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    result = invoke("explain", factory)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("my_model", "a factory must look like PATH:FACTORY"),
        ("absent.py:make", "absent.py:make cannot be loaded: FileNotFoundError"),
        ("no_such_module:make", "no_such_module:make cannot be loaded: ModuleNotFoundError"),
        ("{file}:nothing", "cannot be loaded: AttributeError"),
        ("{file}:number", "must return a torch.nn.Module, or one and its inputs, got int"),
        ("{file}:broken", "failed: KeyError: 'a bug'"),
        ("{file}:other", "model (Linear) has nothing that ditfast can accelerate"),
    ],
)
def test_bad_factories(factory: str, message: str, file: Path) -> None:
    result = invoke("explain", factory.format(file=file))
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_single_tensor_is_an_input(file: Path) -> None:
    _, inputs = make_model(f"{file}:other")
    assert len(inputs) == 1 and inputs[0].shape == (3, 2)
    assert make_model(f"{file}:alone")[1] == ()


@pytest.mark.parametrize("compiler", [None, "no compiler here"])
def test_before_and_after(compiler: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_model, "compile_unavailable", lambda device: compiler)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model = Model(depth=1)
    before = copy.deepcopy(model.state_dict())
    report, rows = own_model.before_after(model, inputs(), CPU, torch.float32, 1e-3)
    assert len(report.accelerated) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(row.mode, row.provider) for row in rows] == [
        (mode, name) for mode in ("forward", "train") for name in ("before", "before-compile", "ditfast")
    ]
    for row in rows:
        if row.provider == "before-compile" and compiler:
            assert (row.status, row.note) == ("unavailable", compiler)
            continue
        assert row.status == "ok" and row.ms is not None
        assert row.parity is (True if row.is_ours else None)
        assert (row.speedup is not None) == row.is_ours


def test_without_parity_there_is_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real = own_model.ditfast.accelerate

    def wrongly(model: nn.Module, **options: Any) -> object:
        report = real(model, **options)
        with torch.no_grad():
            model.blocks[0].mlp.fc2.bias += 0.1  # type: ignore[index, union-attr]
        return report

    monkeypatch.setattr(own_model.ditfast, "accelerate", wrongly)
    monkeypatch.setattr(own_model, "compile_unavailable", lambda device: "no compiler here")
    _, rows = own_model.before_after(Model(depth=1), inputs(), CPU, torch.float32, 1e-3)
    ours = [row for row in rows if row.is_ours]
    assert [row.parity for row in ours] == [False, False] and {row.speedup for row in ours} == {None}


@pytest.mark.compiler
def test_the_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # traced as a user's is; the C++ that follows is torch's, and takes half a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    result = invoke("bench", "--provider-module", f"{file}:make", "--seconds", "0.01", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "4 accelerated" in result.stdout and "before-compile" in result.stdout
    for options, message in (
        (("--batch", 3), "--provider-module takes --dtype (once), --device and --seconds"),
        (("--dtype", "fp32", "--dtype", "bf16"), "--provider-module takes --dtype (once)"),
    ):
        refused = invoke("bench", "--provider-module", f"{file}:make", *options)
        assert refused.exit_code == 2 and message in refused.stderr
    alone = invoke("bench", "--provider-module", f"{file}:alone")
    assert alone.exit_code == 2 and "must return (model, inputs) for a benchmark" in alone.stderr


def test_outputs_that_hold_a_tensor() -> None:
    tensor = torch.zeros(2)

    class Output:
        sample = tensor

    tensors: list[Tensor] = [first_tensor(out) for out in (tensor, (tensor, 1), [tensor], Output())]
    assert all(value is tensor for value in tensors)
    with pytest.raises(TypeError, match="the model must give a tensor"):
        first_tensor({"out": tensor})
