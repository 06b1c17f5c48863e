"""Providers in processes of their own, plugins, and what happens where memory does not suffice for all at once."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ditfast import MODELS, DiTConfig
from ditfast.bench.cases.case import MODES, Case, Mode
from ditfast.bench.cases.providers import PROVIDERS, Provider, load_plugins
from ditfast.bench.cases.variants import Variant
from ditfast.bench.cases.workload import Inputs, Workload
from ditfast.bench.measure.isolation import ProviderFailed, Worker, wants_isolation
from ditfast.bench.measure.preparing import UNJUDGED
from ditfast.bench.measure.runner import Runner, Settings
from ditfast.bench.records.files import Results
from ditfast.bench.records.rows import ModelRow
from ditfast.cli.command import app
from ditfast.parity import judge

CPU = torch.device("cpu")
CONFIG = DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=8, num_classes=10)
pytestmark = pytest.mark.usefixtures("quick_limits")
CASE = Case(CONFIG, 2, torch.float32)

PLUGIN = '''
import os
from dataclasses import replace

import torch

from ditfast.parity import judge
from ditfast.bench.measure.preparing import UNJUDGED
from ditfast.bench.cases.providers import PROVIDERS, Provider, register


def changed(factor):
    def build(work):
        variant = PROVIDERS["reference"].build(work)
        return replace(variant, step=lambda inputs: variant.step(inputs) * factor)

    return build


def dies(work):
    os._exit(3)


def dies_later(work):
    variant = PROVIDERS["reference"].build(work)
    calls = []

    def step(inputs):
        calls.append(None)
        if len(calls) > 6:
            os.abort()
        return variant.step(inputs)

    return replace(variant, step=step)


def hungry(work):
    raise torch.OutOfMemoryError("tried to allocate 9 GiB")


register(Provider("ditfast-right", "the reference again", changed(1.0)))
register(Provider("ditfast-wrong", "a little off", changed(1.01)))
register(Provider("dies", "ends its process", dies))
register(Provider("dies-later", "ends its process while it is timed", dies_later))
register(Provider("hungry", "runs out of memory", hungry))
'''
NAMES = ("ditfast-right", "ditfast-wrong", "dies", "dies-later", "hungry")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The file of the plugin, loaded in this process."""
    path = tmp_path_factory.mktemp("plugin") / "rivals.py"
    path.write_text(PLUGIN)
    load_plugins([str(path)])
    load_plugins([str(path)])  # known already: registering twice would raise
    yield str(path)
    for name in NAMES:
        PROVIDERS.pop(name, None)


@pytest.fixture(scope="module")
def isolating(plugin: str) -> Iterator[Runner]:
    """A runner whose workers several tests share: starting one takes seconds."""
    with Runner(CPU, Settings(seconds=0.02, isolate="all", plugins=(plugin,))) as runner:
        yield runner


@pytest.mark.subprocess
def test_isolated_providers_are_judged_timed_and_may_die(isolating: Runner) -> None:
    providers = [PROVIDERS[name] for name in ("reference", *NAMES)]
    rows = {row.provider: row for row in isolating.rows(CASE, providers)}
    again = {row.provider: row for row in isolating.rows(replace(CASE, batch=1), providers[:2])}
    assert all(row.isolated for row in rows.values())
    right, wrong = rows["ditfast-right"], rows["ditfast-wrong"]
    assert (right.status, right.parity, right.rival) == ("ok", True, "reference")
    assert right.speedup is not None and right.ms is not None
    assert (wrong.status, wrong.parity, wrong.speedup) == ("ok", False, None)
    assert wrong.error == pytest.approx(0.01, rel=0.01)
    assert (rows["dies"].status, rows["dies"].note) == ("error", "its process died: exit code 3")
    assert (rows["dies-later"].status, rows["dies-later"].ms) == ("error", None)
    assert rows["dies-later"].note == "its process died: signal SIGABRT"
    assert (rows["hungry"].status, rows["hungry"].note) == ("oom", "OutOfMemoryError: tried to allocate 9 GiB")
    assert [row.status for row in again.values()] == ["ok", "ok"]


@pytest.mark.subprocess
def test_a_worker_sees_the_same_weights_and_inputs_as_this_process(isolating: Runner) -> None:
    with Runner(CPU, Settings(seconds=0.01)) as runner:
        [row] = runner.rows(CASE, [PROVIDERS["ditfast-right"]])
    [isolated] = isolating.rows(CASE, [PROVIDERS["ditfast-right"]])
    assert (row.isolated, isolated.isolated) == (False, True)
    assert row.error == isolated.error and row.yardstick_error == isolated.yardstick_error
    assert row.error is not None and row.error > 0


@pytest.mark.subprocess
def test_first_calls_alone_are_made_by_all_and_a_failure_is_named(isolating: Runner) -> None:
    reports: list[str] = []
    providers = [PROVIDERS[name] for name in ("ditfast-right", "dies", "hungry", "reference-tf32")]
    failures = isolating.warm_up([CASE], providers, reports.append)
    assert failures == [
        f"{CASE.label}: dies: its process died: exit code 3",
        f"{CASE.label}: hungry: OutOfMemoryError: tried to allocate 9 GiB",
    ]
    able = ("ditfast-right", "dies", "hungry")  # the last needs a GPU
    assert reports == [f"{CASE.label}: {name}" for name in able]


