"""The processes that share a run: their ranks under torchrun, and the few messages between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# whoever is ahead waits for the rest of a run; torchrun ends the others where one process dies
_PATIENCE = timedelta(days=30)


class OtherFailed(Exception):
    """Another process has failed and says why; this one has nothing to add."""


class Processes:
    """This process among those that torchrun started; one alone without torchrun.

    Used as a context manager. They speak over gloo, whatever the device: a few small messages, not tensors.

    Attributes:
        rank: 0 for the one that checks, reports and puts the result together.
        size: how many there are.
        local_rank: this one's place on its machine, which chooses its GPU.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def __enter__(self) -> Processes:
        if self.size > 1:
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, function: Callable[[], T]) -> T:
        """Calls ``function`` in the first process, and returns its result in all.

        Raises:
            OtherFailed: in the others, where it raised in the first.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, False]
        error: BaseException | None = None
        if self.is_first:
            try:
                outcome = [function(), True]
            except Exception as raised:  # whatever it is, the others must not wait for an answer
                error = raised
        dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if not outcome[1]:
            raise OtherFailed
        result: T = outcome[0]
        return result

    def device(self, name: str | None) -> torch.device:
        """The device of this process: cuda is this one's GPU where there are several processes.

        Args:
            name: "cpu", "cuda", "cuda:N", or None for a GPU where there is one.

        Raises:
            ValueError: no such device here, or one GPU named for several processes.
        """
        try:
            device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
        if device.type == "cpu":
            return device
        if device.index is not None and self.size > 1:
            raise ValueError(f"--device must be cuda for {self.size} processes, each takes its own GPU; got {name!r}")
        # the first process knows how many are on a machine, and checks for all
        index = self.local_rank if device.index is None else device.index
        last = index if device.index is not None else int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1
        if max(index, last) >= torch.cuda.device_count():
            raise ValueError(
                f"--device needs GPU {max(index, last)} here, and torch sees {torch.cuda.device_count()}; "
                "cpu needs none, and torchrun's --nproc-per-node at most one process a GPU"
            )
        return torch.device("cuda", index)
