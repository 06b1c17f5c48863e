"""Runs the checks of ``ditfast verify`` in separate processes: an error that outlives its check fails it alone.

A process runs the checks of one group in turn and sends each row at once. If it dies or hangs, another process goes on
after the check it was at.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait

import torch

from ...environment import cpu_cores
from ..measure.preparing import computes
from ..measure.processes import describe_exit, end_with_parent
from ..records.rows import VerifyRow
from .verify import Check, failed, groups, run_check

# all kernels of all checks together compile within minutes, so a check that takes this long never ends
LIMIT_SECONDS = 300.0

_MOST_JOBS = 8  # at once on one GPU: each holds a CUDA context of hundreds of megabytes
_POLL_SECONDS = 1.0
_STOP_SECONDS = 5.0


def run_checks(
    checks: Sequence[Check], device: torch.device, jobs: int | None = None, limit: float = LIMIT_SECONDS
) -> Generator[VerifyRow, None, None]:
    """The row of every check, as it is made: in their order within a group. Close it to end the processes.

    Args:
        checks: those to run.
        device: a CPU or CUDA device.
        jobs: processes at once; by default one a group on a GPU, as far as cores suffice and up to eight. On a CPU one
            job, the default, is this process: nothing there outlives its check, but what hangs or dies has no limit.
        limit: seconds after which a check that has not ended is failed, and its process killed.

    Raises:
        ValueError: jobs below 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    parts, cores = groups(checks), cpu_cores() or 1
    if jobs is None:
        jobs = 1 if device.type == "cpu" else min(cores, _MOST_JOBS)
    if device.type == "cpu" and jobs == 1:
        return (run_check(item, device) for item in checks)
    jobs = max(1, min(jobs, len(parts)))
    return _in_processes(parts, device, jobs, max(1, cores // jobs), limit)


def _in_processes(
    parts: Sequence[Sequence[Check]], device: torch.device, jobs: int, threads: int, limit: float
) -> Generator[VerifyRow, None, None]:
    waiting = deque(parts)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(waiting.popleft(), device, threads, limit))
            # not for long: a process that dies need not close its end of the pipe, where one it started has it too
            wait([worker.connection for worker in workers], _POLL_SECONDS)
            for worker in list(workers):
                yield from worker.receive()
                if worker.over:
                    workers.remove(worker)
                    worker.kill()
                    if worker.left:
                        waiting.appendleft(worker.left)
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A process that runs checks one after another.

    Attributes:
        connection: receives its rows.
        left: the checks without a row; the first is running.
        over: whether it sends no more rows.
    """

    def __init__(self, checks: Sequence[Check], device: torch.device, threads: int, limit: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child_end = context.Pipe(duplex=False)
        arguments = (child_end, tuple(checks), str(device), threads)
        # a daemon: it ends with this process whatever ends that in order; _serve sees to the rest
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        child_end.close()
        self.left, self.over, self._begun = list(checks), False, False
        # until it answers for the first time it is importing: that is no check's time
        self._obstacle = ""  # its reason, if it cannot begin
        self._limit, self._since, self._allowed = limit, time.monotonic(), max(limit, LIMIT_SECONDS)

    def receive(self) -> list[VerifyRow]:
        """The rows sent so far; if it died or hangs, also a failed row for the check it was at."""
        died = self._process.exitcode is not None  # read first: then all its rows have arrived
        rows = []
        try:
            while not self.over and self.connection.poll():
                row, goes_on = self.connection.recv()
                if isinstance(row, str):
                    self._obstacle = row
                    continue
                self._since, self._allowed, self._begun = time.monotonic(), self._limit, True
                if row is not None:
                    rows.append(row)
                    del self.left[0]
                    self.over = not goes_on
        except (EOFError, OSError):
            self._process.join(_STOP_SECONDS)
            died = True
        overdue = time.monotonic() - self._since > self._allowed
        if not self.over and (died or overdue):
            death = f"its process died: {describe_exit(self._process.exitcode)}"
            reason = death if died else f"killed: it had not ended after {self._allowed:.0f} s"
            if self._begun:
                rows.append(failed(self.left.pop(0), reason))
            else:  # another one would do no better, for one check after another
                rows += [failed(item, f"no process could begin: {self._obstacle or reason}") for item in self.left]
                self.left = []
            self.over = True
        return rows

    def kill(self) -> None:
        """Kills the process: with a broken CUDA context an orderly end may hang."""
        self._process.kill()
        self._process.join(_STOP_SECONDS)
        self.connection.close()


def _serve(connection: Connection, checks: Sequence[Check], device_name: str, threads: int) -> None:
    """A worker's process: sends (None, True) when it is ready, or (why not, False); then (row, whether another one
    follows)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's interruption is the parent's to handle
    end_with_parent(signal.SIGKILL)
    faulthandler.enable()  # a segmentation fault says on stderr where it was
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except Exception as error:  # such as a GPU that takes one process only
        connection.send((f"{type(error).__name__}: {error}", False))
        raise
    connection.send((None, True))
    for index, item in enumerate(checks, 1):
        row = run_check(item, device)
        goes_on = index < len(checks) and (not row.note or computes(device))
        connection.send((row, goes_on))
        if not goes_on:
            break
    os._exit(0)  # all is handed in
