"""What a campaign does and leaves: its plan, its archives and its table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from ditfast.bench.campaign import command as campaign_command
from ditfast.bench.campaign.archives import Caches, pack_results, unpack_results
from ditfast.bench.campaign.plan import plan
from ditfast.bench.campaign.run import Campaign, Done, Step
from ditfast.bench.campaign.table import Figure, figures, has_parity
from ditfast.bench.cases.case import parse_mode
from ditfast.bench.cases.providers import get_provider
from ditfast.bench.records.files import Older, Results
from ditfast.bench.records.rows import VerifyRow
from ditfast.bench.suites import ops
from ditfast.bench.warm import kernel_cache
from ditfast.bench.warm.archives import read_archive, write_archive
from ditfast.bench.warm.kernel_cache import MANIFEST, SCHEMA
from ditfast.cli.command import app
from ditfast.config import MODELS
from ditfast.testing.operators import OPERATORS
from tests.campaign.conftest import model_row, states, step, write

CUDA = torch.device("cuda", 0)


INTERRUPTS = """
import os, signal, time
if not os.path.exists(r'{json}'):
    open(r'{json}', 'w').write('begun ')
    time.sleep(1)  # while its parent forks, an interruption may be lost
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.parametrize("at", [0, pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)])
def test_an_interruption_loses_no_finished_step_and_the_archive_resumes_elsewhere(at: int, tmp_path: Path) -> None:
    """The archive of that moment is enough."""
    steps = [step(f"s{index}", write(f"done {index}"), beside=index < 2) for index in range(4)]
    cut = list(steps)
    cut[at] = replace(steps[at], command=("-c", INTERRUPTS))
    campaign, archives = Campaign.open(tmp_path / "here"), tmp_path / "archives"
    archives.mkdir()
    with pytest.raises(KeyboardInterrupt):
        campaign.run(cut, 120, lambda message: None, lambda: pack_results(campaign, archives))
    assert states(campaign)[f"s{at}"] == "cut"
    [archive] = archives.iterdir()
    unpack_results(archive, tmp_path / "there")
    resumed = Campaign.open(tmp_path / "there")
    before = states(resumed)
    assert before == states(campaign)
    assert all(before[f"s{index}"] == "done" for index in range(at if at >= 2 else 0))
    resumed.run(steps, 120, lambda message: None)
    assert set(states(resumed).values()) == {"done"}
    for index in range(4):
        text = (tmp_path / "there" / f"s{index}.json").read_text()
        if index == at:
            assert text == f"begun done {index}"
        elif before.get(f"s{index}") != "cut":  # one beside it, in whatever it was
            assert text == f"done {index}"


def test_archives_hold_the_ends_of_long_logs_and_the_state(tmp_path: Path) -> None:
    campaign = Campaign.open(tmp_path / "out")
    campaign.run([step("loud", "print('first'); print('x' * 2_000_000); print('last')")], 60, lambda message: None)
    (tmp_path / "out" / "tune.json.table").write_text("{}")
    [archive] = pack_results(campaign, tmp_path)
    packed = dict(read_archive(archive))
    assert set(packed) == {"campaign.state", "logs/loud.txt", "tune.json.table"}
    assert len(packed["logs/loud.txt"]) == 500_000 and packed["logs/loud.txt"].endswith(b"last\n")
    assert json.loads(packed["campaign.state"])["environment"]["packages"]["torch"] == torch.__version__
    assert archive.stat().st_size < 15_000_000