@pytest.mark.subprocess
def test_a_run_leaves_no_process_behind(isolating: Runner) -> None:
    isolating._workers.get("ditfast-right")
    pids = [worker._process.pid for worker in isolating._workers.running.values()]
    isolating.__exit__()
    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.subprocess
def test_an_unknown_provider_and_an_early_sample_are_failures_of_the_worker() -> None:
    worker = Worker("no-such", CPU, seed=0)
    try:
        with pytest.raises(ProviderFailed, match="provider must be one of"):
            worker.prepare(CASE)
        with pytest.raises(ProviderFailed, match="nothing is prepared"):
            worker.sample(1)
        assert worker.alive
    finally:
        worker.close()
    assert not worker.alive
    worker.release()  # of a closed one: nothing to do


def test_who_is_isolated() -> None:
    cuda = torch.device("cuda")
    eager, compiled = PROVIDERS["reference"], PROVIDERS["reference-compile"]
    assert [wants_isolation(compiled, cuda, mode) for mode in ("auto", "all", "none")] == [True, True, False]
    assert not wants_isolation(eager, cuda, "auto")
    assert not wants_isolation(compiled, CPU, "auto")
    for name in PROVIDERS:
        if "compile" in name or "graph" in name or name in ("reference-max-autotune", "reference-reduce-overhead"):
            assert PROVIDERS[name].isolate


