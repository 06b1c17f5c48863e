"""``ditfast bench readme``: the tables of docs/benchmark.md and the README are what the result files say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from ditfast.bench.records.files import Results
from ditfast.bench.report.command import readme
from ditfast.bench.report.readme import BEGIN, END, first_difference, render
from tests.report.conftest import CPU, GPU, model_row, results, traced_memory

ROOT = Path(__file__).resolve().parents[2]
BLANK = f"# Title\n\n{BEGIN}\nold\n{END}\n\nRest\n"


def test_the_table_by_hand() -> None:
    rows = [
        model_row("reference", 20.0),
        model_row("reference-compile", 10.0),
        model_row("ditfast", 8.0, speedup=1.25, rival="reference-compile"),
        model_row(
            "ditfast-graph", 5.0, speedup=2.0, rival="reference-compile", ceiling_share=0.8, ceiling="matmul"
        ),
        model_row("reference", None, batch=512, mode="train"),
        model_row("ditfast", 512.0, batch=512, mode="train", parity=False),
    ]
    lines = render(BLANK, {"results/a.json": results("models", rows)}).splitlines()
    assert lines[:3] == ["# Title", "", BEGIN] and lines[-3:] == [END, "", "Rest"]
    assert lines[4:8] == [
        "| images/s | reference, eager | best torch.compile | ditfast | best of ditfast | best over best | of limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| Test GPU: DiT-XL/2, 256 px, bf16, batch 256 | 12,800 | 25,600 (compile) | 32,000 | 51,200 (ditfast-graph) "
        "| 2.00x | 80 % of matmul |",
        "| Test GPU: DiT-XL/2, 256 px, bf16, batch 512, training step | out of memory | not measured "
        "| 1,000, no parity tick | no parity tick | - | - |",
    ]
    assert lines[-5] == (
        "- Test GPU, driver 111.22, CUDA 99.9, torch 9.9.9, triton 8.8.8, ditfast 0.0.test (012345678); limits "
        "measured in the same runs: copy 4,000 GB/s; matmul bf16 800 TFLOP/s; matmul tf32 400 TFLOP/s; "
        "noise up to 1.0 %; no parity tick: DiT-XL/2 batch 512, ditfast. Rows: [results/a.json](results/a.json)."
    )


def test_without_a_gpu_the_first_row_says_so() -> None:
    ours = model_row("ditfast", 10.0, "DiT-S/8", 8, speedup=1.004, rival="reference-compile")
    text = render(BLANK, {"c.json": results("models", [ours], CPU, complete=False)})
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows[0].startswith("| GPU: DiT-XL/2, 256 px, bf16 | not measured yet | not measured yet |")
    assert rows[1].startswith(
        "| Test CPU, 2 threads: DiT-S/8, 256 px, bf16, batch 8 | not measured | not measured |"
    )
    assert "| 1.00x, a tie over reference-compile |" in rows[1]
    assert "c.json is not complete" in text
    # a GPU's operators alone are no models of a GPU
    text = render(BLANK, {"c.json": results("models", [ours], CPU), "o.json": results("ops", [])})
    assert "not measured yet" in text and "Rows: [o.json](o.json)." in text


def table_and_lines(files: dict[str, Results]) -> tuple[list[str], list[str]]:
    lines = render(BLANK, files).splitlines()
    return [line for line in lines if line.startswith("| ")][2:], [
        line for line in lines if line.startswith("- ")
    ]


def test_of_a_case_measured_again_the_run_with_most_rivals_counts() -> None:
    """The run with more rivals counts; of two with as many, the first."""
    # as many rows, and fewer rivals
    few = [model_row("reference", 20.0), model_row("ditfast", 8.0), model_row("ditfast-graph", 8.5)]
    many = [model_row("reference", 20.0), model_row("reference-compile", 10.0), model_row("ditfast", 9.0)]
    files = {"few.json": results("models", few), "many.json": results("models", many)}
    rows, lines = table_and_lines(files)
    assert [row.split(" | ")[:4] for row in rows] == [
        [
            "| Test GPU (measured again): DiT-XL/2, 256 px, bf16, batch 256",
            "12,800",
            "25,600 (compile)",
            "28,444",
        ]
    ]
    assert (
        lines[0].endswith("ditfast 0.0.test (012345678). Rows: [few.json](few.json).")
        and "noise" not in lines[0]
    )
    assert "noise up to 1.0 %; every row of ditfast with its parity tick. Rows: [many.json]" in lines[1]
    rows, _ = table_and_lines({"a.json": results("models", few), "b.json": results("models", few)})
    assert [row.partition(":")[0] for row in rows] == ["| Test GPU"]
    # other versions are another case
    other = results("models", few, {**GPU, "commit": "f"})
    assert len(table_and_lines({"a.json": results("models", many), "b.json": other})[0]) == 2


def test_ticks_are_claimed_only_where_rows_of_ours_ran() -> None:
    rival, ours = model_row("reference"), model_row("ditfast")
    for rows, message in (
        ([rival], "no row of ditfast ran"),
        ([rival, replace(ours, ms=None, status="oom", parity=None)], "no row of ditfast ran"),
        ([rival, ours], "every row of ditfast with its parity tick"),
        ([rival, replace(ours, parity=None)], "no parity tick: DiT-XL/2 batch 256, ditfast"),
    ):
        _, [line] = table_and_lines({"a.json": results("models", rows)})
        assert f"; {message}. Rows:" in line


def test_traced_results_are_linked_apart() -> None:
    rows, lines = table_and_lines(
        {"m.json": traced_memory(), "c.json": results("models", [model_row()], CPU)}
    )
    assert rows[0].startswith("| GPU: DiT-XL/2, 256 px, bf16 | not measured yet |")
    assert lines[0].startswith("- Test CPU, 2 threads, torch 9.9.9") and lines[0].endswith(
        "[c.json](c.json)."
    )
    assert lines[1:] == [
        "- Computed without a device, torch 9.9.9, triton 8.8.8, ditfast 0.0.test (012345678): [m.json](m.json)."
    ]


def test_a_name_that_holds_a_marker_or_markdown_does_no_harm() -> None:
    name = f"{END} | *GPU* <b>"
    files = {"a b|(1).json": results("models", [model_row()], {**GPU, "gpu": {"name": name}})}
    once = render(BLANK, files)
    assert render(once, files) == once and once.count(END) == 1
    assert "| &lt;!-- results: end --&gt; \\| \\*GPU\\* &lt;b&gt;: DiT-XL/2" in once
    assert "[a b\\|(1).json](a%20b%7C%281%29.json)" in once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "README must hold '<!-- results: begin -->' once, got 0"),
        (BLANK + BEGIN, "'<!-- results: begin -->' once, got 2"),
        (BLANK + END, "'<!-- results: end -->' once, got 2"),
        (f"{END}\n{BEGIN}\n", "the other way round"),
    ],
)
def test_markers_must_be_there_once_and_in_order(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(text, {"a.json": results("models", [model_row()])})


def test_rendering_twice_changes_nothing() -> None:
    files = {"a.json": results("models", [model_row()])}
    once = render(BLANK, files)
    assert render(once, files) == once != BLANK


def test_the_first_difference() -> None:
    assert first_difference("a\nb\n", "a\nb\n") is None
    assert first_difference("a\nb\n", "a\nc\n") == "line 2: 'b' should be 'c'"
    assert first_difference("a\n", "a\nb\n") == "line 2: nothing should be 'b'"
    assert first_difference("a\nb\n", "a\n") == "line 2: 'b' should be nothing"


def test_the_command_rewrites_checks_and_leaves_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    data, page = tmp_path / "results" / "a.json", tmp_path / "README.md"
    results("models", [model_row()]).save(data)
    page.write_bytes(BLANK.replace("Rest", "Rest\r").encode())
    with pytest.raises(typer.Exit) as caught:
        readme(page, [data], check=True)
    assert caught.value.exit_code == 1
    assert "README.md and the results disagree, line 4: 'old' should be ''" in capsys.readouterr().err
    assert b"\nold\n" in page.read_bytes()
    readme(page, [data], check=False)
    readme(page, [data], check=True)
    assert b"[results/a.json](results/a.json)" in page.read_bytes() and page.read_bytes().endswith(
        b"Rest\r\n"
    )
    results("models", [replace(model_row(), images_per_s=1.0)]).save(data)
    with pytest.raises(typer.Exit):
        readme(page, [data], check=True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["README.md", "results"]


def test_the_page_agrees_with_the_results() -> None:
    paths = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert paths
    text = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    rendered = render(text, {f"../{path.relative_to(ROOT).as_posix()}": Results.load(path) for path in paths})
    assert first_difference(text, rendered) is None, "make readme renders it anew"


def test_results_of_a_gpu_stand_on_the_readmes_first_screen() -> None:
    """They stand above the first command; until there are any, the computed table does, and says so."""
    first = (ROOT / "README.md").read_text(encoding="utf-8").partition("```")[0]
    files = {path.name: Results.load(path) for path in sorted((ROOT / "bench" / "results").glob("*.json"))}
    measured = [name for name, file in files.items() if file.suite == "models" and file.environment.get("gpu")]
    assert all(f"bench/results/{name}" in first for name in measured)
    assert measured or "computed, not measured" in first


def test_the_traced_counts_are_those_of_the_committed_files() -> None:
    """The files name their torch: another version's meta functions may launch a copy more or less."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    cost, memory = (Results.load(ROOT / f"bench/results/traced-{suite}.json") for suite in ("cost", "memory"))
    for file in (cost, memory):
        assert file.complete and not file.environment["dirty"]
        packages = file.environment["packages"]
        versions = f"with torch {packages['torch'].partition('+')[0]} and triton {packages['triton']}"
        assert f"Counted on meta tensors at batch 256 {versions}" in text

    def share(field: str, rows: Iterable[Any], mode: str) -> tuple[str, Any, Any]:
        """(ours as a share of the reference's, our row, the reference's)."""
        case = ("DiT-XL/2", 256, "bf16", mode)
        by_provider = {row.provider: row for row in rows if (row.model, row.batch, row.dtype, row.mode) == case}
        ours, reference = by_provider["ditfast"], by_provider["reference"]
        return f"{100 * getattr(ours, field) / getattr(reference, field):.0f} %", ours, reference

    total_bytes, ours, reference = share("bytes", cost.rows, "forward")
    launches = f"{ours.launches}, reference {reference.launches}"
    assert f"| an XL/2 forward | {launches} | {total_bytes} of the reference's | |\n" in text
    total_bytes, ours, reference = share("bytes", cost.rows, "train")
    launches = f"{ours.launches:,}, reference {reference.launches:,}"
    saved_bytes, _, _ = share("saved_bytes", memory.rows, "train")
    assert f"| its loss and backward | {launches} | {total_bytes} | {saved_bytes} |\n" in text
