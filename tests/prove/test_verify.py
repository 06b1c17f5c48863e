"""``ditfast verify``: no check is left out, and a failure costs only its own row."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner, Result

import ditfast
from ditfast.bench.cases.case import DTYPES
from ditfast.bench.measure.preparing import computes
from ditfast.bench.measure.processes import describe_exit
from ditfast.bench.prove import processes
from ditfast.bench.prove.processes import run_checks
from ditfast.bench.prove.verify import Check, checks, failed, groups, render, run_check
from ditfast.bench.records.files import Results
from ditfast.bench.records.rows import VerifyRow
from ditfast.cli.command import app
from ditfast.config import Conditioning
from ditfast.testing.operators import OPERATORS
from tests.prove import conftest as fakes
from tests.prove.conftest import made_up

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FIRST, SECOND, THIRD = (made_up(name, fakes.passes) for name in ("first", "second", "third"))
RAISING = made_up("raising", fakes.raises)


@pytest.mark.quick
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_every_check_is_in_one_group(device: torch.device) -> None:
    all_checks = checks(device)
    parts = groups(all_checks)
    keys = [item.key for item in all_checks]
    assert len(set(keys)) == len(keys)
    assert sorted((item.key for part in parts for item in part), key=keys.index) == keys
    for part in parts:
        [(family, dtype)] = {item.group for item in part}
        assert all(item.dtype.partition(",")[0] == dtype for item in part)
        assert [item.key for item in part] == sorted((item.key for item in part), key=keys.index)
        subjects = {item.subject for item in part}
        assert subjects in (
            {operator.name for operator in OPERATORS.values() if operator.family == family},
            {f"DiT, {design}" for design in get_args(Conditioning)},
        )
    assert len(parts) == len(DTYPES) * (len({operator.family for operator in OPERATORS.values()}) + 1)
    everything = {*OPERATORS, *(f"DiT, {design}" for design in get_args(Conditioning))}
    for label in DTYPES:
        assert {item.subject for item in all_checks if item.dtype == label} == everything
    assert [item.key for item in pickle.loads(pickle.dumps(all_checks))] == keys
    only = checks(device, ["bf16", "fp32"])
    assert [item.key for item in only] == [item.key for item in all_checks if item.group[1] != "fp16"]


@pytest.mark.quick
def test_kernels_are_checked_whatever_the_choice() -> None:
    kernels = {name for name, operator in OPERATORS.items() if operator.kernel}
    assert {item.subject for item in checks(CUDA) if item.backend == "kernel"} == kernels
    assert {item.subject for item in checks(CPU) if item.backend == "interpreter"} == kernels
    for name, operator in OPERATORS.items():
        mixed = {item.dtype for item in checks(CUDA) if item.subject == name and "stream" in item.dtype}
        assert mixed == ({"bf16, fp32 stream", "fp16, fp32 stream"} if operator.mixed else set())


@pytest.mark.quick
def test_the_worst_tensor_is_the_row() -> None:
    row = run_check(made_up("it", fakes.misses), CPU)
    assert row == VerifyRow("it", "torch", "fp32", "bad", None, 1e-8, 2e-8, False)


@pytest.mark.quick
def test_an_exception_is_a_failed_row() -> None:
    row = run_check(RAISING, CPU)
    note = "RuntimeError: no kernel for [/this]"
    assert row == VerifyRow("raising", "torch", "fp32", "", None, None, None, False, note)


def test_a_note_is_one_line_with_both_ends() -> None:
    row = failed(FIRST, "CompilationError: at 3:4\n" + "x = 1\n" * 500 + "no such attribute")
    assert len(row.note) <= 300 and "\n" not in row.note
    assert row.note.startswith("CompilationError: at 3:4 ") and row.note.endswith("no such attribute")


def test_an_interruption_is_no_row() -> None:
    def interrupted(device: torch.device) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_check(made_up("it", interrupted), CPU)


def test_a_fault_that_shows_later_is_its_own_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert run_check(FIRST, CUDA).note == "RuntimeError: CUDA error: misaligned address"
    assert run_check(FIRST, CPU).ok
    assert not computes(CUDA) and computes(CPU)


def test_without_processes_every_check_has_the_reason_after_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's torch has no CUDA, or the device is not there."""
    started = []
    inner = processes._Worker.__init__

    def count(self: Any, *arguments: Any) -> None:
        started.append(self)
        inner(self, *arguments)

    monkeypatch.setattr(processes._Worker, "__init__", count)
    rows = list(run_checks([made_up(name, fakes.passes) for name in "ab"], torch.device("cuda", 99), jobs=1))
    assert len(rows) == 2 and len(started) == 1
    assert all(not row.ok and row.note.startswith("no process could begin: ") for row in rows)
    assert all("exit code" not in row.note for row in rows)


def test_signals_without_a_name() -> None:
    assert describe_exit(-40) == "signal 40"
    assert describe_exit(-9) == "signal SIGKILL"


