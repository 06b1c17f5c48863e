"""Made-up checks for ditfast verify; a worker's process finds what they run by name, here."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from ditfast.bench.prove import processes
from ditfast.bench.prove.verify import Check
from ditfast.parity import Verdict

Verdicts = dict[str, Verdict]


def made_up(subject: str, judge: Callable[[torch.device], Verdicts], group: str = "made up") -> Check:
    return Check(subject, "torch", "fp32", (group, "fp32"), judge)


def passes(device: torch.device) -> Verdicts:
    """Its tensor's name tells the process."""
    return {str(os.getpid()): Verdict(1e-8, 1e-8, 2e-8)}


def misses(device: torch.device) -> Verdicts:
    return {"good": Verdict(1e-8, 1e-8, 2e-8), "bad": Verdict(float("inf"), 1e-8, 2e-8)}


def raises(device: torch.device) -> Verdicts:
    raise RuntimeError("no kernel\n   for [/this]")


def breaks_the_device(device: torch.device) -> Verdicts:
    """Like an illegal memory access: every later use of the device fails in this process."""
    processes.computes = lambda device: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def is_killed(device: torch.device) -> Verdicts:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def leaves(device: torch.device) -> Verdicts:
    os._exit(3)


def hangs(device: torch.device) -> Verdicts:
    print(os.getpid(), file=sys.stderr, flush=True)
    time.sleep(600)
    raise AssertionError


def interrupts_the_parent(path: str, device: torch.device) -> Verdicts:
    """Once it has written the file, as it does after a row."""
    while not os.path.exists(path):
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGINT)
    return hangs(device)
