"""The rows of ``ditfast bench memory``: the memory that each provider needs, and the largest batch that fits.

On a GPU every provider, and every batch tried in the search, runs in its own process: running out of memory or
fragmenting it must not affect the next one. On meta tensors nothing runs: the tensors that the forward of a training
step would keep on a GPU are traced, attention as one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ditfast import ops

from ..cases.case import Case
from ..cases.providers import Provider
from ..cases.workload import Workload, build_model, make_inputs
from ..cost.count import AttentionAsOne, Cost
from ..measure.fitting import device_bytes, guess_batch, largest_batch
from ..measure.isolation import ProviderFailed, Worker
from ..measure.memory import saved_in_step
from ..measure.preparing import clear, explain, make_work, prepare
from ..records.rows import MemoryRow, ModelRow

#: Who can be traced on meta tensors: they compile and capture nothing.
TRACED = ("reference", "diffusers", "ditfast")
TRACED_NOTE = "traced on meta tensors"
NO_LOSS_NOTE = "saved bytes not counted: the provider tells no loss apart from its step"
BESIDE_NOTE = "out of memory beside the fp64 reference that judges it; on its own this batch fits"


def blank_row(case: Case, provider: Provider, device: torch.device) -> MemoryRow:
    """The row before anything is known."""
    memory = None if device.type == "meta" else device_bytes(device)
    return MemoryRow(**case.columns, provider=provider.name, status="error", device_bytes=memory)


def measure(
    case: Case, provider: Provider, device: torch.device, seed: int = 0, plugins: Sequence[str] = ()
) -> MemoryRow:
    """Peak and saved bytes of a provider.

    Args:
        device: CUDA, where it runs in a process of its own; the CPU, where it runs in this one; or meta.
        seed: of weights and inputs.
        plugins: what a process of its own loads to know its provider.

    Returns:
        a row without the largest batch. A provider that fails, runs out of memory or cannot run here has a row that
        says so; one of ours without a parity tick has no bytes, but a note that says why.
    """
    blank = blank_row(case, provider, device)
    reason = provider.unavailable(case, device)
    if reason is not None:
        return replace(blank, status="unavailable", note=reason)
    try:
        if device.type == "meta":
            return replace(blank, status="ok", note=TRACED_NOTE, saved_bytes=_traced(case, provider, seed))
        if device.type == "cuda":
            row, saved_bytes = _elsewhere(case, provider, device, seed, plugins)
        else:
            row, saved_bytes = _here(case, provider, device, seed)
    except ProviderFailed as error:
        return replace(blank, status=error.status, note=error.note)
    except Exception as error:  # a provider's failure is its row
        status, note = explain(error.with_traceback(None))
        return replace(blank, status=status, note=note)
    finally:
        clear(device)
    if blank.is_ours and row.parity is not True:
        return replace(blank, status="ok", note=row.note)
    notes = [row.note, NO_LOSS_NOTE if case.training and saved_bytes is None else ""]
    return replace(
        blank, status="ok", note="; ".join(filter(None, notes)), peak_bytes=row.peak_bytes, saved_bytes=saved_bytes
    )


def _here(case: Case, provider: Provider, device: torch.device, seed: int) -> tuple[ModelRow, int | None]:
    prepared = prepare(provider, *make_work(case, device, seed))
    try:
        return prepared.row, prepared.saved_bytes()
    finally:
        prepared.close()


def _elsewhere(
    case: Case, provider: Provider, device: torch.device, seed: int, plugins: Sequence[str]
) -> tuple[ModelRow, int | None]:
    worker = Worker(provider.name, device, seed, plugins)
    try:
        return worker.prepare(case), worker.saved_bytes()
    finally:
        worker.close()


def _traced(case: Case, provider: Provider, seed: int) -> int | None:
    """What the forward of a training step would keep on a GPU, ditfast with its kernels."""
    device = torch.device("meta")
    inputs = make_inputs(case, device, seed)
    variant = provider.build(Workload(case, device, build_model(case.config, device, case.dtype, seed), [inputs]))
    # taken apart into its math path, as on meta tensors, attention would keep every score
    with AttentionAsOne(Cost()), ops.use_backend("triton"):
        return saved_in_step(variant, inputs)


def trial(
    case: Case, provider: Provider, device: torch.device, seed: int = 0, plugins: Sequence[str] = ()
) -> Callable[[int], int]:
    """batch -> the peak bytes of really running it, in a fresh process; raises ProviderFailed where it does not run."""

    def run(batch: int) -> int:
        worker = Worker(provider.name, device, seed, plugins)
        try:
            return worker.trial_bytes(replace(case, batch=batch))
        finally:
            worker.close()

    return run


def search(
    run: Callable[[int], int], peaks: Mapping[int, int], memory: int, limit: int, start: int = 1
) -> tuple[int, str]:
    """The largest batch that runs, to the next sixteenth.

    Memory grows with the batch in a straight line, nearly: two batches give a guess, and from there on the search
    goes in growing steps towards the border, and halves what lies between.

    Args:
        run: tries a batch; returns its peak bytes or raises ProviderFailed.
        peaks: batch -> peak bytes of what is known to run.
        memory: bytes of the device.
        limit: the largest batch to try; it is the answer where it fits.
        start: tried first where nothing is known to run.

    Returns:
        (batch, note): 0 where not even one image fits; the note is empty, or says what else than memory ended it.
    """
    known = {batch: peak for batch, peak in peaks.items() if batch <= limit}
    low, high, note = max(known, default=0), limit + 1, ""

    def fits(batch: int) -> bool:
        nonlocal low, high, note
        if low < batch < high:
            try:
                known[batch] = run(batch)
                low = batch
            except ProviderFailed as error:
                high = batch
                note = "" if error.status == "oom" else f"batch {batch} fails for another reason: {error.note}"
        return batch <= low

    if low == 0 and not fits(min(start, limit)):
        return largest_batch(fits, limit), note
    if len(known) == 1:
        fits(min(2 * low, limit))
    guess = guess_batch(list(known.items()), memory, low, high)
    if guess is not None:
        ahead, step = fits(guess), max(1, guess // 16)
        while low < (following := low + step if ahead else high - step) < high and fits(following) == ahead:
            step *= 2
    return largest_batch(fits, limit, max(low, 1)), note
