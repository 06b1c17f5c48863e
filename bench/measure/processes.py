"""Child processes: ending them with their parent, and describing how one ended."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """On Linux, sends this process the signal when its parent is killed; else it would go on, holding the device."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def describe_exit(code: int | None) -> str:
    """``"signal SIGKILL"`` or ``"exit code 3"`` of multiprocessing's exit code; None is a process that lives."""
    if code is None:
        return "it does not answer"
    if code >= 0:
        return f"exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    return f"signal {known.get(-code, -code)}"
