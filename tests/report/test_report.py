"""``ditfast bench report``: grouping, tables, plots and files, on made-up rows."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ditfast.bench.records.files import Results
from ditfast.bench.report.command import report
from ditfast.bench.report.figure import Plot
from ditfast.bench.report.headline import headlines
from ditfast.bench.report.markdown import markdown
from ditfast.bench.report.page import page
from ditfast.bench.report.tables import model_tables
from ditfast.bench.report.write import render
from tests.report import conftest as made_up
from tests.report.conftest import CPU, model_row, report_of, results


def test_devices_never_share_a_group_and_a_row_is_there_once() -> None:
    gpu, cpu = results("models", [model_row()]), results("models", [model_row()], CPU)
    gathered = report_of(cpu, gpu, gpu, results("ops", []))
    labels = [(machine.label, [run.name for run in machine.runs]) for machine in gathered.machines]
    assert labels == [
        ("Test GPU", ["1.json", "3.json"]),
        ("Test GPU (measured again)", ["2.json"]),
        ("Test CPU, 2 threads", ["0.json"]),
    ]
    on_host = replace(gpu, settings={"device": "cpu"})
    assert [machine.label for machine in report_of(on_host).machines] == ["Test CPU, 2 threads"]


def test_an_unknown_environment() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")
    bare = replace(results("models", [model_row()]), environment={}, settings={}, ceilings=None, readings=[])
    files = render(report_of(bare))
    assert "unnamed CPU, an unknown number of threads" in files["report.html"].decode()


@pytest.mark.quick
def test_a_headline_needs_a_tick() -> None:
    slow, fast = model_row("ditfast", 8.0), model_row("ditfast-graph", 4.0, parity=False)
    rivals = [
        model_row("reference", 20.0),
        model_row("reference-compile", 10.0),
        model_row("diffusers", None),
    ]
    slow = replace(slow, speedup=1.25, rival="reference-compile", ceiling_share=0.876, ceiling="matmul")
    [headline] = headlines([*rivals, slow, fast])
    assert headline.best == slow
    assert headline.cells == [
        "12,800",
        "25,600 (compile)",
        "32,000",
        "32,000 (ditfast)",
        "1.25x",
        "88 % of matmul",
    ]
    # a speed-up in the file without its tick is not repeated
    [headline] = headlines([*rivals, replace(slow, parity=None)])
    assert headline.cells[2:] == ["32,000, no parity tick", "no parity tick", "-", "-"]
    [headline] = headlines([rivals[2], replace(slow, speedup=1.005, rival="diffusers")])
    assert headline.cells == ["not measured", "not measured", "32,000", "32,000 (ditfast)",
                           "1.00x, a tie over diffusers", "88 % of matmul"]  # fmt: skip


@pytest.mark.quick
def test_bad_news_is_on_the_page() -> None:
    rows = [
        model_row("reference", 8.0),
        model_row("ditfast", 10.0, speedup=0.8, rival="reference"),
        model_row("reference", 8.0, "DiT-S/2"),
        model_row("ditfast", 10.0, "DiT-S/2", parity=False, note="made up"),
        model_row("diffusers", None),
        model_row("x", None, status="error", note="Boom"),
        model_row("y", None, status="unavailable", note="no such thing"),
    ]
    left_out = {"device": "cuda", "providers_left_out": {"y": "in the table", "z": "needs <more>"}}
    text = page(report_of(results("models", rows, complete=False, parts=3, settings=left_out)), [])
    # what is unavailable is none; a folded table says so too
    assert '(7 rows) <span class="bad">bad news in 4 rows</span></summary>' in text
    for cell in ("0.80x over reference", "✗ no", "out of memory", "failed"):
        assert re.search(f'<td class="bad( number)?">{cell}</td>', text), cell
    for note in ("made up", "Boom", "no such thing"):
        assert f'<td class="quiet">{note}</td>' in text
    assert '<p class="bad">0.json is not complete' in text and "measured in 3 parts" in text
    assert '<p class="note">Not measured: z: needs &lt;more&gt;.</p>' in text and "in the table" not in text
    text = page(report_of(results("models", rows[:1]), results("verify", made_up.verify_rows(ok=False))), [])
    assert '(2 rows) <span class="bad">bad news in 1 row</span>' in text
    assert "(1 row)</summary>" in text and "Not measured" not in text


@pytest.mark.quick
def test_every_row_is_in_the_tables_with_its_reason() -> None:
    results_ = made_up.twelve_models()
    [machine] = report_of(results_).machines
    [table] = model_tables(machine)
    assert len(table.rows) == len(results_.rows) == 108
    words = {cell.text for row in table.rows for cell in row}
    assert {"out of memory", "failed", "unavailable", "RuntimeError: made up", "✗ no", "not judged"} <= words
    unticked = replace(results_.rows[-1], parity=None, speedup=9.99, rival="reference")
    [table] = model_tables(report_of(results("models", [unticked])).machines[0])
    assert not any("9.99" in cell.text for cell in table.rows[0])


def test_the_page_holds_everything_and_asks_for_nothing() -> None:
    gathered = report_of(*made_up.everything())
    groups = ("models", "ops", "scaling", "memory")
    alt = "a text that says what is to be seen"
    plots = [
        Plot(f"name-{group}", "Title", group, "Test GPU", alt, "Caption", b"x", 7.0) for group in groups
    ]
    text = page(gathered, plots)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert len(
        re.findall(r'<img src="data:image/png;base64,[^"]+" alt="[^"]{20,}" width="\d+">', text)
    ) == len(plots)
    for section in ("machine-1", "machine-2", "computed", "definitions"):
        assert f'<section id="{section}">' in text
    # notes are other people's words
    evil = results("models", [model_row(note="<script>alert(1)</script>")])
    assert "<script" not in page(report_of(evil), [])


def test_markdown_cells_cannot_break_the_table() -> None:
    text = markdown(report_of(results("models", [model_row(model="a|b\nc")])))
    [row] = [line for line in text.splitlines() if "25,600" in line]
    assert row.count(" | ") == 10 and "a\\|b c" in row


def save(folder: Path, *contents: Results) -> list[Path]:
    paths = [folder / f"{index}.json" for index in range(len(contents))]
    for path, item in zip(paths, contents, strict=True):
        item.save(path)
    return paths


@pytest.mark.quick
def test_the_command_writes_all_files_and_marks_regressions(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")
    before, after = model_row(ms=10.0), model_row(ms=20.0)
    [new] = save(tmp_path, results("models", [after]))
    old = tmp_path / "old.json"
    results("models", [before]).save(old)
    app = typer.Typer()
    app.command()(report)
    out = tmp_path / "a" / "b"
    ran = CliRunner().invoke(app, [str(new), "--out", str(out), "--compare", str(old)])
    assert ran.exit_code == 0, ran.output
    assert ran.output.splitlines() == [
        "regressions past the noise: 1 (the exit code stays 0)",
        f"report: {out / 'report.html'}",
    ]
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    plot = "plots/throughput-1-forward-bf16-256-px-batch-256-test-gpu.png"
    assert files == ["plots/.ditfast-plots", plot, "report.html", "table.md"]
    assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert "**✗ regression**" in (out / "table.md").read_text()
    assert '<td class="bad">✗ regression</td>' in (out / "report.html").read_text()


def test_bad_input_is_refused_before_anything_is_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = save(tmp_path, results("models", [model_row()]))
    damaged, other = tmp_path / "damaged.json", tmp_path / "other.json"
    damaged.write_text("{")
    other.write_text('{"schema": "x"}')
    out = tmp_path / "out"
    for bad, message in ((damaged, "not valid JSON"), (other, "must have one of the schemas")):
        with pytest.raises(ValueError, match=message):
            report([path, bad], out)
        with pytest.raises(ValueError, match=message):
            report([path], out, [bad])
    with pytest.raises(FileNotFoundError):
        report([tmp_path / "absent.json"], out)
    results("ops", []).save(other)
    with pytest.raises(ValueError, match="none of the results is of the suite ops on Test GPU"):
        report([path], out, [other])
    assert not out.exists()

    monkeypatch.setattr("ditfast.bench.report.write.render", lambda *_: pytest.fail("rendered"))
    out.write_text("a file")
    with pytest.raises(ValueError, match="--out must be a folder, got .*out: .* is a file"):
        report([path], out)
    with pytest.raises(NotADirectoryError):
        report([path], out / "below")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'ditfast\[bench\]'"):
        report([path], tmp_path / "new")


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")
    [path] = save(tmp_path, results("models", [model_row()]))
    out = tmp_path / "out"
    report([path], out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        report([path], out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
