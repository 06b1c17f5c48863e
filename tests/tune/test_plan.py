"""``ditfast tune`` on made-up candidates: the parity gate, the noise rule, and tables that survive whatever comes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditfast.bench.records.rows import Spread
from ditfast.testing.operators import Inputs, Shape

pytest.importorskip("triton")
from ditfast.bench.tune import measure, plan  # noqa: E402
from ditfast.bench.tune import table as tune_table
from ditfast.bench.tune.measure import choose, measure_task  # noqa: E402
from ditfast.kernels.configs import tables  # noqa: E402
from tests.tune.made_up import BRIEF, CPU, FAST, GPU, HEURISTIC, Choice, Doubling, new_table, run, task  # noqa: E402


def spread(ms: float) -> Spread:
    return Spread(ms, ms, ms, 5, 1)



@pytest.mark.quick
def test_only_right_candidates_that_run_may_win(tmp_path: Path) -> None:
    """Wrong and failing candidates would be the fastest; the first reason is in the line."""
    wrong, failing = Choice(4, factor=2.01), Choice(8, error="out of resource: shared memory")
    unwritten = Choice(16, writes=False)
    choices = (HEURISTIC, wrong, failing, unwritten, FAST)
    table = new_table(tmp_path / "table.json")
    (measured, failed), [line] = run([task(*choices)], table)
    assert (measured, failed) == (1, 0)
    assert table.entries == {"adaln_bwd/float32/4/8": {"num_warps": FAST.warps}}
    saved = tables.read_table(tmp_path / "table.json")
    assert saved["entries"] == table.entries
    record = saved["measured"]["adaln_bwd/float32/4/8"]
    assert 0 < record["ms"] < record["heuristic_ms"] and record["noise"] >= 0
    assert record["shape"] == "B=1 T=8 D=4"
    assert line.startswith("[1/1] adaln_bwd/float32/4/8 (B=1 T=8 D=4): 2 warps: ")
    assert "3 of 5 out, the first 4 warps: wrong: y: error 5.0e-03 is above the bound 6.0e-08" in line

    outcome = measure_task(task(*choices), GPU, CPU, BRIEF)
    assert outcome.out["8 warps"] == "RuntimeError: out of resource: shared memory"
    assert outcome.out["16 warps"].startswith("wrong: y: error inf")
    assert (outcome.winner, outcome.heuristic, outcome.tried) == ("2 warps", "1 warps", 5)


@pytest.mark.quick
def test_the_heuristic_loses_only_by_more_than_the_noise() -> None:
    times = {"heuristic": spread(1.0), "other": spread(0.97), "slow": spread(2.0)}
    assert choose(times, "heuristic", 0.02) == "other"
    assert choose(times, "heuristic", 0.04) == "heuristic"
    assert choose({"heuristic": spread(1.0)}, "heuristic", 0.0) == "heuristic"
    assert choose({"other": spread(2.0)}, "heuristic", None) == "other"  # it failed at the end


def test_where_the_heuristic_wins_its_fields_are_written(tmp_path: Path) -> None:
    table = new_table(tmp_path / "table.json")
    _, [line] = run([task(FAST, HEURISTIC)], table)
    assert table.entries == {"adaln_bwd/float32/4/8": {"num_warps": FAST.warps}}
    assert "the heuristic's 2 warps: " in line
    record = table.measured["adaln_bwd/float32/4/8"]
    assert record["ms"] == record["heuristic_ms"]


def test_a_heuristic_that_is_wrong_is_replaced(tmp_path: Path) -> None:
    table = new_table(tmp_path / "table.json")
    _, [line] = run([task(HEURISTIC._replace(factor=3.0), FAST)], table)
    record = tables.read_table(table.path)["measured"]["adaln_bwd/float32/4/8"]
    assert (record["heuristic_ms"], table.entries["adaln_bwd/float32/4/8"]) == (None, {"num_warps": 2})
    assert "against the heuristic's which does not run" in line


@pytest.mark.quick
def test_a_candidate_that_fails_later_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails when captured, or in the middle of the timing."""
    sampler = measure._Contest._sampler

    def forbids(self: Any, config: Choice) -> Any:
        if config == FAST:
            raise RuntimeError("operation not permitted when stream is capturing")
        return sampler(self, config)

    with monkeypatch.context() as patch:
        patch.setattr(measure._Contest, "_sampler", forbids)
        outcome = measure_task(task(), GPU, CPU, BRIEF)
    assert (outcome.winner, list(outcome.out)) == ("1 warps", ["2 warps"])
    assert "when stream is capturing" in outcome.out["2 warps"]

    calls = 0

    class Tiring(Doubling):
        def call(self, config: Choice, inputs: Inputs) -> Tensor:
            nonlocal calls
            calls += config == FAST
            return super().call(config._replace(error="tired" if config == FAST and calls > 2 else ""), inputs)

    outcome = measure_task(replace(task(), family=Tiring()), GPU, CPU, BRIEF)
    assert (outcome.winner, outcome.out) == ("1 warps", {"2 warps": "RuntimeError: tired"})


def test_on_a_gpu_whole_rounds_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[int] = []

    def captured(call: Any, count: int) -> Any:
        captures.append(len([call(number) for number in range(count)]))
        return lambda: None

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure, "sampler", lambda call, device: float)  # a round takes a second
    contest = measure._Contest(task(), GPU, torch.device("cuda"), None)
    count = len(contest.pool)
    assert count == 192  # of 256 MB in inputs of 128 bytes, no more
    sample = contest._sampler(FAST)
    assert captures == [count]
    assert [sample(calls) for calls in (3 * count, count, 1)] == pytest.approx([3.0, 1.0, 1 / count])