def test_resuming_needs_a_campaigns_archive_and_a_new_folder(tmp_path: Path) -> None:
    write_archive([("a.txt", Path(__file__))], tmp_path / "other.tar.xz")
    with pytest.raises(ValueError, match="must be given the results.tar.xz of a campaign, got .*other.tar.xz"):
        unpack_results(tmp_path / "other.tar.xz", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    campaign = Campaign.open(tmp_path / "out")
    [archive] = pack_results(campaign, tmp_path)
    with pytest.raises(ValueError, match="out holds a campaign already"):
        unpack_results(archive, tmp_path / "out")


def test_a_partly_unpacked_archive_is_no_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = Campaign.open(tmp_path / "out")
    campaign.run([step(name, write(name)) for name in "xyz"], 60, lambda message: None)
    [archive] = pack_results(campaign, tmp_path)
    rename, renamed = Path.rename, []

    def full(path: Path, target: Path) -> Path:
        if len(renamed) == 2:
            raise OSError(28, "No space left on device", str(target))
        renamed.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            unpack_results(archive, tmp_path / "there")
    assert not (tmp_path / "there" / "campaign.state").exists()
    unpack_results(archive, tmp_path / "there")
    assert states(Campaign.open(tmp_path / "there")) == states(campaign)
    packed, unpacked = ({path.name for path in (tmp_path / name).iterdir()} for name in ("out", "there"))
    assert packed == unpacked


@pytest.mark.quick
def test_caches_are_packed_when_they_have_changed_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    other_caches = Caches(tmp_path / "there", tmp_path)
    messages = other_caches.fill([tmp_path / "triton-cache.tar.xz", tmp_path / "inductor-cache.tar.xz"])
    assert len(messages) == 2
    restored = {str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*") if path.is_file()}
    group = "triton/KEY/__grp__k.json"
    assert restored == {group, "triton/KEY/k.cubin", "triton/KEY/k.json", "inductor/fxgraph/graph"}
    paths = json.loads((tmp_path / "there" / group).read_text())["child_paths"]
    assert paths["k.cubin"] == str(tmp_path / "there" / "triton" / "KEY" / "k.cubin")
    # what was compiled ahead says whether it fits
    names = ("triton", "build", "python", "platform", "ptxas", "variables", "sources")
    manifest = {"schema": SCHEMA, "identity": dict.fromkeys(names, "0.1"), "architectures": {}}
    (kernels / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setattr(kernel_cache, "_identity", lambda: dict.fromkeys(names, "9.9"))
    [archive] = caches.pack()
    assert other_caches.fill([archive])[1].endswith("made with triton 0.1, and here is 9.9")
    with pytest.raises(ValueError, match="damaged"):
        (tmp_path / "bad.tar.xz").write_text("no archive")
        other_caches.fill([tmp_path / "bad.tar.xz"])


def test_without_diffusers_sampling_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    steps = [item for item in plan() if "sample" in item.command]
    assert steps
    campaign = Campaign.open(tmp_path)
    campaign.run(steps, 600, lambda message: None)
    reason = "the package diffusers is not installed (pip install ditfast[diffusers])"
    assert {(done.state, done.note) for done in campaign.steps.values()} == {("skipped", reason)}


def lines_of(results: Results | None, state: str | None = "done", note: str = "") -> list[Figure]:
    done = {} if state is None else {"one": Done(state, 1.0, 0, note)}  # type: ignore[arg-type]
    return figures([step("one", "", title="what for")], done, {} if results is None else {"one": results})


@pytest.mark.quick
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
    line, rest = lines_of(Results("models", {}, {}, rows=[model_row("ditfast")]), "cut", "its time was up")
    assert line.rival == "no rival"
    assert rest == Figure("one", "what for", "cut, its time was up: the rest not reached", None, "")
    [line] = lines_of(Results("models", {}, {}, rows=[model_row("ditfast", parity=False)]))
    assert line.parity is False and not has_parity([line])


@pytest.mark.parametrize(
    ("state", "note", "value", "parity"),
    [
        (None, "", "not reached", None),
        ("skipped", "no such package", "skipped: no such package", None),
        ("failed", "exit code 2: why", "failed: exit code 2: why", None),
        ("cut", "its time was up", "cut, its time was up: a first figure not reached", None),
        ("older", "source was 'a'", "not reached", None),
        ("done", "", "done", None),
    ],
)
def test_a_step_without_figures_says_why(state: str | None, note: str, value: str, parity: bool | None) -> None:
    assert lines_of(None, state, note) == [Figure("one", "what for", value, parity, "")]


def test_older_rows_are_marked_and_beside_no_newer_one() -> None:
    older = [Older(model_row("reference", 30.0), "source was 'a'"), Older(model_row("ditfast", 15.0), "source was 'a'")]
    lines = lines_of(Results("models", {}, {}, rows=[model_row("ditfast")], older=older), "cut")
    assert [(line.value, line.rival, line.note) for line in lines[:2]] == [
        ("ditfast: 10.0 ms", "no rival", ""),
        ("ditfast: 15.0 ms", "no rival", "older: source was 'a'"),
    ]
    wrong = Older(model_row("ditfast", 15.0, parity=False), "source was 'a'")
    assert has_parity(lines_of(Results("models", {}, {}, rows=[model_row("ditfast")], older=[wrong])))
    # ours was measured again, the rival not yet
    assert len(lines_of(Results("models", {}, {}, rows=[model_row("ditfast")], older=older[:1]))) == 1


def test_results_of_a_step_that_was_not_reached_again_are_older(tmp_path: Path) -> None:
    """The result file itself says so, whatever became of the step."""
    campaign = Campaign.open(tmp_path)
    rows = [model_row("reference", 20.0), replace(model_row("ditfast"), speedup=2.0, rival="reference")]
    environment = campaign.environment | {"source": "before"}
    Results("models", environment, {}, rows=rows, complete=True).save(tmp_path / "one.json")
    lines = figures([step("one", "")], {"one": Done("older", 1.0, 0)}, campaign_command.load(campaign))
    [line] = [line for line in lines if line.older]
    assert line.value == "ditfast: 10.0 ms" and line.note.startswith("older: source was 'before' there, is ")
    assert all(line.older or line.value == "not reached" for line in lines)


def test_parity_of_verify_names_the_missed_checks() -> None:
    right = VerifyRow("gated_residual", "torch", "fp32", "output0", 1e-7, 1e-7, 2e-7, True)
    [line] = lines_of(Results("verify", {}, {}, rows=[right, replace(right, backend="kernel", ok=False)]))
    assert (line.value, line.parity, line.note) == ("1 of 2 hold", False, "gated_residual, kernel, fp32")


def parsed(step: Step) -> dict[str, Any]:
    """The options of a step's command of ditfast by their names; fails where one is unknown or has a wrong type."""
    words = [word.replace("{seconds}", "60s") for word in step.command[2:]]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return dict(command.make_context(step.name, words).params)


@pytest.mark.quick
@pytest.mark.parametrize("rehearsal", [False, True])
def test_every_command_line_of_the_plan_is_valid(rehearsal: bool) -> None:
    """A typo would fail on somebody's GPU; the long test below runs every command."""
    for item in plan(rehearsal=rehearsal):
        if item.name == "gpu-tests":
            continue
        options = parsed(item)
        assert set(options.get("model") or ()) <= set(MODELS)
        assert set(options.get("operator") or ()) <= set(OPERATORS)
        for mode in options.get("mode") or ():
            parse_mode(mode)
        if (names := options.get("providers")) is None:
            continue
        for name in names.split(","):
            if "ops" in item.command:
                assert any(name in ops.providers(operator, "forward", CUDA) for operator in OPERATORS), (item, name)
            else:
                get_provider(name)


@pytest.mark.quick
def test_a_rehearsal_has_the_real_plans_steps_and_options() -> None:
    """Each is the command of the real plan, but for sizes and the device."""
    for tiny, real in zip(plan(rehearsal=True), plan(), strict=True):
        assert tiny.name == real.name
        assert {word for word in real.command if word.startswith("--")} <= {*tiny.command, "--device"}


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("names", "interrupted"),
    [
        (("adaln", "tune"), ("adaln",)),
        pytest.param(None, ("verify", "forward-xl2", "adaln"), marks=pytest.mark.long, id="all"),
    ],
)
def test_the_plan_is_rehearsed_interrupted_and_resumed_from_its_archive(
    names: tuple[str, ...] | None, interrupted: tuple[str, ...], tmp_path: Path
) -> None:
    """Every command line is valid and every file appears."""
    out, archives = tmp_path / "out", tmp_path / "archives"
    steps = [item for item in plan(rehearsal=True) if names is None or item.name in names]
    script = (
        "from ditfast.bench.campaign import plan as module\n"
        "from ditfast.cli.command import main\n"
        "plan = module.plan\n"
        f"module.plan = lambda *options: [step for step in plan(*options) if step.name in {[s.name for s in steps]}]\n"
        "main()"
    )

    def run(*arguments: object, until: str | None = None) -> tuple[int, str, str]:
        """With ``until``, interrupts the run once that step has saved a row."""
        command = [sys.executable, "-c", script, "bench", "campaign", "--rehearse", "--budget", "1h"]
        process = subprocess.Popen(
            [*command, *map(str, arguments)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None and process.stdout is not None
        lines = []
        for text in process.stderr:
            lines.append(text)
            if until is not None and text.startswith(f"{until}: up to"):
                while not (out / f"{until}.json").exists() and process.poll() is None:
                    time.sleep(0.05)
                process.terminate()
        return process.wait(), process.stdout.read(), "".join(lines)

    for name in interrupted:
        code, _, errors = run("--out", out, "--archives", archives, until=name)
        assert code == 130, errors
    resumed = tmp_path / "there"
    code, printed, errors = run("--out", resumed, "--resume", archives / "results.tar.xz", "--archives", archives)
    assert code == 0, errors + printed
    assert "forward-xl2: up to" not in errors  # done before

    state = json.loads((resumed / "campaign.state").read_text())["steps"]
    packed = dict(read_archive(archives / "results.tar.xz"))
    for item in steps:
        assert item.name in printed and item.name in state
        assert state[item.name]["state"] == ("skipped" if item.skip else "done")
        if item.suite and not item.skip:
            assert Results.load(resumed / f"{item.name}.json").complete
            assert f"{item.name}.json" in packed and f"logs/{item.name}.txt" in packed
    # nothing is left to do, and the line it ends with works
    code, printed, errors = run("--out", resumed, "--archives", archives)
    assert code == 0 and "up to" not in errors
    words = next(text for text in errors.splitlines() if "bench report" in text).split("ditfast bench report ")
    pattern = Path(words[1].split()[0])
    assert len(sorted(pattern.parent.glob(pattern.name))) == sum(item.suite and not item.skip for item in steps)


def test_a_damaged_result_is_named_and_the_others_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Results("verify", {}, {}, complete=True).save(tmp_path / "good.json")
    (tmp_path / "bad.json").write_text("{")
    assert set(campaign_command.load(Campaign.open(tmp_path))) == {"good"}
    assert "left out: " in (errors := capsys.readouterr().err) and "bad.json" in errors
