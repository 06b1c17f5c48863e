"""Providers in separate processes: compilation, allocator and faults of one do not affect the others.

A worker serves one provider for a whole run, case after case. It builds the same weights and inputs as every other
process, judges the provider there, and takes samples when it is asked to, so that the variants of a case still take
turns.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch

from ..cases.case import Case
from ..cases.providers import Provider, get_provider, load_plugins
from ..records.rows import ModelRow, Status
from .preparing import Prepared, empty_cache, explain, make_work, prepare, trial_bytes
from .processes import describe_exit, end_with_parent

Isolate = Literal["auto", "all", "none"]

_STOP_SECONDS = 5.0
_ANSWER_SECONDS = 600.0  # compiling a large model and autotuning it takes minutes, a deadlock for ever


class ProviderFailed(Exception):
    """A provider that could not be prepared, or failed while it was timed; carries its status and note."""

    def __init__(self, status: Status, note: str) -> None:
        super().__init__(note)
        self.status, self.note = status, note


def wants_isolation(provider: Provider, device: torch.device, isolate: Isolate) -> bool:
    """Whether a provider runs in a process of its own: by default those that ask for it, on a GPU."""
    return isolate == "all" or (isolate == "auto" and provider.isolate and device.type == "cuda")


class Worker:
    """A process that prepares and times one provider.

    Args:
        provider: its name in the registry, as a fresh process finds it.
        device: a CPU or CUDA device.
        seed: of weights and inputs.
        plugins: modules or files that register providers, loaded first.
    """

    def __init__(self, provider: str, device: torch.device, seed: int, plugins: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context("spawn")
        self.provider = provider
        self._connection, child_end = context.Pipe()
        arguments = (child_end, provider, str(device), seed, tuple(plugins), torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        child_end.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def prepare(self, case: Case) -> ModelRow:
        """The row of the prepared provider, without its time.

        Raises:
            ProviderFailed: it failed, or its process died.
        """
        row: ModelRow = self._ask("prepare", case)
        return replace(row, isolated=True)

    def sample(self, calls: int) -> float:
        """Seconds of that many calls back to back."""
        seconds: float = self._ask("sample", calls)
        return seconds

    def saved_bytes(self) -> int | None:
        """As ``Prepared.saved_bytes``, of what it prepared."""
        count: int | None = self._ask("saved_bytes", None)
        return count

    def trial_bytes(self, case: Case) -> int:
        """Peak bytes of the provider in a case, neither judged nor timed.

        Raises:
            ProviderFailed: it failed, for want of memory or otherwise, or its process died.
        """
        self.begin_trial(case)
        return self.finish_trial()

    def begin_trial(self, case: Case) -> None:
        """Begins :meth:`trial_bytes`, for workers that make theirs side by side."""
        self._send("trial", case)

    def finish_trial(self) -> int:
        """Its end."""
        count: int = self._answer("trial")
        return count

    def rest(self) -> None:
        """Has it hand cached memory back until it is sampled again."""
        self._ask("rest", None)

    def trim(self) -> None:
        """Has it hand cached memory back between samples."""
        self._ask("trim", None)

    def release(self) -> None:
        """Has it let go of the case."""
        if self.alive:
            try:
                self._ask("release", None)
            except ProviderFailed:
                self.close()

    def end(self) -> None:
        """Asks the process to end, and does not wait."""
        self._connection.close()  # which it takes as the end

    def close(self) -> None:
        """Ends the process."""
        self.end()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, request: str, argument: object) -> Any:
        self._send(request, argument)
        return self._answer(request)

    def _send(self, request: str, argument: object) -> None:
        with contextlib.suppress(OSError):  # a process that has died gives no answer either
            self._connection.send((request, argument))

    def _answer(self, request: str) -> Any:
        try:
            if not self._connection.poll(_ANSWER_SECONDS):
                self._process.kill()
                note = f"its process gave no answer to {request!r} within {_ANSWER_SECONDS:.0f} s"
                raise ProviderFailed("error", note)
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_STOP_SECONDS)
            raise ProviderFailed("error", f"its process died: {describe_exit(self._process.exitcode)}") from None
        except KeyboardInterrupt:
            self._process.kill()  # its answer would be taken for that to the next question
            raise
        if kind == "failed":
            raise ProviderFailed(*value)
        return value


@dataclass
class Remote:
    """A provider prepared in a worker; stands where a Prepared does."""

    row: ModelRow
    worker: Worker

    def sample(self, calls: int) -> float:
        return self.worker.sample(calls)

    def rest(self) -> None:
        self.worker.rest()

    def trim(self) -> None:
        self.worker.trim()

    def close(self) -> None:
        self.worker.release()


def _serve(
    connection: Connection, name: str, device_name: str, seed: int, plugins: Sequence[str], threads: int
) -> None:
    """The worker's process: answers until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's interruption is the parent's to handle
    end_with_parent(signal.SIGKILL)
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    prepared: Prepared | None = None
    while True:
        try:
            request, argument = connection.recv()
        except EOFError:
            return
        try:
            value: object = None
            if request in ("prepare", "trial"):
                load_plugins(plugins)
                provider = get_provider(name)
                if device.type == "cuda":
                    torch.cuda.set_device(device)
            if request == "trial":
                value = trial_bytes(provider, argument, device, seed)
            elif request == "prepare":
                work, judge = make_work(argument, device, seed)
                prepared = prepare(provider, work, judge)
                value = prepared.row
                del work, judge
                gc.collect()  # the oracle's memory, which a neighbour may need
                empty_cache(device)
                gc.freeze()  # as timing does in its own process: compilation leaves millions of objects to walk
            elif request == "release":
                gc.unfreeze()
                if prepared is not None:
                    prepared.close()
                prepared = None
            elif prepared is None:
                raise RuntimeError("nothing is prepared")
            elif request == "rest":
                prepared.rest()
            elif request == "trim":
                prepared.trim()
            elif request == "saved_bytes":
                value = prepared.saved_bytes()
            else:
                value = prepared.sample(argument)
            answer: tuple[str, object] = ("done", value)
        except Exception as error:  # the parent makes a row of it
            answer = ("failed", explain(error))
        try:
            connection.send(answer)
        except OSError:
            return

