"""The campaign: order, budget, going on, and how it ends."""

from __future__ import annotations

import _thread
import json
import subprocess
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
from ditfast.bench.archives import read_archive, write_archive
from ditfast.bench.campaign import Campaign, Done, Step
from ditfast.bench.campaign_archives import Caches, pack_results, unpack_results
from ditfast.bench.campaign_plan import plan
from ditfast.bench.campaign_table import Figure, figures, has_parity
from ditfast.bench.records import Older, Results
from ditfast.bench.rows import ModelRow, VerifyRow
from ditfast.bench.timing import Spread
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


def test_a_step_past_its_limit_is_cut_after_saving_and_goes_on_later(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    steps = [step("slow", SLOW, limit=4.0), step("next", write("next"))]
    start = time.monotonic()
    campaign.run(steps, 30.0, lambda what: None, grace=20.0, minimum=3.0)
    assert time.monotonic() - start < 60
    assert states(campaign) == {"slow": "cut", "next": "done"}
    assert campaign.steps["slow"].note == "its time was up"
    # cut after its limit, and saved
    assert (tmp_path / "slow.json").read_text().startswith("row saved")
    assert (tmp_path / "next.json").read_text() == "next"
    quick = [step("slow", write("rest")), steps[1]]
    again = Campaign.open(tmp_path)
    again.run(quick, 60, lambda what: None)
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
    campaign.run(steps, 60, lambda what: None)
    assert states(campaign) == {"a": "done", "broken": "failed", "b": "done", "after": "done"}
    assert list(campaign.steps)[-1] == "after"


def renew(campaign: Campaign, archives: Path) -> None:
    pack_results(campaign, archives)


INTERRUPTS = """
import os, signal, time
if not os.path.exists(r'{json}'):
    open(r'{json}', 'w').write('begun ')
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.parametrize("at", range(4))
def test_an_interruption_loses_nothing_that_was_done_and_the_archive_goes_on_elsewhere(at: int, tmp_path: Path) -> None:
    """What is in the archive at that moment is enough."""
    steps = [step(f"s{index}", write(f"done {index}"), beside=index < 2) for index in range(4)]
    cut = list(steps)
    cut[at] = replace(steps[at], command=("-c", INTERRUPTS))
    campaign, archives = Campaign.open(tmp_path / "here"), tmp_path / "archives"
    archives.mkdir()
    with pytest.raises(KeyboardInterrupt):
        campaign.run(cut, 120, lambda what: None, lambda: renew(campaign, archives))
    assert states(campaign)[f"s{at}"] == "cut"
    [archive] = archives.iterdir()
    unpack_results(archive, tmp_path / "there")
    there = Campaign.open(tmp_path / "there")
    before = states(there)
    assert before == states(campaign)
    assert all(before[f"s{index}"] == "done" for index in range(at if at >= 2 else 0))
    there.run(steps, 120, lambda what: None)
    assert set(states(there).values()) == {"done"}
    for index in range(4):
        text = (tmp_path / "there" / f"s{index}.json").read_text()
        if index == at:
            assert text == f"begun done {index}"
        elif before.get(f"s{index}") != "cut":  # one beside it, in whatever it was
            assert text == f"done {index}"


def test_archives_hold_the_ends_of_long_logs_and_the_state(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path / "out")
    campaign.run([step("loud", "print('first'); print('x' * 2_000_000); print('last')")], 60, lambda what: None)
    (tmp_path / "out" / "tune.json.table").write_text("{}")
    [archive] = pack_results(campaign, tmp_path)
    packed = dict(read_archive(archive))
    assert set(packed) == {"campaign.state", "logs/loud.txt", "tune.json.table"}
    assert len(packed["logs/loud.txt"]) == 500_000 and packed["logs/loud.txt"].endswith(b"last\n")
    assert json.loads(packed["campaign.state"])["environment"]["packages"]["torch"] == torch.__version__
    assert archive.stat().st_size < 15_000_000


def test_only_a_campaigns_archive_is_gone_on_with_and_only_in_a_new_folder(tmp_path: Path) -> None:
    write_archive([("a.txt", Path(__file__))], tmp_path / "other.tar.xz")
    with pytest.raises(ValueError, match="must be given the results.tar.xz of a campaign, got .*other.tar.xz"):
        unpack_results(tmp_path / "other.tar.xz", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    campaign = Campaign.open(tmp_path / "out")
    [archive] = pack_results(campaign, tmp_path)
    with pytest.raises(ValueError, match="out holds a campaign already"):
        unpack_results(archive, tmp_path / "out")


def test_caches_are_packed_when_they_have_changed_and_come_back(tmp_path: Path) -> None:
    caches = Caches(tmp_path / "caches", tmp_path)
    kernels, inductor = (Path(folder) for folder in caches.variables.values())
    folder = kernels / "KEY"
    folder.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "k.ttir"):
        (folder / name).write_text(name)
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.cubin": "/x/k.cubin", "k.json": "/x/k.json"}}))
    (inductor / "fxgraph").mkdir(parents=True)
    (inductor / "fxgraph" / "graph").write_text("graph")
    (inductor / "locks").mkdir()
    (inductor / "locks" / "held").write_text("")
    assert [path.name for path in caches.pack()] == ["triton-cache.tar.xz", "inductor-cache.tar.xz"]
    assert caches.pack() == []
    there = Caches(tmp_path / "there", tmp_path)
    said = there.fill([tmp_path / "triton-cache.tar.xz", tmp_path / "inductor-cache.tar.xz"])
    assert len(said) == 2
    found = {str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*") if path.is_file()}
    group = "triton/KEY/__grp__k.json"
    assert found == {group, "triton/KEY/k.cubin", "triton/KEY/k.json", "inductor/fxgraph/graph"}
    paths = json.loads((tmp_path / "there" / group).read_text())["child_paths"]
    assert paths["k.cubin"] == str(tmp_path / "there" / "triton" / "KEY" / "k.cubin")
    with pytest.raises(ValueError, match="damaged"):
        (tmp_path / "bad.tar.xz").write_text("no archive")
        there.fill([tmp_path / "bad.tar.xz"])


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
    campaign.run([step("one", code, limit=60)], 120.0, lambda what: None, grace=0.0)
    assert (tmp_path / "one.json").read_text() == "51s"  # 85 % of its limit
    campaign.run([step("two", code, limit=60)], 960.0, lambda what: None, grace=0.0)
    assert (tmp_path / "two.json").read_text() == "102s"  # twice the time that the plan is made for


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


def test_after_a_change_of_the_sources_what_was_done_is_done_again(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path)
    campaign.run([step("one", write("1"))], 60, lambda what: None)
    campaign.environment["source"] = "before"
    campaign.save()
    again = Campaign.open(tmp_path)
    assert states(again) == {"one": "older"}
    assert again.steps["one"].note.startswith("source was 'before' there, is ")
    again.run([step("one", write("1"))], 60, lambda what: None)
    assert states(again) == {"one": "done"}
    assert (tmp_path / "one.json").read_text() == "11"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "campaign", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon", "--rehearse"], "--budget must look like 90s, 9m or 1h, got 'soon'"),
        (["--budget", "-1m", "--rehearse"], "--budget must look like"),
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


def test_without_diffusers_sampling_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    steps = [item for item in plan() if "sample" in item.command]
    assert steps
    campaign = Campaign.open(tmp_path)
    campaign.run(steps, 600, lambda what: None)
    reason = "the package diffusers is not installed (pip install ditfast[diffusers])"
    assert {(done.state, done.note) for done in campaign.steps.values()} == {("skipped", reason)}


def model_row(provider: str, ms: float | None = 10.0, parity: bool | None = True) -> ModelRow:
    blank = ModelRow("DiT-XL/2", "adaln_zero", (32, 32), 256, 1152, 28, 256, "bf16", "forward", provider, "bf16", "ok")
    spread = None if ms is None else Spread(ms, ms, ms, 5, 1)
    return replace(blank, status="error" if ms is None else "ok", ms=spread, parity=parity, note="" if ms else "boom")


def lines_of(results: Results | None, state: str | None = "done", note: str = "") -> list[Figure]:
    done = {} if state is None else {"one": Done(state, 1.0, 0, note)}  # type: ignore[arg-type]
    return figures([step("one", "", title="what for")], done, {} if results is None else {"one": results})


def test_the_table_says_value_parity_and_rival() -> None:
    rows = [
        model_row("reference", 20.0),
        replace(model_row("ditfast"), images_per_s=25600.0, speedup=2.0, rival="reference", noise=0.01),
        model_row("ditfast-graph", None, None),
    ]
    [line] = lines_of(Results("models", {}, {}, rows=rows))
    assert line.what == "DiT-XL/2, forward, batch 256, 256 tokens, bf16"
    assert line.value == "ditfast: 10.0 ms, 25,600 images/s"
    assert (line.rival, line.parity) == ("2.00x over reference", False)  # one of ours failed
    assert line.note == "ditfast-graph: boom"
    [line] = lines_of(Results("models", {}, {}, rows=rows[1:2]))
    assert line.parity is True and has_parity([line])
    # alone: no rival, no speed-up
    [line] = lines_of(Results("models", {}, {}, rows=[model_row("ditfast")]), "cut")
    assert line.rival == "no rival yet"
    [line] = lines_of(Results("models", {}, {}, rows=[model_row("ditfast", parity=False)]))
    assert line.parity is False and not has_parity([line])


@pytest.mark.parametrize(
    ("state", "note", "value", "parity"),
    [
        (None, "", "not reached", None),
        ("skipped", "no such package", "skipped: no such package", None),
        ("failed", "exit code 2: why", "failed: exit code 2: why", False),
        ("cut", "its time was up", "cut before its first figure", None),
        ("done", "", "done", None),
    ],
)
def test_a_step_without_figures_says_why(state: str | None, note: str, value: str, parity: bool | None) -> None:
    assert lines_of(None, state, note) == [Figure("one", "what for", value, parity, "")]


def test_older_rows_are_marked_and_beside_no_newer_one() -> None:
    older = [Older(model_row("reference", 30.0), "source was 'a'"), Older(model_row("ditfast", 15.0), "source was 'a'")]
    found = lines_of(Results("models", {}, {}, rows=[model_row("ditfast")], older=older), "cut")
    assert [(line.value, line.rival, line.note) for line in found] == [
        ("ditfast: 10.0 ms", "no rival yet", ""),
        ("ditfast: 15.0 ms", "no rival yet", "older: source was 'a'"),
    ]


def test_parity_of_verify_names_what_is_missed() -> None:
    good = VerifyRow("gated_residual", "torch", "fp32", "output0", 1e-7, 1e-7, 2e-7, True)
    [line] = lines_of(Results("verify", {}, {}, rows=[good, replace(good, backend="kernel", ok=False)]))
    assert (line.value, line.parity, line.note) == ("1 of 2 hold", False, "gated_residual, kernel, fp32")


def test_the_whole_plan_is_rehearsed_interrupted_and_gone_on_with_from_its_archive(tmp_path: Path) -> None:
    """Every command line is valid and every file appears: what fails for a typo would fail on somebody's GPU."""
    out, archives = tmp_path / "out", tmp_path / "archives"

    def run(*arguments: object, until: str | None = None) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "ditfast", "bench", "campaign", "--rehearse", "--budget", "1h"]
        process = subprocess.Popen(
            [*command, *map(str, arguments)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        said = []
        for text in process.stderr:
            said.append(text)
            if until is not None and text.startswith(f"{until}: up to"):
                process.terminate()
        assert process.stdout is not None
        return process.wait(), process.stdout.read(), "".join(said)

    code, _, said = run("--out", out, "--archives", archives, until="warm-up-train")
    assert code == 130, said
    code, _, said = run("--out", out, "--archives", archives, until="adaln")
    assert code == 130, said
    there = tmp_path / "there"
    code, printed, said = run("--out", there, "--resume", archives / "results.tar.xz", "--archives", archives)
    assert code == 0, said + printed
    assert "forward-xl2: up to" not in said  # done before

    steps = plan(rehearsal=True)
    state = json.loads((there / "campaign.state").read_text())["steps"]
    packed = dict(read_archive(archives / "results.tar.xz"))
    for item in steps:
        assert item.name in printed and item.name in state
        assert state[item.name]["state"] == ("skipped" if item.skip else "done")
        if item.suite and not item.skip:
            assert Results.load(there / f"{item.name}.json").complete
            assert f"{item.name}.json" in packed and f"logs/{item.name}.txt" in packed
    # each is the command of the real plan, but for sizes and the device
    for tiny, real in zip(steps, plan(), strict=True):
        assert tiny.name == real.name
        assert {word for word in real.command if word.startswith("--")} <= {*tiny.command, "--device"}
    # nothing is left to do, and the line it ends with works
    code, printed, said = run("--out", there, "--archives", archives)
    assert code == 0 and "up to" not in said
    words = next(text for text in said.splitlines() if "bench report" in text).split("ditfast bench report ")
    pattern = Path(words[1].split()[0])
    assert len(sorted(pattern.parent.glob(pattern.name))) == sum(item.suite and not item.skip for item in steps)


def test_a_damaged_result_is_named_and_the_others_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Results("verify", {}, {}, complete=True).save(tmp_path / "good.json")
    (tmp_path / "bad.json").write_text("{")
    assert set(campaign_command.load(Campaign.open(tmp_path))) == {"good"}
    assert "left out: " in (said := capsys.readouterr().err) and "bad.json" in said
