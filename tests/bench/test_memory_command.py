"""``ditfast bench memory`` as a user meets it: options, rows that are kept, the search, the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from ditfast import MODELS, DiTConfig
from ditfast.bench.cases.case import Case
from ditfast.bench.cases.providers import PROVIDERS, Provider
from ditfast.bench.cases.variants import Variant
from ditfast.bench.cases.workload import Inputs, Workload
from ditfast.bench.commands import memory as memory_command
from ditfast.bench.measure.isolation import ProviderFailed
from ditfast.bench.records.files import Results
from ditfast.bench.records.rows import MemoryRow
from ditfast.bench.suites.memory import BESIDE_NOTE, blank_row
from ditfast.bench.suites.suite import Recorder
from ditfast.cli.command import app
from ditfast.console import print_tables

CPU = torch.device("cpu")
CONFIG = DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=8, num_classes=10)
TINY = DiTConfig(depth=2, hidden_size=64, num_heads=2, patch_size=8, num_classes=10)


def wrong(work: Workload) -> Variant:
    """The reference, its output off by a hundredth."""
    variant = PROVIDERS["reference"].build(work)

    def step(inputs: Inputs) -> Tensor:
        return variant.step(inputs) * 1.01

    return replace(variant, step=step)


def hungry(work: Workload) -> Variant:
    raise torch.OutOfMemoryError("tried to allocate 9 GiB")


def up_to(largest: int, tried: list[int]) -> Callable[[int], int]:
    """A provider of 500 bytes and 10 an image that runs up to a batch."""

    def run(batch: int) -> int:
        tried.append(batch)
        if batch > largest:
            raise ProviderFailed("oom", "made up")
        return 500 + 10 * batch

    return run


def plan_of(cases: list[Case], providers: list[Provider], limit: int) -> memory_command._Plan:
    return memory_command._Plan(cases, providers, CPU, (), limit, {"device": "cpu", "max_batch": limit})


def recorder_of(rows: Sequence[MemoryRow] = (), deadline: float | None = None) -> Recorder:
    results = Results("memory", {}, {"device": "cuda:0", "max_batch": 64}, rows=list(rows))
    return Recorder(results, CPU, None, [], lambda message: None, deadline)


def test_the_largest_batch_is_searched_once_for_all_batches_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr("ditfast.bench.suites.memory.trial", lambda case, *_: up_to(20, tried))
    cases = [Case(CONFIG, batch, torch.float32) for batch in (1, 2)]
    ours = Provider("ditfast-wrong", "fake", wrong)
    greedy = Provider("greedy", "fake", hungry)
    recorder = recorder_of()
    memory_command._measure(plan_of(cases, [PROVIDERS["reference"], ours, greedy], 64), recorder)
    summary = [(row.provider, row.batch, row.status, row.max_batch) for row in recorder.results.rows]
    assert summary == [
        ("reference", 1, "ok", 20),
        ("ditfast-wrong", 1, "ok", None),
        ("greedy", 1, "oom", 20),
        ("reference", 2, "ok", 20),
        ("ditfast-wrong", 2, "ok", None),
        ("greedy", 2, "oom", 20),
    ]
    assert recorder.results.rows[2].note.endswith(BESIDE_NOTE)  # run alone, this batch fits
    once = len(tried)
    memory_command._measure(plan_of(cases, [PROVIDERS["reference"], ours, greedy], 64), recorder)
    assert len(tried) == once


def test_a_row_without_its_largest_batch_is_not_measured_but_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr("ditfast.bench.suites.memory.trial", lambda case, *_: up_to(100, tried))
    row = replace(blank_row(Case(CONFIG, 1, torch.float32), PROVIDERS["reference"], CPU), status="ok", peak_bytes=510)
    plan = plan_of([Case(CONFIG, 1, torch.float32)], [PROVIDERS["reference"]], 64)
    recorder = recorder_of([row], deadline=0.0)  # long past
    memory_command._measure(plan, recorder)
    assert recorder.results.rows == [row] and tried == []
    recorder = recorder_of([row])
    memory_command._measure(plan, recorder)
    assert recorder.results.rows == [replace(row, max_batch=64)]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    base = blank_row(Case(CONFIG, 1, torch.float32, "train"), PROVIDERS["reference"], CPU)
    base = replace(base, status="ok", peak_bytes=4 << 30, saved_bytes=2 << 30, max_batch=0)
    ours = replace(base, provider="ditfast", peak_bytes=3 << 30, saved_bytes=1 << 30, max_batch=64)
    out = replace(base, provider="rival", status="oom", peak_bytes=None, saved_bytes=None, note="made up", max_batch=7)
    absent = replace(out, provider="absent", status="unavailable", note="not here")
    print_tables(memory_command.memory_table(recorder_of([base, ours, out, absent]).results))
    printed = capsys.readouterr().out
    cells = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert cells["ditfast"] == ["ditfast", "3.00", "GiB", "75%", "1.00", "GiB", "50%", "64", "or", "more"]
    assert cells["rival"] == ["rival", "out", "of", "memory", "-", "-", "-", "7"]
    [first] = [line for line in printed.splitlines() if " reference " in line and "GiB" in line]
    assert first.split()[-7:] == ["4.00", "GiB", "100%", "2.00", "GiB", "100%", "none"]
    assert "rival: made up" in printed and "Not measured: absent: not here" in printed
    assert "each try in a fresh process, to the next sixteenth" in printed


def memory(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "memory", *map(str, arguments)])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiT-S/8 becomes a model that takes no time."""
    monkeypatch.setattr("ditfast.config.MODELS", {**MODELS, "DiT-S/8": TINY})


