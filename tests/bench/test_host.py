"""The pytest-benchmark suites of bench/, run as a user runs them: from the repository's root, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import ditfast
from ditfast.environment import collect

ROOT = Path(__file__).resolve().parents[2]
# rounds cost no time here: what is timed is not looked at
QUICK = ("--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "--benchmark-min-time=0.000001")

OPERATOR = "bench/test_operator_overhead.py::test_operator_call[cpu-{}-{}-1x16x72-{}]"
WHO = ("ditfast", "formula")
DIRECTIONS = ("forward", "forward and backward")
MODES = ("forward", "cfg", "train")
MODEL = "bench/test_model_cpu.py::test_model[tiny-{}-1-{}]"

WRONG = """
from dataclasses import replace
from ditfast import DiT
from ditfast.testing.operators import OPERATORS

right = OPERATORS["layer_norm_modulate"]
OPERATORS["layer_norm_modulate"] = replace(right, fused=lambda **inputs: 1.001 * right.fused(**inputs))
forward = DiT.forward
DiT.forward = lambda self, *inputs: 1.001 * forward(self, *inputs)
"""

SPY = """
import json, os, sys

def pytest_sessionfinish(session):
    here = os.path.join(os.getcwd(), "bench", "")
    files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
    names = [name for name, file in files.items() if file.startswith(here) or "/ditfast/bench/" in file]
    state = {"path": sys.path, "modules": names, "interpreter": os.environ.get("TRITON_INTERPRET")}
    with open(os.environ["SPY"], "w") as file:
        json.dump(state, file)
"""


def run_bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # tests/ turns the interpreter on where there is no GPU
    # pytest-benchmark measures nothing where it takes itself for a process of xdist's
    left_out = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    # where this process finds ditfast, and the plugins of a test
    path = os.pathsep.join([str(Path(ditfast.__file__).parents[1]), environment.pop("PLUGINS", "")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.subprocess
def test_every_suite_passes_and_bench_is_not_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    # the larger model takes the same paths as the tiny one
    arguments = ("bench", "--benchmark-disable", "-k", "not DiT-S/8", "-p", "spy")
    result = run_bench(*arguments, PLUGINS=str(tmp_path), SPY=str(tmp_path / "spy.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout
    spied = json.loads((tmp_path / "spy.json").read_text())
    assert spied["interpreter"] is None
    assert "ditfast.bench.measure.judging" in spied["modules"]
    assert not [path for path in spied["path"] if Path(path).name == "bench"]
    # a module of bench/ by its bare name would be a second copy of it, or shadow a package of that name
    assert not [name for name in spied["modules"] if not name.startswith(("ditfast.bench.", "bench."))]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]], dict[str, Any]]:
    """(pytest's output, the timed benchmarks by name, the whole file) of a run with a wrong operator and model."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "wrong.py").write_text(WRONG)
    cases = [
        OPERATOR.format(name, direction, who)
        for name in ("layer_norm_modulate", "gated_residual")
        for direction in DIRECTIONS
        for who in WHO
    ]
    cases += [MODEL.format(mode, who) for mode in MODES for who in ("ditfast", "reference")]
    file = folder / "result.json"
    result = run_bench(*cases, *QUICK, "--benchmark-json", str(file), "-p", "wrong", PLUGINS=str(folder))
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    saved = json.loads(file.read_text())
    return result.stdout, {item["fullname"]: item for item in saved["benchmarks"]}, saved


@pytest.mark.subprocess
def test_wrong_cases_fail_and_are_not_timed(judged: tuple[str, dict[str, dict[str, Any]], Any]) -> None:
    output, timed, _ = judged
    right = {OPERATOR.format("gated_residual", d, who) for d in DIRECTIONS for who in WHO}
    right |= {OPERATOR.format("layer_norm_modulate", d, "formula") for d in DIRECTIONS}
    right |= {MODEL.format(mode, "reference") for mode in MODES}
    assert timed.keys() == right
    assert "5 failed, 9 passed" in output
    # forward, and forward with backward; then forward, cfg and train. Only where they are raised: in CI pytest says
    # each once more, at its end
    raised = [line for line in output.splitlines() if line.startswith("E ")]
    assert sum("AssertionError: layer_norm_modulate is not timed: {'output0': Verdict(" in line for line in raised) == 2
    assert sum("AssertionError: ditfast is not timed: parity failed: " in line for line in raised) == 3


@pytest.mark.subprocess
def test_groups_and_conditions_are_in_the_file(judged: tuple[str, dict[str, dict[str, Any]], Any]) -> None:
    _, timed, saved = judged
    environment = collect()
    assert saved["environment"]["packages"] == environment["packages"]
    ours, formula = (timed[OPERATOR.format("gated_residual", "forward and backward", who)] for who in WHO)
    assert ours["group"] == formula["group"] == "gated_residual, forward and backward, 1x16x72, cpu"
    assert timed[OPERATOR.format("gated_residual", "forward", "ditfast")]["group"] != ours["group"]
    assert ours["stats"]["rounds"] >= 1 and ours["stats"]["min"] > 0
    conditions = {
        "shapes": {"residual": [1, 16, 72], "branch": [1, 16, 72], "gate": [1, 72]},
        "dtype": "float32",
        "device": "cpu",
        "backend": "auto",
        "torch": metadata.version("torch"),
        "commit": environment["commit"],
        "dirty": environment["dirty"],
    }
    for item, who in zip((ours, formula), WHO, strict=True):
        info = item["extra_info"]
        assert info.pop("torch_threads") >= 1
        assert info == {**conditions, "implementation": who}
    model = timed[MODEL.format("cfg", "reference")]
    assert model["group"] == "tiny, cfg, batch 1"
    # guided: a conditional and an unconditional row for the one label
    assert model["extra_info"]["shapes"] == {"0": [2, 4, 16, 16], "1": [2], "2": [1]}
    assert model["extra_info"]["model"]["hidden_size"] == 128


@pytest.mark.subprocess
def test_without_the_plugin_the_message_says_so() -> None:
    result = run_bench("bench", "-p", "no:benchmark", "--benchmark-json", "never.json")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: bench/ needs the plugin pytest-benchmark" in result.stderr
    assert "pip install 'ditfast[bench]'" in result.stderr
    assert not (ROOT / "never.json").exists()


@pytest.mark.long
@pytest.mark.subprocess
def test_the_interpreter_is_not_timed() -> None:
    result = run_bench("bench", *QUICK, TRITON_INTERPRET="1")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "TRITON_INTERPRET must not be set, got '1'" in result.stderr
    assert "passed" not in result.stdout
