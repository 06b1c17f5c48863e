"""The campaign: order, budget, going on, and how it ends."""

from __future__ import annotations

import _thread
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from ditfast.bench import campaign_command
from ditfast.bench.campaign import Campaign, Step
from ditfast.bench.records import Results
from ditfast.bench.rows import VerifyRow
from ditfast.cli import app


def step(name: str, code: str, **options: object) -> Step:
    return Step(name, ("-c", code), **options)  # type: ignore[arg-type]


def write(text: str) -> str:
    return f"open({{json!r}}, 'a').write({text!r})".replace("{json!r}", "r'{json}'")


def states(campaign: Campaign) -> dict[str, str]:
    return {name: done.state for name, done in campaign.steps.items()}


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
    said: list[str] = []
    campaign.run(steps, 600, said.append)
    assert log.read_text() == "1234"
    wanted = {"first": "done", "absent": "skipped", "parity": "done", "broken": "failed", "last": "done"}
    assert states(campaign) == wanted
    assert campaign.steps["parity"].exit_code == 1
    assert campaign.steps["broken"].note == "exit code 1: no such thing"
    assert "absent: skipped: not in this version" in said
    # again: what failed is tried once more, what is done is not
    again = Campaign.open(tmp_path / "out")
    assert states(again) == wanted
    again.run(steps, 600, said.append)
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


