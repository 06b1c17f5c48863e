"""Timing: the order of the variants, the warm-up, the spread, and failures in the middle."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ditfast.bench.measure.ceilings import measure_ceilings
from ditfast.bench.measure.timing import (
    AGAIN,
    Call,
    Clock,
    Measurement,
    _needed,
    noise,
    sampler,
    spread,
    with_repeat,
)
from ditfast.bench.measure.timing import measure as measure_samplers
from ditfast.bench.records.rows import Spread

CPU = torch.device("cpu")


def measure(calls: dict[str, Call], device: torch.device, seconds: float, clock: Clock | None = None) -> Measurement:
    return measure_samplers({name: sampler(call, device, clock) for name, call in calls.items()}, device, seconds)


class Recorder:
    """Variants that note their calls, and a clock on which each call takes 10 ms."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.samples: list[str] = []

    def variant(self, name: str) -> Callable[[int], None]:
        return lambda number: self.calls.append((name, number))

    def clock(self, thunk: Callable[[], None]) -> float:
        before = len(self.calls)
        thunk()
        self.samples.append(self.calls[before][0])
        return 0.01 * (len(self.calls) - before)


def test_rounds_interleave_and_each_begins_with_the_next_variant() -> None:
    recorder = Recorder()
    names = ["a", "b", "c"]
    result = measure({name: recorder.variant(name) for name in names}, CPU, 1e-4, recorder.clock)
    rounds = result.times["a"].samples
    assert rounds >= 3
    timed = recorder.samples[-3 * rounds :]
    for index in range(rounds):
        first = index % 3
        assert timed[3 * index : 3 * index + 3] == names[first:] + names[:first]
    # before that, each is warmed up on its own
    warm_up = recorder.samples[: -3 * rounds]
    assert warm_up == sorted(warm_up)
    assert all(warm_up.count(name) >= 1 for name in names)


def test_calls_are_numbered_so_that_inputs_rotate() -> None:
    recorder = Recorder()
    measure({"a": recorder.variant("a"), "b": recorder.variant("b")}, CPU, 1e-4, recorder.clock)
    for name in ("a", "b"):
        numbers = [number for called, number in recorder.calls if called == name]
        assert numbers == list(range(len(numbers)))


def test_short_calls_are_timed_many_at_a_time() -> None:
    calls = 0

    def variant(number: int) -> None:
        nonlocal calls
        calls += 1

    def clock(thunk: Callable[[], None]) -> float:
        before = calls
        thunk()
        return 0.001 * (calls - before)  # 1 ms a call; a sample on the CPU lasts 5 ms

    times = measure({"a": variant}, CPU, 1e-4, clock).times["a"]
    assert times.calls_per_sample == 5
    assert times.median == pytest.approx(1.0)


def test_failure_in_the_middle_takes_only_that_variant_out() -> None:
    recorder = Recorder()

    def failing(number: int) -> None:
        recorder.calls.append(("bad", number))
        if number == 2:
            raise RuntimeError("boom")

    result = measure({"bad": failing, "good": recorder.variant("good")}, CPU, 1e-4, recorder.clock)
    assert set(result.times) == {"good"}
    assert str(result.failures["bad"]) == "boom"
    assert result.times["good"].samples >= 3


@pytest.mark.parametrize(("elapsed", "rounds"), [(1.0, 5), (1.9, 5), (2.0, 3)])
def test_rounds_past_the_budget(elapsed: float, rounds: int) -> None:
    assert _needed(elapsed, 1.0) == rounds


def test_interruption_is_not_swallowed() -> None:
    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({"a": interrupted}, CPU, 1e-4)


def test_objects_from_before_are_not_collected_while_timing() -> None:
    frozen: list[int] = []
    measure({"a": lambda number: frozen.append(gc.get_freeze_count())}, CPU, 1e-4)
    assert min(frozen) > 0
    assert gc.get_freeze_count() == 0


def test_spread_is_median_and_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0], 7) == Spread(3.0, 2.0, 4.0, 5, 7)
    assert spread([1.0, 2.0]) == Spread(1.5, 1.25, 1.75, 2, 1)
    with pytest.raises(ValueError, match="samples_ms"):
        spread([])


def test_noise_is_the_distance_of_the_medians() -> None:
    assert noise(spread([10.0]), spread([11.0])) == pytest.approx(0.1)
    assert noise(spread([11.0]), spread([10.0])) == pytest.approx(0.1)


@pytest.mark.parametrize("count", [3, 4, 5, 8])
@pytest.mark.parametrize("index", [0, 1, -1])
def test_the_repeated_variant_never_follows_itself(count: int, index: int) -> None:
    names = [f"v{number}" for number in range(count)]
    name = names[index]
    turns = list(with_repeat({key: lambda calls: 0.0 for key in names}, name))
    assert sorted(turns) == sorted([*names, name + AGAIN])
    apart = (turns.index(name + AGAIN) - turns.index(name)) % len(turns)
    assert 2 <= apart <= len(turns) - 2


def test_limits_of_this_machine() -> None:
    limits = measure_ceilings(CPU, ["fp32", "fp32"], seconds=0.01)
    assert 0.1 < limits.copy_gb_per_s < 10_000
    assert limits.copy_bytes == 256 << 20
    assert set(limits.matmul_tflops) == {"fp32"} and 1e-4 < limits.matmul_tflops["fp32"] < 100
    assert limits.matmul_size["fp32"] >= 1024


def test_noise_of_few_scattered_samples_is_not_small() -> None:
    """Medians that agree by chance: quartiles 20 % apart over four samples are two standard errors of 18.6 %."""
    scattered = Spread(10.0, 9.0, 11.0, 4, 1)
    assert noise(scattered, scattered) == pytest.approx(2 * 1.2533 * 2.0 / 1.349 / 2 / 10.0)
    many = replace(scattered, samples=400)
    assert noise(many, many) == pytest.approx(noise(scattered, scattered) / 10)


def test_no_time_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        measure({}, CPU, 0)