def add_provider(monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[[Workload], Variant]) -> None:
    monkeypatch.setitem(PROVIDERS, name, Provider(name, "fake", build))


@pytest.mark.usefixtures("tiny")
def test_the_command_measures_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(work: Workload) -> Variant:
        built.append(work.case.mode)
        return PROVIDERS["reference"].build(work)

    add_provider(monkeypatch, "patient", build)
    add_provider(monkeypatch, "hungry", hungry)
    path = tmp_path / "r.json"
    arguments = ("--device", "cpu", "--json", path, "--providers", "reference,patient,hungry,ditfast")
    result = memory(*arguments)
    assert result.exit_code == 0, result.output
    for text in ("DiT-S/8", "saved for backward", "of reference", "100%", "out of memory", "searched on a GPU only"):
        assert text in result.stdout
    assert "hungry: OutOfMemoryError: tried to allocate 9 GiB" in result.stdout
    results = Results.load(path, "memory")
    assert results.complete and results.ceilings is None
    statuses = [(row.mode, row.batch, row.dtype, row.provider, row.status) for row in results.rows]
    assert statuses == [
        (mode, 2, "fp32", name, "oom" if name == "hungry" else "ok")
        for mode in ("forward", "train")
        for name in ("reference", "patient", "hungry", "ditfast")
    ]
    rows = {(row.mode, row.provider): row for row in results.rows}
    assert rows["train", "patient"].saved_bytes == rows["train", "reference"].saved_bytes > 0
    assert rows["forward", "patient"].saved_bytes is None
    assert all(row.max_batch is None for row in results.rows)

    again = memory(*arguments, "--continue", "--mode", "train", "--mode", "train-checkpoint")
    assert again.exit_code == 0, again.output
    assert "train, fp32: patient: measured before" in again.stderr
    assert built == ["forward", "train", "train-checkpoint"]
    assert len(Results.load(path).rows) == 12


@pytest.mark.usefixtures("tiny")
def test_interruption_keeps_the_rows_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(work: Workload) -> Variant:
        raise KeyboardInterrupt

    add_provider(monkeypatch, "patient", build)
    path = tmp_path / "r.json"
    result = memory("--device", "cpu", "--providers", "reference,patient", "--json", path)
    assert result.exit_code == 130, result.output
    assert "Interrupted or out of time: these are the rows so far." in result.stdout
    results = Results.load(path)
    assert not results.complete
    assert [(row.provider, row.mode) for row in results.rows] == [("reference", "forward")]


@pytest.mark.usefixtures("tiny")
def test_a_wrong_provider_of_ours_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    add_provider(monkeypatch, "ditfast-wrong", wrong)
    result = memory("--device", "cpu", "--mode", "forward", "--providers", "reference,ditfast-wrong")
    assert result.exit_code == 1, result.output
    assert "ditfast-wrong: parity failed: output: error" in result.stdout
    [line] = [line for line in result.stdout.splitlines() if line.strip().startswith("ditfast-wrong")]
    assert line.split()[1:] == ["-"] * 5


def test_the_command_on_meta_tensors(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    arguments = ("--device", "meta", "--model", "DiT-S/8", "--batch", 256, "--providers", "reference,ditfast")
    result = memory(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    assert "Nothing ran and nothing was judged" in result.stdout and "traced on meta tensors" in result.stdout
    rows = Results.load(path).rows
    assert [(row.mode, row.dtype, row.batch, row.peak_bytes) for row in rows] == [("train", "bf16", 256, None)] * 2
    assert rows[1].saved_bytes < rows[0].saved_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "DiT-S/3"], "did you mean 'DiT-S/"),
        (["--providers", "reference,ditfst"], "got 'ditfst'; did you mean 'ditfast'?"),
        (["--mode", "trian"], "did you mean 'train'?"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--max-batch", "16", "--batch", "32"], "--max-batch must be at least the largest --batch, 32, got 16"),
        (["--max-batch", "64"], "--max-batch is for the search, which takes a GPU and no --no-search, got 64"),
        (["--device", "tpu9"], "--device must be cpu, cuda or cuda:N, got 'tpu9'"),
        (["--device", "meta", "--mode", "forward"], "--mode must be train or train-checkpoint with --device meta"),
        (["--device", "meta", "--providers", "ditfast-compile"], "must be of reference, diffusers, ditfast with"),
        (["--budget", "soon"], "--budget must look like 90s, 9m or 1h, got 'soon'"),
        (["--json", "/no/such/folder/r.json"], "--json must be a file in a folder that exists"),
        (["--continue"], "--continue needs --json FILE"),
    ],
)
def test_wrong_options_exit_with_2_and_say_what_was_wanted(arguments: Sequence[str], message: str) -> None:
    result = memory(*(arguments if "--device" in arguments else ["--device", "cpu", *arguments]))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""
