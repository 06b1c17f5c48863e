"""Going on with a result file: what is measured again, and which rows are kept apart from those it now has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditfast.bench.records.files import Ceilings, Older, Results
from ditfast.bench.records.rows import ModelRow, Spread
from ditfast.bench.suites.suite import Recorder, begin, renewing
from ditfast.environment import collect

SETTINGS = {"device": "cpu"}
CEILINGS = Ceilings(100.0, 4, {"bf16": 2.0}, {"bf16": 8})


def row(provider: str, ms: float = 10.0, batch: int = 1) -> ModelRow:
    blank = ModelRow("DiT-S/8", "adaln_zero", (32, 32), 16, 384, 12, batch, "bf16", "forward", provider, "bf16", "ok")
    return replace(blank, ms=Spread(ms, ms, ms, 5, 1), parity=True)


def saved(path: Path, *rows: ModelRow, **environment: Any) -> Results:
    results = Results("models", collect() | environment, SETTINGS, CEILINGS, rows=list(rows), complete=True)
    results.save(path)
    return results


def recorder(results: Results) -> Recorder:
    return Recorder(results, torch.device("cpu"), None, [], lambda message: None)


def test_unchanged_conditions_keep_the_rows(tmp_path: Path) -> None:
    before = saved(tmp_path / "r.json", row("reference"), row("ditfast"))
    results = begin("models", SETTINGS, tmp_path / "r.json", resume=True)
    assert (results.rows, results.older, results.parts, results.complete) == (before.rows, [], 2, False)
    assert recorder(results).has([row("reference").key, row("ditfast").key])


@pytest.mark.parametrize("cpu", [False, True])
def test_after_a_change_rows_are_older_until_they_are_measured_again(cpu: bool, tmp_path: Path) -> None:
    change: dict[str, Any] = {"cpu": {**collect()["cpu"], "model": "Another"}} if cpu else {"source": "before"}
    before = saved(tmp_path / "r.json", row("reference"), row("ditfast"), **change)
    results = begin("models", SETTINGS, tmp_path / "r.json", resume=True)
    reason = "cpu model was 'Another' there, is " if cpu else "source was 'before' there, is "
    assert (results.rows, results.ceilings) == ([], None)  # limits are of the rows beside them
    assert [item.row for item in results.older] == before.rows
    assert all(item.why.startswith(reason) for item in results.older)
    assert results.environment["source"] == collect()["source"]
    continued = recorder(results)
    assert not continued.has([row("reference").key])
    continued.add([row("ditfast", 5.0)])
    assert [item.row.provider for item in results.older] == ["reference"]
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == results


def test_an_unreadable_condition_counts_as_unchanged() -> None:
    old = collect() | {"gpu": {"name": "A", "driver": "570"}}
    new = old | {"gpu": {"name": "A", "driver": None}}
    assert renewing(old, new) == renewing(new, old) == ""
    assert renewing(old, old | {"gpu": {"name": "A", "driver": "580"}})


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_run_with_other_packages_is_refused(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "r.json", row("reference"), packages={**collect()["packages"], name: "0.1"})
    with pytest.raises(ValueError, match=f"--continue needs the conditions of .*packages {name} was '0.1' there"):
        begin("models", SETTINGS, tmp_path / "r.json", resume=True)


def test_a_case_that_begins_again_sets_its_rows_aside() -> None:
    results = Results("models", {}, {}, rows=[row("a"), row("b"), row("a", batch=2)])
    continued = recorder(results)
    continued.set_aside([row("a").key, row("b").key, row("absent").key])
    assert results.rows == [row("a", batch=2)]
    assert [item.row for item in results.older] == [row("a"), row("b")]
    assert all("did not come to the end of the case" in item.why for item in results.older)
    assert not continued.has([row("a").key])
    continued.set_aside([row("a").key])  # none is there twice
    assert len(results.older) == 2
    continued.add([row("b", 3.0)])
    assert [item.row.provider for item in results.older] == ["a"]


def test_rows_of_a_case_keep_its_place_and_come_in_their_order() -> None:
    results = Results("models", {}, {}, rows=[row("x", batch=1), row("ours", batch=2), row("y", batch=3)])
    continued = recorder(results)
    continued.add([row("rival", batch=2), row("ours", 5.0, batch=2)])
    assert [(item.provider, item.batch) for item in results.rows] == [("x", 1), ("rival", 2), ("ours", 2), ("y", 3)]


def test_a_file_from_before_there_were_older_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    saved(path, row("reference"))
    data = json.loads(path.read_text())
    del data["older"]
    path.write_text(json.dumps(data))
    assert Results.load(path).older == []


def test_damaged_older_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results = saved(path, row("reference"))
    results.older = [Older(row("ditfast"), "why")]
    results.save(path)
    data = json.loads(path.read_text())
    data["older"][0]["row"]["batch"] = "many"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"results.older\[0\].row.batch must be int"):
        Results.load(path)