@pytest.mark.parametrize(
    ("content", "message"),
    [("raise KeyError('x')", "KeyError: 'x'"), ("import no_such_module", "ModuleNotFound"), (None, "FileNotFound")],
)
def test_a_plugin_that_cannot_be_loaded(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    if content is not None:
        path.write_text(content)
    result = CliRunner().invoke(app, ["bench", "--plugin", str(path)])
    assert result.exit_code == 2
    assert f"--plugin {path} cannot be loaded: " in result.stderr and message in result.stderr


def test_the_command_takes_a_plugin(plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditfast.config.MODELS", {**MODELS, "DiT-S/8": CONFIG})
    path = tmp_path / "r.json"
    arguments = ["bench", "--model", "DiT-S/8", "--batch", "1", "--providers", "reference,ditfast-right"]
    arguments += ["--image-size", "64", "--device", "cpu", "--seconds", "0.01", "--json", str(path), "--plugin", plugin]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [row.parity for row in Results.load(path).rows] == [True, True]


@pytest.mark.parametrize("mode", MODES)
def test_the_example_of_a_provider(mode: Mode, tmp_path: Path) -> None:
    """The example in docs/benchmark.md, with the reference in the place of the user's model."""
    blocks = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text().split("```python\n")
    [example] = [block.partition("```")[0] for block in blocks if "register(Provider(" in block]
    path = tmp_path / "my_rival.py"
    path.write_text(f"from ditfast.reference import DiT as MyDiT\n{example}")
    try:
        load_plugins([str(path)])
        with Runner(CPU, Settings(seconds=0.01)) as runner:
            [row] = runner.rows(replace(CASE, mode=mode), [PROVIDERS["mine"]])
    finally:
        PROVIDERS.pop("mine", None)
    assert (row.status, row.parity, row.note) == ("ok", True, "")


def out_of_memory_if(condition: object) -> None:
    if condition:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")


def test_a_provider_that_fits_only_alone_is_timed_alone() -> None:
    """A neighbour's weights and pools may crowd it out, which is not its fault."""
    neighbours: weakref.WeakSet[object] = weakref.WeakSet()

    class Held:
        pass

    def neighbour(work: Workload) -> Variant:
        variant = PROVIDERS["reference"].build(work)
        held = Held()
        neighbours.add(held)

        def step(inputs: Inputs) -> Tensor:
            assert held is not None
            return variant.step(inputs)

        return replace(variant, step=step)

    def large(work: Workload) -> Variant:
        out_of_memory_if(len(neighbours))
        return PROVIDERS["reference"].build(work)

    def larger(work: Workload) -> Variant:
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    providers = [Provider("large", "", large), Provider("ditfast-first", "", neighbour), Provider("larger", "", larger)]
    with Runner(CPU, Settings(seconds=0.01)) as runner:
        rows = {row.provider: row for row in runner.rows(CASE, providers)}
    large_row, first = rows["large"], rows["ditfast-first"]
    assert (large_row.status, large_row.parity) == ("ok", True)
    assert large_row.note == "timed alone: beside the others memory did not suffice"
    assert rows["larger"].status == "oom"
    assert (first.status, first.parity, first.note) == ("ok", True, "")
    assert (first.speedup, first.rival) == (None, None)  # nobody was timed beside it


def test_an_oracle_without_memory_costs_the_tick_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditfast.bench.measure.judging import Judge

    def standard(self: Judge, constants: object) -> None:
        raise torch.OutOfMemoryError("fp64")

    monkeypatch.setattr(Judge, "standard", standard)
    with Runner(CPU, Settings(seconds=0.01)) as runner:
        [reference, ours] = runner.rows(CASE, [PROVIDERS["reference"], PROVIDERS["ditfast"]])
    assert (ours.status, ours.parity, ours.speedup) == ("ok", None, None)
    assert ours.note == reference.note == UNJUDGED


def test_sliced_oracle_attention_is_the_same() -> None:
    from ditfast.bench.measure import judging

    q, k, v = (torch.randn(2, 3, 17, 8, dtype=torch.float64) for _ in range(3))
    formula = (q @ k.mT * 0.3).softmax(-1) @ v
    attention = torch.nn.functional.scaled_dot_product_attention
    whole = attention(q, k, v, scale=0.3)
    slices = 0

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal slices
            slices += func is attention
            return func(*args, **(kwargs or {}))

    before = judging._MAX_SCORES
    judging._MAX_SCORES = 2 * 3 * 5 * 17 * 8  # five queries at a time
    try:
        with Counting(), judging._LeanAttention():
            sliced = attention(q, k, v, scale=0.3)
    finally:
        judging._MAX_SCORES = before
    assert slices == 4
    assert judge("operator", sliced, whole, formula, torch.float64).ok


@pytest.mark.parametrize("option", [["--seconds", "1"], ["--json", "r.json"], ["--budget", "9m"]])
def test_first_calls_alone_take_no_option_of_measuring(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "models", "--model", "DiT-S/8", "--batch", "1", "--providers", "reference", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--warm-up", *option])
    assert result.exit_code == 2
    assert "--warm-up measures nothing" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick_limits")
def test_the_largest_batch_that_fits_is_found_and_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch 20 does not fit one provider: all providers then try a batch in between."""

    def limited(work: Workload) -> Variant:
        out_of_memory_if(work.case.batch > 9)
        return PROVIDERS["reference"].build(work)

    monkeypatch.setitem(PROVIDERS, "limited", Provider("limited", "", limited))
    monkeypatch.setattr("ditfast.config.MODELS", {**MODELS, "DiT-S/8": CONFIG})
    monkeypatch.setattr("ditfast.bench.measure.fitting.device_bytes", lambda device: 1 << 60)  # all fits
    path = tmp_path / "r.json"
    arguments = ["bench", "models", "--model", "DiT-S/8", "--batch", "4", "--batch", "8", "--batch", "20", "--mode"]
    arguments += ["forward", "--providers", "limited,ditfast", "--image-size", "64", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--seconds", "0.01", "--json", str(path)])
    assert result.exit_code == 0, result.output
    rows = Results.load(path).rows
    by_case = {(row.batch, row.provider): row for row in rows}
    assert by_case[20, "limited"].status == "oom" and by_case[20, "ditfast"].status == "ok"
    tried = sorted({row.batch for row in rows} - {4, 8, 20})
    assert tried and all(8 < batch < 20 for batch in tried)
    fitting: ModelRow = by_case[tried[0], "limited"]
    assert fitting.status == "ok" and fitting.batch == 9
    assert fitting.note == by_case[9, "ditfast"].note == "in place of batch 20, which does not fit"
    assert "limited: the largest measured batch that fits is 9" in result.stdout


@pytest.mark.usefixtures("quick_limits")
def test_a_comparison_that_was_cut_at_the_batch_that_fits_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = []

    def limited(work: Workload) -> Variant:
        out_of_memory_if(work.case.batch > 9)
        if work.case.batch == 9 and not interrupted:
            interrupted.append(work)
            raise KeyboardInterrupt
        return PROVIDERS["reference"].build(work)

    monkeypatch.setitem(PROVIDERS, "limited", Provider("limited", "", limited))
    monkeypatch.setattr("ditfast.config.MODELS", {**MODELS, "DiT-S/8": CONFIG})
    monkeypatch.setattr("ditfast.bench.measure.fitting.device_bytes", lambda device: 1 << 60)
    path = tmp_path / "r.json"
    arguments = ["bench", "models", "--model", "DiT-S/8", "--batch", "8", "--batch", "10", "--mode", "forward"]
    arguments += ["--providers", "limited,ditfast", "--image-size", "64", "--device", "cpu", "--seconds", "0.01"]
    assert CliRunner().invoke(app, [*arguments, "--json", str(path)]).exit_code == 130
    assert {(row.batch, row.provider) for row in Results.load(path).rows} >= {(9, "ditfast")}
    result = CliRunner().invoke(app, [*arguments, "--json", str(path), "--continue"])
    assert result.exit_code == 0, result.output
    results = Results.load(path)
    by_provider = {row.provider: row for row in results.rows if row.batch == 9}
    assert {name: row.status for name, row in by_provider.items()} == {"limited": "ok", "ditfast": "ok"}
    assert by_provider["ditfast"].rival == "limited" and results.complete and results.older == []
