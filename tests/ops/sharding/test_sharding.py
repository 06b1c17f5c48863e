"""DTensor arguments: sharded operators and models on two processes (gloo, CPU) beside the unsharded fp64 oracle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.subprocess


# several cases per pair of processes, whose start costs as much as a case
@pytest.mark.kernels
@pytest.mark.parametrize("cases", ["compiled operators rules", "operators_auto modules"])
def test_on_two_processes(cases):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("worker.py")), *cases.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout
