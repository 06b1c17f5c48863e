"""Every script in examples/ runs, and finds that what it accelerated agrees with what it did not."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.subprocess


def run(*arguments: str) -> str:
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


def test_there_are_examples() -> None:
    assert {"official_style.py", "sit_style.py", "fsdp2_training.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example(script: str) -> None:
    source = (ROOT / "examples" / script).read_text()
    if re.search(r"^\s*(from|import) diffusers\b", source, re.MULTILINE) and not importlib.util.find_spec("diffusers"):
        pytest.skip("needs the package diffusers")
    launcher = TORCHRUN if "torchrun" in source else []
    agreement(run(*launcher, f"examples/{script}"))


def test_fsdp2_training_alone() -> None:
    printed = run("examples/fsdp2_training.py")
    agreement(printed)
    assert "accelerated on 1:" in printed