@pytest.fixture(scope="module")
def rows() -> dict[str, VerifyRow]:
    """Two groups side by side, with every kind of failure."""
    ends = [
        made_up("a0", fakes.passes),
        made_up("raises", fakes.raises),
        made_up("a1", fakes.passes),
        made_up("killed", fakes.is_killed),
        made_up("a2", fakes.passes),
        made_up("leaves", fakes.leaves),
    ]
    sticks = [
        made_up("b0", fakes.passes, "others"),
        made_up("breaks", fakes.breaks_the_device, "others"),
        made_up("b1", fakes.passes, "others"),
        made_up("misses", fakes.misses, "others"),
        made_up("hangs", fakes.hangs, "others"),
    ]
    results = list(run_checks([*ends, *sticks], CPU, jobs=2, limit=2.0))
    assert not multiprocessing.active_children()
    names = [row.subject for row in results]
    for part in (ends, sticks):
        subjects = [item.subject for item in part]
        assert [name for name in names if name in subjects] == subjects
    assert len(names) == len(ends) + len(sticks)
    return {row.subject: row for row in results}


@pytest.mark.subprocess
def test_in_a_process_an_exception_costs_its_row(rows: dict[str, VerifyRow]) -> None:
    assert rows["raises"].note == "RuntimeError: no kernel for [/this]"
    assert rows["a0"].ok and rows["a0"].tensor == rows["a1"].tensor  # the same process goes on
    assert rows["a0"].tensor != rows["b0"].tensor  # each group has its own
    assert (rows["misses"].ok, rows["misses"].tensor) == (False, "bad")


@pytest.mark.subprocess
def test_a_process_that_dies_costs_the_row_it_was_at(rows: dict[str, VerifyRow]) -> None:
    assert rows["killed"].note == "its process died: signal SIGKILL"
    assert rows["leaves"].note == "its process died: exit code 3"
    assert rows["a2"].ok and rows["a2"].tensor != rows["a1"].tensor


@pytest.mark.subprocess
def test_an_error_that_sticks_costs_its_row(rows: dict[str, VerifyRow]) -> None:
    assert rows["breaks"].note == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert rows["b1"].ok and rows["b1"].tensor != rows["b0"].tensor


@pytest.mark.subprocess
def test_a_check_that_hangs_is_ended(rows: dict[str, VerifyRow]) -> None:
    assert rows["hangs"].note == "killed: it had not ended after 2 s"


@pytest.mark.subprocess
@pytest.mark.kernels
def test_worker_processes_agree_with_this_one() -> None:
    embedding_checks = [item for item in checks(CPU, ["fp32"]) if item.group[0] == "embedding"]
    regrouped = [replace(item, group=(item.backend, "fp32")) for item in embedding_checks]
    assert len(groups(regrouped)) == 2
    inline = {item.key: run_check(item, CPU) for item in regrouped}
    parallel = {row.key: row for row in run_checks(regrouped, CPU, jobs=2)}
    assert inline.keys() == parallel.keys()
    for key, row in inline.items():
        assert row.ok and row.error
        # a sum's order is that of its threads
        assert asdict(parallel[key]) == {**asdict(row), "error": pytest.approx(row.error, rel=1e-2)}


@pytest.mark.parametrize(
    ("device", "jobs", "cores", "expected"),
    [
        (CUDA, None, 16, (8, 2)),
        (CUDA, None, 4, (4, 1)),
        (CUDA, None, 2, (2, 1)),
        (CUDA, 1, 16, (1, 16)),
        (CUDA, 99, 16, (15, 1)),
        (CPU, None, 16, None),
        (CPU, 1, 16, None),
        (CPU, 3, 16, (3, 5)),
    ],
)
def test_how_many_processes_and_threads(
    device: torch.device,
    jobs: int | None,
    cores: int,
    expected: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, int]] = []

    def in_processes(parts: Any, device: torch.device, jobs: int, threads: int, limit: float) -> Iterator[VerifyRow]:
        calls.append((jobs, threads))
        return iter(())

    monkeypatch.setattr(processes, "_in_processes", in_processes)
    monkeypatch.setattr(processes, "cpu_cores", lambda: cores)
    run_checks(checks(device), device, jobs)
    assert calls == ([] if expected is None else [expected])


