"""Accelerated models under torch's own engines: two processes each, gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.subprocess


@pytest.mark.parametrize(
    "case", ["ddp", "fsdp2", "fsdp2_bf16", "fsdp2_checkpointed", "refused_after_sharding", "tensor_parallel"]
)
def test_on_two_processes(case):
    run(case)


@pytest.mark.kernels
def test_fsdp2_on_the_kernels():
    run("fsdp2_kernels")


def run(case):
    """Runs a case of distributed_worker.py, which checks itself."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("distributed_worker.py")), case],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout
