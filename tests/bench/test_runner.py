"""The loop of the benchmark: who gets a tick, who gets a speed-up, and what becomes of providers that fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ditfast import DiTConfig, reference
from ditfast.bench.cases.case import Case, Mode
from ditfast.bench.cases.providers import PROVIDERS, Provider
from ditfast.bench.cases.variants import Variant
from ditfast.bench.cases.workload import Inputs, Workload
from ditfast.bench.measure.flops import flops_per_image
from ditfast.bench.measure.runner import Runner, Settings, steps
from ditfast.bench.records.files import Ceilings
from ditfast.bench.records.metrics import with_shares
from ditfast.bench.records.rows import ModelRow

CPU = torch.device("cpu")
CONFIG = DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=8, num_classes=10)
CEILINGS = Ceilings(copy_gb_per_s=1000.0, copy_bytes=1, matmul_tflops={"fp32": 0.01}, matmul_size={"fp32": 1})


class FakeTime:
    """A clock on which the steps of each provider take the time they are given."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, thunk: Callable[[], None]) -> float:
        before = self.now
        thunk()
        return self.now - before

    def provider(self, name: str, ms: float, change: Callable[[Tensor], Tensor] = lambda output: output) -> Provider:
        """The reference whose output is changed and whose steps take ``ms`` on this clock."""

        def build(work: Workload) -> Variant:
            variant = PROVIDERS["reference"].build(work)
            inner = variant.step

            def step(inputs: Inputs) -> Tensor:
                self.now += ms / 1e3
                return change(inner(inputs))

            return replace(variant, step=step)

        return Provider(name, "fake", build)


def run_one(
    providers: list[Provider], clock: FakeTime | None, mode: Mode = "forward", batch: int = 2
) -> dict[str, ModelRow]:
    case = Case(CONFIG, batch, torch.float32, mode)
    with Runner(CPU, Settings(seconds=0.02, clock=clock)) as runner:
        rows = runner.rows(case, providers)
    rows = with_shares(rows, CEILINGS)
    assert [row.provider for row in rows] == [provider.name for provider in providers]
    return {row.provider: row for row in rows}


@pytest.mark.quick
def test_derived_columns_by_hand() -> None:
    clock = FakeTime()
    rows = run_one(
        [clock.provider("slow", 10.0), clock.provider("fast", 8.0), clock.provider("ditfast-fake", 4.0)], clock
    )
    ours = rows["ditfast-fake"]
    assert ours.ms is not None
    assert ours.ms.median == pytest.approx(4.0)
    assert ours.images_per_s == pytest.approx(500.0)
    flops = flops_per_image(CONFIG, "forward")
    assert ours.tflops == pytest.approx(2 * flops / 0.004 / 1e12)
    assert ours.ceiling_share == pytest.approx(2 * flops / 0.004 / 1e12 / 0.01)
    assert ours.ceiling == "matmul"
    assert ours.parity is True
    assert ours.speedup == pytest.approx(2.0)
    assert ours.rival == "fast"
    # rivals are the yardstick of speed, they get no speed-up themselves
    assert rows["slow"].speedup is None and rows["fast"].speedup is None
    assert [row.noise for row in rows.values()] == [pytest.approx(0.0)] * 3


def test_slow_provider_is_caught() -> None:
    """A provider slower than one rival is shown as slower, whatever else it beats."""
    clock = FakeTime()
    rows = run_one(
        [clock.provider("reference", 8.0), clock.provider("rival", 4.0), clock.provider("ditfast-slow", 5.0)], clock
    )
    slow = rows["ditfast-slow"]
    assert (slow.parity, slow.rival, slow.speedup) == (True, "rival", pytest.approx(0.8))


def test_each_provider_is_saved_when_it_is_ready_ours_first() -> None:
    """All are timed again with each new one: a speed-up is of one round alone."""
    clock, saved = FakeTime(), []
    providers = [clock.provider("slow", 10.0), clock.provider("fast", 8.0), clock.provider("ditfast-fake", 4.0)]
    with Runner(CPU, Settings(seconds=0.02, clock=clock)) as runner:
        rows = runner.rows(Case(CONFIG, 2, torch.float32, "forward"), providers, save=saved.append)
    speedups = [{row.provider: row.speedup for row in each} for each in saved]
    assert [list(each) for each in speedups] == [
        ["ditfast-fake"],
        ["slow", "ditfast-fake"],
        ["slow", "fast", "ditfast-fake"],
    ]
    assert [each["ditfast-fake"] for each in speedups] == [None, pytest.approx(2.5), pytest.approx(2.0)]
    assert rows == saved[-1]


def test_a_failure_in_a_later_round_states_the_earlier_time() -> None:
    clock, saved = FakeTime(), []

    def build(work: Workload) -> Variant:
        variant = ours.build(work)
        inner = variant.step

        def step(inputs: Inputs) -> Tensor:
            if saved:
                raise RuntimeError("the GPU is gone")
            return inner(inputs)

        return replace(variant, step=step)

    ours = clock.provider("ditfast-fake", 4.0)
    providers = [clock.provider("reference", 10.0), replace(ours, build=build)]
    with Runner(CPU, Settings(seconds=0.02, clock=clock)) as runner:
        measured = runner.rows(Case(CONFIG, 2, torch.float32, "forward"), providers, save=saved.append)
    rows = {row.provider: row for row in measured}
    failed = rows["ditfast-fake"]
    assert (failed.status, failed.note) == ("error", "RuntimeError: the GPU is gone; timed before at 4 ms")
    unmeasured = (failed.ms, failed.images_per_s, failed.tflops, failed.noise, failed.speedup, failed.parity)
    assert unmeasured == (None,) * 6
    assert rows["reference"].status == "ok"


@pytest.mark.parametrize(("alone_ms", "speedup"), [(12.0, 2.5), (8.0, None)])
def test_no_speedup_where_a_faster_rival_ran_alone(alone_ms: float, speedup: float | None) -> None:
    clock, tried = FakeTime(), []

    def build(work: Workload) -> Variant:
        tried.append(work)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("beside the others")
        return inner.build(work)

    inner = clock.provider("large", alone_ms)
    providers = [clock.provider("slow", 10.0), replace(inner, build=build), clock.provider("ditfast-fake", 4.0)]
    rows = run_one(providers, clock)
    assert rows["large"].note.startswith("timed alone")
    assert rows["ditfast-fake"].speedup == (None if speedup is None else pytest.approx(speedup))


@pytest.mark.quick
def test_wrong_provider_gets_no_tick_and_no_speedup() -> None:
    clock = FakeTime()
    rows = run_one(
        [clock.provider("reference", 8.0), clock.provider("ditfast-wrong", 1.0, lambda output: output * 1.001)], clock
    )
    wrong = rows["ditfast-wrong"]
    assert wrong.status == "ok"
    assert wrong.parity is False
    assert wrong.speedup is None and wrong.rival is None
    assert wrong.error == pytest.approx(1e-3, rel=0.01)
    assert wrong.bound is not None and wrong.error is not None and wrong.error > wrong.bound
    assert "parity failed" in wrong.note


def test_wrong_for_one_sample_only_is_found() -> None:
    def change(output: Tensor) -> Tensor:
        return torch.cat([output[:-1], output[-1:] * 1.01])

    clock = FakeTime()
    rows = run_one([clock.provider("ditfast-wrong", 1.0, change)], clock, batch=9)
    assert rows["ditfast-wrong"].parity is False
    assert rows["ditfast-wrong"].parity_samples == 4


def test_nan_gets_no_tick() -> None:
    clock = FakeTime()
    rows = run_one([clock.provider("ditfast-nan", 1.0, lambda output: output * float("nan"))], clock)
    assert rows["ditfast-nan"].parity is False
    assert rows["ditfast-nan"].error is None
    assert "not finite" in rows["ditfast-nan"].note


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.quick
def test_stale_inputs_are_found(keep: str) -> None:
    """A graph that forgets to copy its inputs in returns the right output of other inputs."""

    def build(work: Workload) -> Variant:
        variant = PROVIDERS["reference"].build(work)
        inner = variant.step
        calls: list[Inputs] = []

        def step(inputs: Inputs) -> Tensor:
            calls.append(inputs)
            return inner(calls[0] if keep == "first" else calls[max(len(calls) - 2, 0)])

        return replace(variant, step=step)

    rows = run_one([Provider("ditfast-stale", "fake", build)], None)
    assert rows["ditfast-stale"].parity is False


@pytest.mark.quick
def test_failing_providers_become_rows_and_the_others_go_on() -> None:
    def fail(work: Workload) -> Variant:
        raise RuntimeError("boom\nsecond line")

    def out_of_memory(work: Workload) -> Variant:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    calls = 0

    def fail_late(output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:  # after the judging, in the timing
            raise RuntimeError("late")
        return output

    clock = FakeTime()
    rows = run_one(
        [
            Provider("broken", "fake", fail),
            Provider("big", "fake", out_of_memory),
            clock.provider("late", 1.0, fail_late),
            Provider("absent", "fake", fail, lambda case, device: "not on this device"),
            clock.provider("reference", 8.0),
            clock.provider("ditfast-fake", 4.0),
        ],
        clock,
    )
    assert (rows["broken"].status, rows["broken"].note) == ("error", "RuntimeError: boom")
    assert (rows["big"].status, rows["big"].note) == ("oom", "OutOfMemoryError: tried to allocate 9 GiB")
    assert (rows["late"].status, rows["late"].note, rows["late"].parity) == ("error", "RuntimeError: late", None)
    assert (rows["absent"].status, rows["absent"].note) == ("unavailable", "not on this device")
    assert rows["broken"].ms is None and rows["late"].ms is None
    # a rival that failed is none
    assert rows["ditfast-fake"].speedup == pytest.approx(2.0)
    assert rows["ditfast-fake"].rival == "reference"


@pytest.mark.parametrize("mode", ["forward", "cfg", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ditfast_has_parity(mode: Mode, dtype: torch.dtype) -> None:
    case = Case(CONFIG, 3, dtype, mode)
    with Runner(CPU, Settings(seconds=0.02)) as runner:
        rows = runner.rows(case, [PROVIDERS["reference"], PROVIDERS["ditfast"]])
    reference, ours = rows
    assert (reference.status, reference.parity, reference.note) == ("ok", True, "")
    assert (ours.status, ours.parity, ours.note) == ("ok", True, "")
    assert ours.speedup is not None and ours.rival == "reference"
    assert ours.parity_samples == 3
    assert reference.error is not None and reference.error > 0  # random weights: a fresh DiT outputs zero


# compiled ones take a minute each: one of ours and one rival; the campaign runs the rest
EAGER = [name for name in PROVIDERS if "compile" not in name and "autotune" not in name and "overhead" not in name]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "provider"),
    [
        *((mode, name) for mode in ("forward", "cfg", "train") for name in EAGER),
        ("train", "ditfast-compile"),
        ("forward", "reference-compile"),
    ],
)
def test_every_provider_on_a_gpu(mode: Mode, provider: str) -> None:
    device = torch.device("cuda")
    case = Case(CONFIG, 3, torch.bfloat16, mode)
    if reason := PROVIDERS[provider].unavailable(case, device):
        pytest.skip(reason)
    with Runner(device, Settings(seconds=0.1)) as runner:
        [row] = runner.rows(case, [PROVIDERS[provider]])
    assert row.status == "ok", row.note
    assert row.peak_bytes is not None and row.peak_bytes > 0
    if row.is_ours or row.provider == "reference":
        assert row.parity is True, row.note


@pytest.mark.quick
def test_wrong_gradients_get_no_tick() -> None:
    def build(work: Workload) -> Variant:
        variant = PROVIDERS["reference"].build(work)
        inner = variant.gradients

        class Wrong(Variant):
            def gradients(self, inputs: Inputs) -> dict[str, Tensor] | None:
                gradients = inner(inputs) or {}
                return gradients | {"blocks.1.mlp.fc1.bias": gradients["blocks.1.mlp.fc1.bias"] * 1.01}

        return Wrong(variant.step, loss=variant.loss, parameters=variant.parameters)

    rows = run_one([Provider("ditfast-wrong", "fake", build)], None, "train")
    assert rows["ditfast-wrong"].parity is False
    assert "blocks.1.mlp.fc1.bias" in rows["ditfast-wrong"].note


def test_frozen_parameter_is_a_missing_gradient() -> None:
    def build(work: Workload) -> Variant:
        variant = PROVIDERS["reference"].build(work)
        parameters = {n: p for n, p in (variant.parameters or {}).items() if n != "final_layer.linear.bias"}
        return replace(variant, parameters=parameters)

    rows = run_one([Provider("ditfast-wrong", "fake", build)], None, "train")
    assert rows["ditfast-wrong"].parity is False
    assert "no gradient for final_layer.linear.bias" in rows["ditfast-wrong"].note


def test_peak_memory_counts_weights_kept_tensors_and_the_call() -> None:
    extra, temporary = 1 << 22, 1 << 23

    def build(work: Workload) -> Variant:
        variant = PROVIDERS["reference"].build(work)
        inner = variant.step
        kept = torch.ones(extra // 4)

        def step(inputs: Inputs) -> Tensor:
            buffer = torch.ones(temporary // 4)
            return inner(inputs) + 0 * (buffer[0] + kept[0])

        return replace(variant, step=step)

    rows = run_one([PROVIDERS["reference"], Provider("hungry", "fake", build)], None)
    plain, hungry = rows["reference"].peak_bytes, rows["hungry"].peak_bytes
    weights = sum(p.nbytes for p in reference.DiT(CONFIG).parameters())
    assert plain is not None and hungry is not None
    assert weights < plain < weights + temporary
    assert extra + temporary <= hungry - plain < extra + temporary + (1 << 12)


def test_reports_every_step_and_yields_case_by_case() -> None:
    clock = FakeTime()
    providers = [clock.provider("reference", 8.0), clock.provider("ditfast-fake", 4.0)]
    cases = [Case(CONFIG, batch, torch.float32) for batch in (1, 2)]
    messages: list[str] = []
    with Runner(CPU, Settings(seconds=0.02, clock=clock)) as runner:
        assert [row.batch for row in runner.rows(cases[0], providers, messages.append)] == [1, 1]
        assert len(messages) == 3
        assert [row.batch for row in runner.rows(cases[1], providers, messages.append)] == [2, 2]
    assert len(messages) == steps(cases, providers) == 6


def test_diffusers_is_judged_by_its_own_constants() -> None:
    pytest.importorskip("diffusers", reason="compares with the real diffusers model")
    # with the case's constants the outputs lie far apart, so a tick shows which oracle was used
    rows = run_one([PROVIDERS["diffusers"]], None)
    error, yardstick = rows["diffusers"].error, rows["diffusers"].yardstick_error
    assert rows["diffusers"].status == "ok"
    assert error is not None and yardstick is not None and error < 4 * yardstick
