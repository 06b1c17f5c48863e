"""Every script in examples/ runs, and finds that what it accelerated agrees with what it did not."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
DISTRIBUTED = "fsdp2_training.py"
SHARED = "official_style"  # which other examples import
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_here(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the script prints as the main module of this process, which has imported torch already."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.syspath_prepend(ROOT / "examples")
    # for the processes that it starts
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    try:
        runpy.run_path(f"examples/{script}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr()
    finally:
        sys.modules.pop(SHARED, None)
    return capsys.readouterr().out


def run_alone(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def agreement(printed: str) -> None:
    assert re.search(r"^agreement: .*\bok$", printed, re.MULTILINE), printed
    assert "FAILED" not in printed


def needs_diffusers(script: str) -> None:
    source = (ROOT / "examples" / script).read_text()
    if re.search(r"^\s*(from|import) diffusers\b", source, re.MULTILINE) and not importlib.util.find_spec("diffusers"):
        pytest.skip("needs the package diffusers")


def test_there_are_examples() -> None:
    assert {"official_style.py", "sit_style.py", DISTRIBUTED} <= set(SCRIPTS)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != DISTRIBUTED])
def test_an_example(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needs_diffusers(script)
    agreement(run_here(script, monkeypatch, capsys))


@pytest.mark.long
@pytest.mark.subprocess
def test_fsdp2_training_in_two_processes() -> None:
    printed = run_alone(*TORCHRUN, f"examples/{DISTRIBUTED}")
    agreement(printed)
    assert "accelerated on 2:" in printed


@pytest.mark.long
@pytest.mark.subprocess
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_in_a_fresh_interpreter(script: str) -> None:
    needs_diffusers(script)
    printed = run_alone(f"examples/{script}")
    agreement(printed)
    assert script != DISTRIBUTED or "accelerated on 1:" in printed
