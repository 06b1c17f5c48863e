"""A provider prepared for a case in this process: built, judged, its memory measured, ready to be timed."""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..cases.case import Case
from ..cases.providers import Provider
from ..cases.variants import Variant
from ..cases.workload import Inputs, Workload, build_model, cast_inputs, make_inputs, make_pool
from ..records.rows import ModelRow, OpRow, Status
from .flops import weight_bytes
from .judging import Judge, Judgement
from .memory import MemoryMeter, saved_in_step
from .timing import Clock, sampler

_Row = TypeVar("_Row", ModelRow, OpRow)
_NOTE_LENGTH = 300
#: The note of a row without a tick for want of memory.
UNJUDGED = "parity not judged: memory does not suffice for the references in fp64 and in the working dtype"


def make_work(case: Case, device: torch.device, seed: int) -> tuple[Workload, Judge]:
    """The weights, inputs and judge of a case; the same in every process."""
    model = build_model(case.config, device, case.dtype, seed)
    work = Workload(case, device, model, make_pool(case, device, weight_bytes(model), seed))
    return work, Judge(work)


def blank_row(case: Case, provider: Provider) -> ModelRow:
    """The row before anything is known."""
    config = case.config
    return ModelRow(
        **case.columns,
        tokens=config.num_tokens,
        hidden_size=config.hidden_size,
        depth=config.depth,
        provider=provider.name,
        precision=provider.precision or case.dtype_name,
        status="error",
    )


@dataclass
class Prepared:
    """A provider that was built and judged: its row so far, and what to time."""

    row: ModelRow
    variant: Variant
    pool: list[Inputs]
    device: torch.device
    clock: Clock | None = None

    def __post_init__(self) -> None:
        self._trims = False
        self._sample = sampler(self._call, self.device, self.clock)

    def _call(self, number: int) -> object:
        return self.variant.step(self.pool[number % len(self.pool)])

    def sample(self, calls: int) -> float:
        """Seconds of that many calls back to back."""
        if not self._trims:
            return self._sample(calls)
        self.variant.step(self.pool[0])  # the allocator fetches memory again, which is not the call's time
        seconds = self._sample(calls)
        empty_cache(self.device)
        return seconds

    def rest(self) -> None:
        """Hands cached memory back until it is sampled again."""
        empty_cache(self.device)

    def trim(self) -> None:
        """From now on hands cached memory back between samples, because the neighbours need it."""
        self._trims = True

    def saved_bytes(self) -> int | None:
        """What a training step's forward keeps for its backward; None outside training."""
        return saved_in_step(self.variant, self.pool[0])

    def close(self) -> None:
        """Lets go of weights, inputs and captured graphs."""
        del self.variant, self.pool, self._sample
        clear(self.device)


def prepare(provider: Provider, work: Workload, judge: Judge, clock: Clock | None = None) -> Prepared:
    """Builds a provider, times its first call, judges it warm and measures its memory."""
    standard = _standard(judge, provider)
    meter = MemoryMeter(work.device)  # the standards are there already, so that it does not count them
    variant = provider.build(work)
    pool = work.pool if variant.dtype is None else [cast_inputs(inputs, variant.dtype) for inputs in work.pool]
    training = work.case.training
    results: dict[str, Tensor] | None = None

    def first_call() -> None:
        nonlocal results
        results = judge.compared(variant, pool[0]) if training else None
        if results is None:
            variant.step(pool[1])

    first_call_ms = _host_ms(first_call, work.device)
    # others than the judged inputs come first, so that a graph that keeps its first or last ones is found out
    for inputs in pool[1:3]:
        if training and results is not None:
            variant.gradients(inputs)  # steps would change the weights
        else:
            variant.step(inputs)
    if not training or results is not None:
        results = judge.compared(variant, pool[0])
    judgement = standard or judge.judge(results, provider.constants)
    results = None
    peak_bytes = meter.peak_bytes(lambda: variant.step(pool[0]), variant.shared_bytes)
    verdict = judgement.verdict
    row = replace(
        blank_row(work.case, provider),
        note=judgement.note,
        first_call_ms=first_call_ms,
        weight_bytes=weight_bytes(work.model),
        peak_bytes=peak_bytes,
        error=_finite(verdict.error) if verdict else None,
        yardstick_error=_finite(verdict.yardstick) if verdict else None,
        bound=_finite(verdict.bound) if verdict else None,
        parity=judgement.parity,
        parity_samples=judgement.samples if verdict else None,
    )
    return Prepared(row, variant, pool, work.device, clock)


def trial_bytes(provider: Provider, case: Case, device: torch.device, seed: int) -> int:
    """Peak bytes of a provider with nothing beside it: no oracle, one input. Raises where memory does not suffice."""
    meter = MemoryMeter(device)
    work = Workload(case, device, build_model(case.config, device, case.dtype, seed), [make_inputs(case, device, seed)])
    variant = provider.build(work)
    [inputs] = work.pool if variant.dtype is None else [cast_inputs(work.pool[0], variant.dtype)]
    del work
    variant.step(inputs)  # from its end on the optimiser has its state
    return meter.peak_bytes(lambda: variant.step(inputs), 0)


def _standard(judge: Judge, provider: Provider) -> Judgement | None:
    """Makes the oracle; where its memory does not suffice, the judgement that says so. It is not the provider's."""
    try:
        judge.standard(provider.constants)
    except Exception as error:
        if not is_oom(error):
            raise
        return Judgement(None, 0, UNJUDGED)
    return None


def failed(row: _Row, error: BaseException) -> _Row:
    """The row of a provider that raised, without earlier measurements."""
    status, note = explain(error)
    unmeasured = (
        *("ms", "first_call_ms", "images_per_s", "tflops", "rate", "share", "ceiling_share", "ceiling", "noise"),
        *("peak_bytes", "error", "yardstick_error", "bound", "parity", "parity_samples", "speedup", "rival"),
    )
    blank = dict.fromkeys(item.name for item in fields(row) if item.name in unmeasured)
    return replace(row, status=status, note=note, **blank)  # type: ignore[arg-type]


def explain(error: BaseException) -> tuple[Status, str]:
    """("oom" or "error", one line) of an exception."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None and len(chain) < 10:
        chain.append(chain[-1].__cause__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    note = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:_NOTE_LENGTH]
    return "oom" if any(is_oom(item) for item in chain) else "error", note


def is_oom(error: BaseException) -> bool:
    """Whether memory ran out."""
    # plain RuntimeErrors: of torch's CPU allocator, and of what allocates beside torch (a context, a handle)
    messages = (
        "can't allocate memory",
        "CUDA out of memory",  # as Inductor passes it on, its cause cut off
        "CUDA error: out of memory",
        "CUDA]: out of memory",
        "STATUS_ALLOC_FAILED",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in messages)


def computes(device: torch.device) -> bool:
    """Whether a device still computes: after a sticky CUDA error every later call of the process fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return torch.ones(2, device=device).sum().item() == 2.0
    except Exception:
        return False


def clear(device: torch.device) -> None:
    """Frees unreferenced memory."""
    # compiled code counts towards a limit per function, and a later case would hit it
    if "torch._dynamo" in sys.modules:  # importing it takes a second
        torch._dynamo.reset()
    gc.collect()
    empty_cache(device)


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of a context that an error has broken, which is a row already
            torch.cuda.empty_cache()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _host_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call on the host's clock, to its end on the device."""
    begin = time.perf_counter_ns()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - begin) / 1e6