@pytest.mark.subprocess
def test_a_killed_parent_leaves_no_process() -> None:
    script = (
        "import torch\nfrom tests.prove import conftest as fakes\n"
        "from ditfast.bench.prove.processes import run_checks\n"
        "if __name__ == '__main__':\n"
        "    list(run_checks([fakes.made_up('it', fakes.hangs)], torch.device('cpu'), jobs=2))\n"
    )
    root = str(Path(ditfast.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{script}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        try:
            worker = int(parent.stderr.readline())
        finally:
            parent.kill()
    deadline = time.monotonic() + 30
    while _lives(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # which nobody may have waited for


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the checks that the command finds."""

    def plan(*planned: Check) -> None:
        def planned_checks(device: torch.device, dtypes: Sequence[str] | None = None) -> list[Check]:
            return [replace(item, group=("made up", (dtypes or ["fp32"])[0])) for item in planned]

        monkeypatch.setattr("ditfast.bench.prove.verify.checks", planned_checks)

    return plan


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["verify", "--device", "cpu", *map(str, arguments)])


@pytest.mark.quick
def test_the_command_goes_on_after_a_failure(plan: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    plan(FIRST, RAISING, SECOND)
    result = verify("--json", path)
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines() == [
        "ok   first, torch, fp32",
        "FAIL raising, torch, fp32: RuntimeError: no kernel for [/this]",
        "ok   second, torch, fp32",
    ]
    assert "RuntimeError: no kernel for [/this]" in result.stdout  # not taken for markup
    assert "not finite" not in result.stdout
    results = Results.load(path, "verify")
    assert results.complete
    assert [(row.subject, row.ok) for row in results.rows] == [("first", True), ("raising", False), ("second", True)]
    plan(FIRST, SECOND)
    assert verify().exit_code == 0


def test_the_table_is_in_the_order_of_the_checks(
    plan: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, saved = tmp_path / "verify.json", []

    def backwards(planned: Sequence[Check], device: torch.device, jobs: int | None) -> Iterator[VerifyRow]:
        assert jobs == 5
        for item in reversed(planned):
            yield run_check(item, device)
            results = Results.load(path, "verify")
            saved.append([row.subject for row in results.rows])
            assert not results.complete

    monkeypatch.setattr(processes, "run_checks", backwards)
    plan(FIRST, SECOND, THIRD)
    result = verify("--json", path, "--jobs", 5)
    assert result.exit_code == 0, result.output
    assert saved == [["third"], ["second", "third"], ["first", "second", "third"]]
    assert Results.load(path, "verify").complete
    lines = [line.split()[0] for line in result.stdout.splitlines() if " fp32 " in line]
    assert lines == ["first", "second", "third"]


@pytest.mark.quick
def test_continue_judges_missing_and_failed_checks(plan: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    plan(FIRST, RAISING)
    assert verify("--json", path, "--continue").exit_code == 1  # no earlier rows: every check runs
    plan(FIRST, replace(RAISING, judge=fakes.passes), SECOND)
    result = verify("--json", path, "--continue")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == ["ok   raising, torch, fp32", "ok   second, torch, fp32"]
    assert result.stdout.count("pass") == 3
    results = Results.load(path, "verify")
    assert (results.complete, results.parts, [row.subject for row in results.rows]) == (
        True, 2, ["first", "raising", "second"],
    )  # fmt: skip
    # checks that are gone have no row
    plan(SECOND)
    result = verify("--json", path, "--continue")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [row.subject for row in Results.load(path, "verify").rows] == ["second"]
    plan(FIRST, SECOND)
    assert verify("--json", path).stderr.count("ok ") == 2  # without --continue every check runs


def test_continue_needs_the_same_conditions(plan: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    plan(FIRST)
    assert verify("--json", path).exit_code == 0
    before = path.read_bytes()
    result = verify("--json", path, "--continue", "--dtype", "bf16")
    assert result.exit_code == 2
    assert "--continue needs the conditions of" in result.stderr and "dtype was ['fp32'] there" in result.stderr
    assert path.read_bytes() == before
    result = verify("--continue")
    assert result.exit_code == 2
    assert "--continue needs --json FILE" in result.stderr


def test_no_processes_at_all_are_refused(plan: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    plan(FIRST)
    result = verify("--jobs", 0, "--json", path)
    assert (result.exit_code, result.stderr) == (2, "error: jobs must be at least 1, got 0\n")
    assert not path.exists()


@pytest.mark.subprocess
def test_an_interruption_keeps_the_rows_and_leaves_no_process(plan: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    interrupting = made_up("interrupting", partial(fakes.interrupts_the_parent, str(path)))
    plan(FIRST, interrupting, SECOND)
    result = verify("--json", path, "--jobs", 2)
    assert result.exit_code == 130, result.output
    assert not multiprocessing.active_children()
    assert result.stdout.count("pass") == 1
    results = Results.load(path, "verify")
    assert (results.complete, [row.subject for row in results.rows]) == (False, ["first"])
    plan(FIRST, replace(interrupting, judge=fakes.passes), SECOND)
    assert verify("--json", path, "--continue").exit_code == 0
    assert Results.load(path, "verify").complete


@pytest.mark.quick
def test_interrupted_before_the_first_row(plan: Callable[..., None], tmp_path: Path) -> None:
    def interrupted(device: torch.device) -> Any:
        raise KeyboardInterrupt

    plan(made_up("it", interrupted))
    result = verify("--json", tmp_path / "verify.json")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted before the first rows\n"


def test_a_value_that_is_not_finite_is_marked() -> None:
    [row] = [run_check(made_up("it", fakes.misses), CPU)]
    cells = [list(column.cells) for column in render([row, failed(FIRST, "gone")]).columns]
    assert [column[0] for column in cells[3:]] == ["bad", "not finite", "1.00e-08", "2.00e-08", "[red]FAIL[/]"]
    assert [column[1] for column in cells[3:]] == ["gone", "-", "-", "-", "[red]FAIL[/]"]
