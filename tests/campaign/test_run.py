"""The campaign: order, budget, going on, and how it ends."""

from __future__ import annotations

import _thread
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ditfast.bench.campaign import archives as campaign_archives
from ditfast.bench.campaign import plan as campaign_plan
from ditfast.bench.campaign.plan import plan
from ditfast.bench.campaign.run import Campaign, Done, Step
from ditfast.bench.records.files import Results
from ditfast.cli.command import app
from tests.campaign.conftest import model_row, states, step, write


@pytest.mark.quick
def test_steps_run_in_order_and_once(tmp_path: Path) -> None:
    log = tmp_path / "order.txt"
    note = f"open({str(log)!r}, 'a').write"
    steps = [
        step("first", f"{note}('1')"),
        step("absent", "", skip="not in this version"),
        step("parity", f"{note}('2'); raise SystemExit(1)"),
        step("broken", f"{note}('3'); raise SystemExit('no such thing')", fine=()),
        step("last", f"{note}('4')"),
    ]
    campaign = Campaign.open(tmp_path / "out")
    messages: list[str] = []
    campaign.run(steps, 600, messages.append)
    assert log.read_text() == "1234"
    expected = {"first": "done", "absent": "skipped", "parity": "done", "broken": "failed", "last": "done"}
    assert states(campaign) == expected
    assert campaign.steps["parity"].exit_code == 1
    assert campaign.steps["broken"].note == "exit code 1: no such thing"
    assert "absent: skipped: not in this version" in messages
    # again: failed steps are tried once more, finished ones are not
    again = Campaign.open(tmp_path / "out")
    assert states(again) == expected
    again.run(steps, 600, messages.append)
    assert log.read_text() == "12343"


SLOW = """
import signal, sys, time
def stop(*_):
    open(r'{json}', 'a').write('saved')
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
open(r'{json}', 'a').write('row ')
time.sleep(60)
"""


def test_a_step_past_its_limit_is_cut_after_saving_and_goes_on_later(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    steps = [step("slow", SLOW, limit=2.0), step("next", write("next"))]
    start = time.monotonic()
    campaign.run(steps, 25.0, lambda message: None, grace=20.0, minimum=1.5)
    assert time.monotonic() - start < 60
    assert states(campaign) == {"slow": "cut", "next": "done"}
    assert campaign.steps["slow"].note == "its time was up"
    # cut after its limit, and saved
    assert (tmp_path / "slow.json").read_text().startswith("row saved")
    assert (tmp_path / "next.json").read_text() == "next"
    quick = [step("slow", write("rest")), steps[1]]
    again = Campaign.open(tmp_path)
    again.run(quick, 60, lambda message: None)
    assert states(again) == {"slow": "done", "next": "done"}
    assert (tmp_path / "slow.json").read_text().endswith("rest")
    assert (tmp_path / "next.json").read_text() == "next"


def test_steps_beside_each_other_run_at_once_and_fail_alone(tmp_path: Path) -> None:
    meet = """
import pathlib, time
mine, other = pathlib.Path(r'{json}'), pathlib.Path(r'{json}').with_name('OTHER.json')
mine.write_text('here')
while not other.exists():
    time.sleep(0.05)
"""
    steps = [
        step("a", meet.replace("OTHER", "b"), beside=True),
        step("broken", "raise SystemExit('no such thing')", beside=True, fine=()),
        step("b", meet.replace("OTHER", "a"), beside=True),
        step("after", "pass"),
    ]
    campaign = Campaign.open(tmp_path)
    campaign.run(steps, 60, lambda message: None)
    assert states(campaign) == {"a": "done", "broken": "failed", "b": "done", "after": "done"}
    assert list(campaign.steps)[-1] == "after"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("complete", "ended", "code", "state"),
    [
        (True, True, 0, "done"),
        (True, True, 1, "done"),  # a missed parity is a result
        (False, True, 1, "cut"),
        (False, False, 1, "failed"),  # a crash, whose exit code is the same
        ("untouched", True, 1, "failed"),  # one before the first row, which leaves an earlier attempt's file
        ("error", True, 0, "failed"),  # a row that failed may not fail again
        (None, False, 1, "failed"),
        (True, True, 2, "failed"),
    ],
)
def test_a_suite_is_done_where_its_file_says_so(
    complete: bool | str | None, ended: bool, code: int, state: str, tmp_path: Path
) -> None:
    result = tmp_path / "made.json"
    copy = ""
    if complete is not None:
        readings = [{"when": "before"}, *([{"when": "after"}] if ended else [])]
        rows = [replace(model_row("ditfast"), status="error", ms=None, note="boom")] if complete == "error" else []
        Results("models", {}, {}, readings=readings, rows=rows, complete=bool(complete)).save(result)
        copy = f"import shutil; shutil.copy({str(result)!r}, r'{{json}}'); "
    campaign = Campaign.open(tmp_path / "out")
    if complete == "untouched":
        result.rename(tmp_path / "out" / "models.json")
        copy = ""
    steps = [step("models", f"{copy}raise SystemExit({code})", suite=True)]
    campaign.run(steps, 25.0, lambda message: None, grace=0.0, minimum=20.0)
    assert states(campaign) == {"models": state}