def test_a_step_past_its_share_is_cut_after_saving_and_goes_on_later(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    steps = [step("slow", SLOW, share=0.2), step("next", write("next"))]
    start = time.monotonic()
    campaign.run(steps, 34.0, lambda what: None, grace=20.0, minimum=1.0)
    assert time.monotonic() - start < 60
    assert states(campaign) == {"slow": "cut", "next": "done"}
    assert campaign.steps["slow"].note == "its time was up"
    # cut after its share, and saved
    assert (tmp_path / "slow.json").read_text().startswith("row saved")
    assert (tmp_path / "next.json").read_text() == "next"
    quick = [step("slow", write("rest")), steps[1]]
    again = Campaign.open(tmp_path)
    again.run(quick, 60, lambda what: None)
    assert states(again) == {"slow": "done", "next": "done"}
    assert (tmp_path / "slow.json").read_text().endswith("rest")
    assert (tmp_path / "next.json").read_text() == "next"


@pytest.mark.parametrize(
    ("complete", "ended", "code", "state"),
    [
        (True, True, 0, "done"),
        (True, True, 1, "done"),  # a missed parity is a result
        (False, True, 1, "cut"),
        (False, False, 1, "failed"),  # a crash, whose exit code is the same
        (None, False, 1, "failed"),
        (True, True, 2, "failed"),
    ],
)
def test_a_suite_is_done_where_its_file_says_so(
    complete: bool | None, ended: bool, code: int, state: str, tmp_path: Path
) -> None:
    made = tmp_path / "made.json"
    copy = ""
    if complete is not None:
        readings = [{"when": "before"}, *([{"when": "after"}] if ended else [])]
        Results("models", {}, {}, readings=readings, complete=complete).save(made)
        copy = f"import shutil; shutil.copy({str(made)!r}, r'{{json}}'); "
    campaign = Campaign.open(tmp_path / "out")
    steps = [step("models", f"{copy}raise SystemExit({code})", suite=True)]
    campaign.run(steps, 25.0, lambda what: None, grace=0.0, minimum=20.0)
    assert states(campaign) == {"models": state}


def test_a_step_knows_its_own_budget(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    code = "import sys; open(r'{json}', 'w').write('{seconds}')"
    campaign.run([step("one", code, share=0.5)], 120.0, lambda what: None, grace=0.0)
    assert (tmp_path / "one.json").read_text() == "51s"  # 85 % of its share


def test_an_interruption_stops_the_step_and_keeps_the_state(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)

    def interrupt() -> None:
        while not (tmp_path / "slow.json").exists():
            time.sleep(0.05)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        campaign.run([step("done", "pass"), step("slow", SLOW), step("never", "pass")], 120, lambda what: None)
    there = Campaign.open(tmp_path)
    assert states(there) == {"done": "done", "slow": "cut"}
    assert (tmp_path / "slow.json").read_text() == "row saved"


def test_no_time_no_step(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    campaign.run([step("one", "pass")], 1.0, lambda what: None)
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


def test_another_machine_or_version_is_no_continuation(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    campaign.environment["gpu"] = {"name": "Another GPU"}
    campaign.save()
    with pytest.raises(ValueError, match="gpu name was 'Another GPU' there, is .* give another --out"):
        Campaign.open(tmp_path)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "campaign", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon", "--device", "cpu"], "--budget must look like 90s, 9m or 1h, got 'soon'"),
        (["--budget", "-1m", "--device", "cpu"], "--budget must look like"),
        (["--device", "cuda:99"], "CUDA devices"),
    ],
)
def test_bad_options(arguments: Sequence[str], message: str, tmp_path: Path) -> None:
    result = invoke("--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "campaign measures a GPU, and there is none; --device cpu rehearses" in result.stderr


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = invoke("--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2
    assert "--out must be a folder that can be written" in result.stderr
    assert (tmp_path / "out").read_text() == "mine"


def test_the_steps_are_commands_that_exist() -> None:
    """Each step's options are options of its command, so that no step fails for a typo on a lent machine."""
    import typer.main

    groups = typer.main.get_command(app).commands
    for device in ("cuda", "cpu"):
        steps = campaign_command.make_steps(torch.device(device))
        assert len({item.name for item in steps}) == len(steps)
        assert steps[0].name == "verify"
        for item in steps:
            words = list(item.command)
            if item.skip or words[:2] != ["-m", "ditfast"]:
                continue
            command = groups[words[2]].commands[words[3]] if words[2] == "bench" else groups[words[2]]
            known = {opt for parameter in command.params for opt in (*parameter.opts, *parameter.secondary_opts)}
            assert {word for word in words[3:] if word.startswith("--")} <= known, item.name
            assert any("{json}" in word for word in words)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_without_diffusers_sampling_is_skipped_with_the_reason(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    steps = [item for item in campaign_command.make_steps(torch.device(device)) if "sample" in item.command]
    assert steps
    campaign = Campaign.open(tmp_path)
    campaign.run(steps, 600, lambda what: None)
    reason = "the package diffusers is not installed (pip install ditfast[diffusers])"
    assert {(done.state, done.note) for done in campaign.steps.values()} == {("skipped", reason)}


def test_the_command_ends_with_the_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    ok = VerifyRow("gated_residual", "torch", "fp32", "output0", 1e-7, 1e-7, 2e-7, True)

    def plan(rows: list[VerifyRow]) -> list[Step]:
        path = tmp_path / "made.json"
        Results("verify", {}, {}, rows=rows, complete=True).save(path)
        return [step("verify", f"import shutil; shutil.copy({str(path)!r}, r'{{json}}')")]

    monkeypatch.setattr(campaign_command, "make_steps", lambda device: plan([ok]))
    result = invoke("--out", out, "--device", "cpu", "--budget", "60s")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("not measured") == 11
    assert "1 judged" in result.stdout and "met" in result.stdout

    # the line it ends with works
    words = next(line for line in result.stderr.splitlines() if "bench report" in line).split("ditfast bench report ")
    pattern = Path(words[1].split()[0])
    assert [Results.load(path).suite for path in sorted(pattern.parent.glob(pattern.name))] == ["verify"]

    (out / "damaged.json").write_text("{")  # is named and left out
    [wrong] = plan([replace(ok, ok=False)])
    monkeypatch.setattr(campaign_command, "make_steps", lambda device: [replace(wrong, name="again")])
    result = invoke("--out", out, "--device", "cpu", "--budget", "60s")
    assert result.exit_code == 1, result.output
    assert "left out: " in result.stderr and "damaged.json" in result.stderr
    assert "missed" in result.stdout and "verify gated_residual fp32" in result.stdout
