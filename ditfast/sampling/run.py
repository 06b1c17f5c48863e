"""A sampling run from a checkpoint to files: what ``ditfast sample`` does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .folder import RunFolder
from .plan import Plan
from .processes import OtherFailed, Processes
from .progress import Progress, progress
from .request import Request
from .work import Batch, share

_LOOK = 0.5  # seconds between looks whether the other processes are done


class Interrupted(Exception):
    """Ctrl-C or SIGTERM in the middle; the message says what is kept."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to: where to look, the images sampled now, and how long that took."""

    path: Path
    images: int
    seconds: float


def sample(request: Request) -> Outcome | None:
    """Samples, or goes on with what an interrupted run of the same request left; under torchrun, this process's part.

    Returns:
        The outcome in the first process, None in the others.

    Raises:
        ValueError, OSError: anything a user can mend, in one line; what was finished is kept.
        Interrupted: by Ctrl-C or SIGTERM; what was finished is kept.
        OtherFailed: the first process says why.
    """
    before = torch.get_num_threads()
    try:
        return _sample(request)
    finally:
        torch.set_num_threads(before)


def _sample(request: Request) -> Outcome | None:
    prepared: list[tuple[Plan, RunFolder]] = []
    with Processes() as processes:

        def prepare() -> tuple[dict[str, Any], bool, list[Batch]]:
            run = Plan(request, processes.device(request.device))
            settings = run.settings()
            folder = run.folder(settings)
            prepared.append((run, folder))
            if folder.is_complete():
                return settings, True, []
            folder.claim()
            done = {*folder.done()}
            return settings, False, [batch for batch in run.batches if batch not in done]

        settings, complete, remaining = processes.first(prepare)
        if not processes.is_first and not complete:
            run = Plan(request, processes.device(request.device))
            prepared.append((run, run.folder(settings)))
    if not prepared:
        return None
    run, folder = prepared[0]
    if complete:
        return Outcome(folder.npz or folder.folder, 0, 0.0)
    try:
        return _work(run, folder, remaining, processes)
    finally:
        folder.release()


def _work(run: Plan, folder: RunFolder, remaining: list[Batch], processes: Processes) -> Outcome | None:
    began = time.perf_counter()
    total, waiting = len(run.labels), sum(batch.count for batch in remaining)
    done = total - waiting
    evaluations = len(run.sampler.timesteps)

    def counted() -> int:
        return sum(batch.count for batch in folder.done())

    try:
        with progress(total, done, shown=processes.is_first) as update:
            for batch in share(remaining, processes.rank, processes.size):
                share_of_step = batch.count / (evaluations + 1)  # decoding and saving count as one more
                images = run.compute(batch, partial(_advance, update, done, share_of_step))
                folder.save(batch, images, run.texts(batch))
                if processes.is_first:  # which alone may remove the folder
                    done = counted()
                    update(done)
            if not processes.is_first:
                return None
            while done < total:  # the others' part
                time.sleep(_LOOK)
                done = counted()
                update(done)
            path = folder.finish(np.array(run.labels, np.int64), run.caption)
    except KeyboardInterrupt:
        if not processes.is_first:
            raise OtherFailed from None
        raise Interrupted(f"interrupted; {counted()} of {total} images are kept, the same command goes on") from None
    return Outcome(path, waiting, time.perf_counter() - began)


def _advance(update: Progress, done: int, share_of_step: float, step: int) -> None:
    update(done + share_of_step * step)