def test_steps_that_failed_before_come_last_and_once(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    steps = [step("broken", f"{write('x')}; raise SystemExit('no luck')", fine=()), step("new", "pass")]
    campaign.run(steps[:1], 60, lambda message: None)
    assert (tmp_path / "broken.json").read_text() == "x"
    messages: list[str] = []
    Campaign.open(tmp_path).run(steps, 60, messages.append)
    assert [text.split(":")[0] for text in messages if "up to" in text] == ["new", "broken"]
    assert (tmp_path / "broken.json").read_text() == "xx"


def test_a_step_with_work_left_is_not_done(tmp_path: Path) -> None:
    def tune(left: int) -> Step:
        return step("tune", f"print('12 measured, 0 failed, {left} left for another run')", left_over=plan_left_over())

    campaign = Campaign.open(tmp_path)
    campaign.run([tune(120)], 60, lambda message: None)
    assert states(campaign) == {"tune": "cut"}
    campaign.run([tune(0)], 60, lambda message: None)
    assert states(campaign) == {"tune": "done"}


def plan_left_over() -> str:
    [left_over] = [item.left_over for item in plan() if item.name == "tune"]
    return left_over


def test_a_step_that_serves_finished_steps_does_not_run(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    campaign.run([step("figure", "pass")], 60, lambda message: None)
    campaign.run([step("warm-up", "pass", serves=("figure",)), step("figure", "pass")], 60, lambda message: None)
    assert states(campaign) == {"figure": "done"}


OVERDUE = """
import os, pathlib, signal, sys, time
mine = pathlib.Path(r'{json}')
def stop(*_):
    mine.with_suffix('.asked').touch()
    while len(list(mine.parent.glob('*.asked'))) < 3:
        time.sleep(0.05)
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
mine.touch()
time.sleep(60)
"""


def test_overdue_steps_are_asked_to_end_at_once(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    steps = [step(name, OVERDUE, beside=True, limit=2.5) for name in "abc"]
    campaign.run(steps, 22.5, lambda message: None, grace=20.0, minimum=2.0)
    assert [(done.state, done.exit_code) for done in campaign.steps.values()] == [("cut", 7)] * 3


def test_a_result_file_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    result = tmp_path / "made"
    Results("models", {}, {}, complete=True).save(result)
    models = step("models", f"import shutil; shutil.copy({str(result)!r}, r'{{json}}')", suite=True)
    campaign = Campaign.open(tmp_path / "out")
    campaign.run([models], 60, lambda message: None)
    (tmp_path / "out" / "models.json").write_text("{")
    messages: list[str] = []
    campaign.run([models], 60, messages.append)
    assert states(campaign) == {"models": "done"}
    assert Results.load(tmp_path / "out" / "models.json").complete
    [aside] = (tmp_path / "out").glob("models.json.damaged-*")
    assert aside.read_text() == "{"
    assert "begins anew" in messages[0]


def test_a_step_knows_its_own_budget(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    code = "import sys; open(r'{json}', 'w').write('{seconds}')"
    campaign.run([step("one", code, limit=60)], 120.0, lambda message: None, grace=0.0)
    assert (tmp_path / "one.json").read_text() == "51s"  # 85 % of its limit
    campaign.run([step("two", code, limit=60)], 960.0, lambda message: None, grace=0.0)
    assert (tmp_path / "two.json").read_text() == "102s"  # twice the time that the plan is made for


@pytest.mark.quick
def test_an_interruption_stops_the_step_and_keeps_the_state(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)

    def interrupt() -> None:
        while not (tmp_path / "slow.json").exists():
            time.sleep(0.05)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        campaign.run([step("done", "pass"), step("slow", SLOW), step("never", "pass")], 120, lambda message: None)
    reopened = Campaign.open(tmp_path)
    assert states(reopened) == {"done": "done", "slow": "cut"}
    assert (tmp_path / "slow.json").read_text() == "row saved"


def test_without_time_no_step_runs(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    campaign.run([step("one", "pass")], 1.0, lambda message: None)
    assert campaign.steps == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "x"}', "SCHEMA", "STEPS"])
def test_a_damaged_state_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "campaign.state"
    if content in ("SCHEMA", "STEPS"):
        Campaign.open(tmp_path)
        data = json.loads(path.read_text())
        data["steps"] = {"verify": {"state": "fine"}} if content == "STEPS" else None
        content = json.dumps(data)
    path.write_text(content)
    with pytest.raises(ValueError, match="campaign.state is no state of a campaign"):
        Campaign.open(tmp_path)
    assert path.read_text() == content


def test_another_machine_or_version_is_refused(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    campaign.environment["gpu"] = {"name": "Another GPU"}
    campaign.save()
    with pytest.raises(ValueError, match="gpu name was 'Another GPU' there, is .* give another --out"):
        Campaign.open(tmp_path)


def test_after_a_change_of_the_sources_finished_steps_run_again(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    campaign.run([step("one", write("1")), step("broken", "raise SystemExit(3)")], 60, lambda message: None)
    campaign.steps["slow"] = Done("cut", 1.0, None)
    campaign.environment["source"] = "before"
    campaign.save()
    again = Campaign.open(tmp_path)
    assert states(again) == {"one": "older", "broken": "older", "slow": "cut"}
    assert again.steps["one"].note.startswith("source was 'before' there, is ")
    again.run([step("one", write("1"))], 60, lambda message: None)
    assert states(again)["one"] == "done"
    assert (tmp_path / "one.json").read_text() == "11"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "campaign", *map(str, arguments)])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon", "--rehearse"], "--budget must look like 90s, 9m or 1h, got 'soon'"),
        (["--budget", "-1m", "--rehearse"], "--budget must look like"),
        (["--budget", "30s", "--rehearse"], "--budget must be at least a minute"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--rehearse", "--device", "cuda"], "--rehearse runs on a CPU, and --device does not go with it"),
        (["--device", "cpu"], "campaign measures a GPU, and there is none; --rehearse tries the plan on a CPU"),
    ],
)
def test_bad_options(arguments: Sequence[str], message: str, tmp_path: Path) -> None:
    result = invoke("--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = invoke("--out", tmp_path / "out", "--rehearse")
    assert result.exit_code == 2
    assert "--out must be a folder that can be written" in result.stderr
    assert (tmp_path / "out").read_text() == "mine"


def test_two_campaigns_in_one_folder_are_refused(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "campaign.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = invoke("--out", tmp_path / "out", "--rehearse")
    assert result.exit_code == 2
    assert "another campaign runs in it" in result.stderr


def test_an_archive_that_cannot_be_written_ends_no_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def pack(campaign: Campaign, archives: Path) -> list[Path]:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device", "results.tar.xz")
        return []

    monkeypatch.setattr(campaign_archives, "pack_results", pack)
    monkeypatch.setattr(campaign_plan, "plan", lambda *arguments: [step("one", "pass"), step("two", "pass")])
    result = invoke("--out", tmp_path / "out", "--rehearse", "--budget", "2m")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("an archive is not written: ") == len(calls) - 1 == 3
    assert "one: done" in result.stderr and "two: done" in result.stderr

    (tmp_path / "file").touch()
    result = invoke("--out", tmp_path / "out", "--rehearse", "--archives", tmp_path / "file")
    assert result.exit_code == 2
    assert "--archives must be a folder that can be written" in result.stderr