def test_a_gpu_in_an_error_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every launch fails: the other candidates would be blamed for it."""

    item = task(HEURISTIC, Choice(8, error="illegal"), FAST)
    contest = measure._Contest(item, GPU, torch.device("cuda"), None)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "computes", lambda device: True)
        assert contest.right() == ["1 warps", "2 warps"]
        patch.setattr(measure, "computes", lambda device: False)
        with pytest.raises(measure.GpuLost, match="float32/4/8: 8 warps left the GPU in an error: .*illegal"):
            contest.right()

    def fails(item: Any, *rest: Any) -> Any:
        if item.shape.tokens == 16:
            raise measure.GpuLost("lost")
        return measure_task(item, *rest)

    monkeypatch.setattr(plan, "measure_task", fails)
    table = new_table(tmp_path / "table.json")
    with pytest.raises(measure.GpuLost):
        run([task(tokens=tokens) for tokens in (8, 16, 32)], table)
    assert list(tables.read_table(table.path)["entries"]) == ["adaln_bwd/float32/4/8"]


def test_a_shape_that_cannot_be_measured_does_not_stop_the_others(tmp_path: Path) -> None:
    def no_memory(shape: Shape) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    table = new_table(tmp_path / "table.json")
    tasks = [task(FAST._replace(factor=1.0)), task(hook=no_memory, tokens=16), task(tokens=32)]
    (measured, failed), lines = run(tasks, table)
    assert (measured, failed, list(table.entries)) == (1, 2, ["adaln_bwd/float32/4/32"])
    assert "not measured: RuntimeError: no candidate is right and runs; 1 of 1 out" in lines[0]
    assert "not measured: OutOfMemoryError: CUDA out of memory" in lines[1]


def test_the_budget_ends_the_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape unfinished at the end is left out; measured ones are saved."""
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    for module in (plan, measure):
        monkeypatch.setattr(module, "time", clock)

    def passes(shape: Shape) -> None:
        nonlocal now
        now += 40.0

    table = new_table(tmp_path / "table.json")
    tasks = [task(hook=passes, tokens=tokens) for tokens in (8, 16, 32, 64)]
    (measured, failed), lines = run(tasks, table, budget=90.0)
    assert (measured, failed, len(lines)) == (2, 0, 2)
    assert list(tables.read_table(table.path)["entries"]) == ["adaln_bwd/float32/4/8", "adaln_bwd/float32/4/16"]


def interrupting(shape: Shape) -> None:
    if shape.tokens == 32:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.quick
def test_an_interruption_keeps_the_entries_and_a_later_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    tasks = [task(hook=interrupting, tokens=tokens) for tokens in (8, 16, 32, 64)]
    with pytest.raises(KeyboardInterrupt):
        run(tasks, new_table(path))
    first = tables.read_table(path)
    assert len(first["entries"]) == len(first["measured"]) == 2

    table = new_table(path)
    left = [item for item in tasks if not table.has(item.key)]
    assert left == tasks[2:]
    run([task(tokens=item.shape.tokens) for item in left], table)
    saved = tables.read_table(path)
    assert list(saved["entries"]) == [item.key for item in tasks]  # in the order of their numbers
    assert {key: saved["measured"][key] for key in first["measured"]} == first["measured"]
    assert list(tmp_path.iterdir()) == [path]


def test_other_versions_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    run([task(), task(tokens=16)], new_table(path))
    for name in ("torch", "triton", "kernels"):
        with monkeypatch.context() as patch:
            newer = tune_table.versions() | {name: "newer"}
            patch.setattr(tune_table, "versions", lambda newer=newer: newer)
            table = new_table(path)
        assert not table.has(task().key)
    run([task()], table)
    measured = tables.read_table(path)["measured"]
    assert [measured[item.key]["kernels"] for item in (task(), task(tokens=16))] == [
        "newer",
        tune_table.versions()["kernels"],
    ]


def test_a_digest_tells_kernels_apart_and_no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "configs" / "tables.py"))
    (tmp_path / "gemm.py").write_text("a")
    before = tune_table.versions()["kernels"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "nvidia.json").write_text("{}")
    assert tune_table.versions()["kernels"] == before
    (tmp_path / "gemm.py").write_text("b")
    assert tune_table.versions()["kernels"] != before


def test_a_table_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    run([task()], new_table(path))
    before = path.read_bytes()

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run([task(tokens=16)], new_table(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.quick
def test_a_table_is_data_for_people(tmp_path: Path) -> None:
    table = new_table(tmp_path / "table.json")
    for tokens in (1024, 8, 64):
        times = {"ms": 0.123456, "heuristic_ms": 0.2, "noise": None}
        table.add(f"adaln_bwd/bfloat16/4/{tokens}", {"num_warps": 4}, times, f"T={tokens}")
    lines = table.path.read_text().splitlines()
    entries = [line.strip(" ,") for line in lines if '"num_warps"' in line]
    assert entries == [f'"adaln_bwd/bfloat16/4/{tokens}": {{"num_warps": 4}}' for tokens in (8, 64, 1024)]
    saved = json.loads(table.path.read_text())
    assert saved["environment"] == {"gpu": {"name": GPU.name}}
    assert saved["measured"]["adaln_bwd/bfloat16/4/8"]["ms"] == 0.1235


def test_a_damaged_or_foreign_table_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for text, message in (
        ("{", "is not a readable table"),
        (replace(new_table(path), gpu="NVIDIA A100").render(), "is the table of 'NVIDIA A100', this GPU is"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            new_table(path)
        assert str(path) in str(error.value)
        assert path.read_text() == text
    for nowhere in (tmp_path, tmp_path / "absent" / "table.json"):
        with pytest.raises(ValueError, match="--out must be a file in a folder that exists and can be written"):
            new_table(nowhere)
