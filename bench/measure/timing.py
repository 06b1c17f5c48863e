"""Timing several variants side by side: interleaved, warmed up by time, medians with their spread."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from ..records.rows import Spread

#: A call takes a running number, by which it picks its inputs.
Call = Callable[[int], object]
#: Makes that many calls back to back and returns the seconds they took.
Sampler = Callable[[int], float]
Clock = Callable[[Callable[[], None]], float]

AGAIN = " (again)"

_ROUNDS, _MIN_ROUNDS = 5, 3  # wanted even past the budget, and past twice the budget
_MAX_CALLS = 1000
_SHORT_SECONDS = 0.05  # of a call: a shorter one is made once before each sample, unmeasured
# a sample of back-to-back calls: the host's launches overlap as they do in a sampling or training loop
_SAMPLE_MS = {"cuda": 20.0, "cpu": 5.0}


@dataclass
class Measurement:
    """What :func:`measure` returns: the times of the variants that ran, the exceptions of those that failed."""

    times: dict[str, Spread] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)


def sampler(call: Call, device: torch.device, clock: Clock | None = None) -> Sampler:
    """A sampler of a call in this process, its inputs rotating.

    Args:
        call: what to time.
        device: whose clock to use: events on CUDA, the host's on the CPU.
        clock: seconds that a thunk takes, in place of the device's clock.
    """
    clock = clock or (_cuda_clock if device.type == "cuda" else _cpu_clock)
    number = 0
    last = 0.0  # seconds of a call

    def sample(calls: int) -> float:
        nonlocal last

        def thunk(calls: int = calls) -> None:
            nonlocal number
            for _ in range(calls):
                call(number)
                number += 1

        if calls > 1 or last < _SHORT_SECONDS:
            thunk(1)  # caches and pages that the others' turns have cost are none of this call's time
        seconds = clock(thunk)
        last = seconds / calls
        return seconds

    return sample


def measure(samplers: Mapping[str, Sampler], device: torch.device, seconds: float) -> Measurement:
    """Times the variants for about ``seconds`` each.

    After a warm-up by time, rounds of one sample a variant follow, each round beginning with the next
    variant: a machine that slows down or speeds up does so for all of them. A variant that raises is taken
    out and the others go on.

    Args:
        samplers: name -> its sampler.
        device: where they run.
        seconds: time for each variant; five samples are taken all the same, or three where that takes twice as long.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    result = Measurement()

    def sample(name: str, calls: int) -> float | None:
        """Seconds a call, or None where it failed."""
        try:
            return samplers[name](calls) / calls
        except Exception as error:  # one variant's failure is its own result
            # the traceback's frames would keep its tensors alive
            result.failures[name] = error.with_traceback(None)
            return None

    samples: dict[str, list[float]] = {name: [] for name in samplers}
    with _cheap_garbage_collection():
        calls = {name: _warm_up(partial(sample, name, 1), device, seconds / 4) for name in samplers}
        budget = seconds * len(samplers)
        start = time.perf_counter()
        rounds = 0
        while (elapsed := time.perf_counter() - start) < budget or rounds < _needed(elapsed, budget):
            running = [name for name in samplers if name not in result.failures]
            if not running:
                break
            first = rounds % len(running)
            for name in running[first:] + running[:first]:
                taken = sample(name, calls[name])
                if taken is not None:
                    samples[name].append(taken * 1e3)
            rounds += 1
    result.times = {
        name: spread(samples[name], calls[name]) for name in samplers if name not in result.failures and samples[name]
    }
    return result


def _needed(elapsed: float, budget: float) -> int:
    """The rounds to take after the budget is spent."""
    return _ROUNDS if elapsed < 2 * budget else _MIN_ROUNDS


def spread(samples_ms: list[float], calls_per_sample: int = 1) -> Spread:
    """Median and quartiles, linear between neighbours.

    Raises:
        ValueError: no samples.
    """
    if not samples_ms:
        raise ValueError("samples_ms must hold at least one sample, got none")
    ordered = sorted(samples_ms)

    def quantile(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return Spread(quantile(0.5), quantile(0.25), quantile(0.75), len(ordered), calls_per_sample)


def noise(first: Spread, second: Spread) -> float:
    """How far the medians of one variant measured twice lie apart, as a share.

    At least twice the standard error of either median: few samples may agree by chance.
    """
    low, high = sorted((first.median, second.median))
    return max(high / low - 1, 2 * _standard_error(first), 2 * _standard_error(second))


def _standard_error(spread: Spread) -> float:
    """Of the median, as a share of it: 1.2533 sigma / sqrt(n), with sigma = IQR / 1.349 as for normal samples."""
    return 1.2533 * (spread.p75 - spread.p25) / 1.349 / math.sqrt(spread.samples) / spread.median


def with_repeat(samplers: Mapping[str, Sampler], name: str) -> dict[str, Sampler]:
    """The samplers and one of them once more, for the noise, as ``name + AGAIN``.

    It takes its turn half a round away from itself: right after itself it would find its data in the cache.
    """
    names = list(samplers)
    first = names.index(name)
    turns = names[first:] + names[:first]
    turns.insert((len(names) + 1) // 2, name + AGAIN)
    return {turn: samplers[turn.removesuffix(AGAIN)] for turn in turns}


@contextmanager
def _cheap_garbage_collection() -> Iterator[None]:
    """Sets aside the objects there are: torch.compile leaves millions, and every full collection walks them."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _warm_up(sample: Callable[[], float | None], device: torch.device, seconds: float) -> int:
    """Calls until warm, at least once; returns the calls that fill a sample."""
    deadline = time.perf_counter() + seconds
    times: list[float] = []
    while not times or time.perf_counter() < deadline:
        elapsed = sample()
        if elapsed is None:
            return 1
        times.append(elapsed * 1e3)
    shortest = max(min(times), 1e-6)
    return min(max(1, round(_SAMPLE_MS["cuda" if device.type == "cuda" else "cpu"] / shortest)), _MAX_CALLS)


def _cpu_clock(thunk: Callable[[], None]) -> float:
    begin = time.perf_counter_ns()
    thunk()
    return (time.perf_counter_ns() - begin) / 1e9


def _cuda_clock(thunk: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    thunk()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
