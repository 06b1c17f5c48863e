"""Accelerated models under torch's own engines: two processes, gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# functions of distributed_worker.py, which check themselves
CASES = ["ddp", "fsdp2", "fsdp2_bf16", "fsdp2_checkpointed", "refused_after_sharding", "tensor_parallel"]
BY_THE_KERNELS = ["fsdp2_kernels"]

pytestmark = pytest.mark.subprocess


@pytest.fixture(scope="module")
def output():
    """The output of one run of all cases, up to the first failure."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    ran = subprocess.run(
        [sys.executable, worker, *CASES, *BY_THE_KERNELS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return ran.stdout


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.kernels) for case in BY_THE_KERNELS)])
def test_on_two_processes(case, output):
    assert all(f"rank {rank} passed {case}" in output for rank in (0, 1)), output
