"""The report's tables: a full row of each by hand, on the page and in ``table.md``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ditfast.bench.records.rows import CostRow, MemoryRow, OpRow, SampleRow, ScalingRow, Spread, VerifyRow
from ditfast.bench.report.markdown import escape, link, markdown
from ditfast.bench.report.page import page
from ditfast.bench.report.tables import (
    Table,
    cost_tables,
    memory_tables,
    model_tables,
    op_tables,
    sample_tables,
    scaling_tables,
    verify_tables,
)
from tests.report import conftest as made_up
from tests.report.conftest import model_row, report_of, results, spread

FULL = replace(
    model_row("ditfast", 8.0),
    ms=Spread(8.0, 7.5, 8.8, 20, 1),
    tflops=512.0,
    ceiling_share=0.876,
    ceiling="matmul",
    peak_bytes=3 * 2**30,
    first_call_ms=1234.0,
    error=1.5e-3,
    speedup=1.25,
    rival="reference-compile",
    noise=0.012,
    note="a note",
)
FULL_CELLS = [
    *("32,000", "8.00", "7.50 to 8.80", "512", "88 % matmul", "3.00 GiB", "1,234", "1.5e-03", "2.0e-03"),
    *("✓", "1.25x over reference-compile", "1.2 %", "a note"),
]
OP = OpRow(
    *("gated_residual", "backward", 8, 256, 1152, "bf16", "ditfast", "ok", "graph", 10**9, 10**9, "GB/s"),
    note="a note",
    ms=Spread(0.2, 0.19, 0.23, 20, 1),
    rate=3600.0,
    share=0.9,
    parity=True,
    noise=0.01,
    speedup=1.004,
    rival="compile",
)
COST = CostRow(
    *("DiT-XL/2", "adaln_zero", (32, 32), 256, "bf16", "train", "ditfast"),
    launches=1207,
    bytes=12_300_000_000,
    flops=4_560_000_000_000,
    intensity=370.7,
    roofline_ms={"H200": 2.5, "A100-40": 7.25},
)


def cells(table: Table, row: int = 0) -> list[str]:
    assert all(len(line) == len(table.columns) for line in table.rows)
    return [cell.text for cell in table.rows[row]]


def machine_of(suite: Any, rows: list[Any], **changes: Any) -> Any:
    report = report_of(results(suite, rows, **changes))
    return [*report.machines, *report.computed][0]


def test_a_row_of_models_and_a_point() -> None:
    [table] = model_tables(machine_of("models", [FULL]))
    assert table.title == "Models, forward, bf16, on Test GPU"
    assert cells(table) == ["DiT-XL/2", "256", "ditfast", *FULL_CELLS]
    [table] = scaling_tables(machine_of("scaling", [ScalingRow("batch", 1024, FULL)]))
    assert cells(table) == ["batch", "1,024", "DiT-XL/2", "256", "forward, bf16", "ditfast", *FULL_CELLS]


def test_rows_of_sampling() -> None:
    case = ("DiT-XL/2", "adaln_zero", (64, 64), 8, "bf16", "ddpm", 250, 1.5)
    row = SampleRow(
        *(*case, "ditfast", "ok", "a note", Spread(4000.0, 3900.0, 4200.0, 5, 1), 2.0, 1e-3, 2e-3, True, 2, 0.01),
        speedup=1.5,
        rival="diffusers",
    )
    lost = SampleRow(*case, "diffusers", "oom", "no room")
    machine = machine_of("sample", [row, lost])
    [table] = sample_tables(machine)
    assert len(table.columns) == len(table.rows[0]) == len(table.rows[1])
    assert [cell.text for cell in table.rows[0]] == [
        *("DiT-XL/2 512 px", "8", "bf16", "ddpm", "250", "1.5", "ditfast"),
        *("2.00", "4,000", "3,900 to 4,200", "1.0e-03", "2.0e-03", "✓", "1.50x over diffusers", "a note"),
    ]
    assert [cell.text for cell in table.rows[1]][7:] == ["out of memory", "-", "-", "-", "-", "-", "", "no room"]
    report = report_of(results("sample", [row, lost]))
    assert "| ditfast | 2.00 | 4,000 |" in markdown(report) and "1.50x over diffusers" in page(report, [])


def test_rows_of_operators_and_memory() -> None:
    [table] = op_tables(machine_of("ops", [OP]))
    shape = ["gated_residual", "backward", "8", "256", "1152", "ditfast"]
    assert cells(table) == [*shape, "0.200", "0.190 to 0.230", "3,600 GB/s", "90 %", "✓",
                            "1.00x, a tie over compile", "graph", "a note"]  # fmt: skip
    case = ("DiT-S/2", "adaln_zero", (64, 64), 32, "bf16", "train")
    row = MemoryRow(*case, "ditfast", "ok", "a note", 3 * 2**30, 3 * 2**29, 4096)
    [table] = memory_tables(machine_of("memory", [row, MemoryRow(*case, "ditfast-x", "ok", "parity failed")]))
    names = ["DiT-S/2 512 px", "32", "training step, bf16", "ditfast"]
    assert cells(table) == [*names, "3.00 GiB", "1.50 GiB", "4,096", "a note"]
    assert cells(table, 1) == [*names[:3], "ditfast-x", "no bytes", "-", "-", "parity failed"]
    assert table.rows[1][4].tone == "bad"


def test_rows_of_costs_and_numerics() -> None:
    [counted] = cost_tables(machine_of("cost", [COST]))
    case = ["DiT-XL/2", "256", "loss and backward, without optimiser, bf16"]
    assert cells(counted) == [*case, "ditfast", "1,207", "12.3", "4.56", "371", "2.50", "7.25"]
    assert [name for name, _ in counted.columns][-2:] == ["H200, ms at least", "A100-40, ms at least"]
    assert "everyone eager" in counted.notes[0] and "no cache kept anything" in counted.notes[0]
    # it lacks the columns that these words of the terminal's table are about
    assert "/s" not in counted.notes[0]
    row = VerifyRow("gelu_mlp", "triton", "fp16", "d_x", 1.5e-3, 2.5e-4, 3.5e-2, False)
    [table] = verify_tables(machine_of("verify", [row]))
    assert cells(table) == ["gelu_mlp", "triton", "fp16", "d_x", "1.5e-03", "2.5e-04", "3.5e-02", "✗ failed"]
    row = VerifyRow("gelu_mlp", "triton", "fp16", "", None, None, None, False, "ValueError: no")
    [table] = verify_tables(machine_of("verify", [row]))
    assert cells(table) == ["gelu_mlp", "triton", "fp16", "ValueError: no", "-", "-", "-", "✗ failed"]


def lines(*contents: Any) -> list[str]:
    return markdown(report_of(*contents)).splitlines()


def test_the_markdown_of_models_needs_a_tick() -> None:
    rival = model_row("reference-compile", 10.0)
    expected = "| DiT-XL/2 | 256 px | 256 | bf16 | forward | not measured | 25,600 (compile) | "
    assert lines(results("models", [rival, FULL]))[8] == (
        f"{expected}32,000 | 32,000 (ditfast) | 1.25x | 88 % of matmul |"
    )
    # the file's speed-up is not repeated without its tick
    for parity in (False, None):
        table = lines(results("models", [rival, replace(FULL, parity=parity)]))
        assert table[8] == f"{expected}32,000, no parity tick | no parity tick | - | - |"
        assert not any("1.25" in line for line in table)


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, "3,600 GB/s | 90 % | ✓ | 1.00x, a tie over compile |"),
        ({"speedup": 1.5}, "3,600 GB/s | 90 % | ✓ | 1.50x over compile |"),
        ({"parity": False}, "3,600 GB/s | 90 % | ✗ no | - |"),
        ({"parity": None, "speedup": 1.5}, "3,600 GB/s | 90 % | not judged | - |"),
    ],
)
def test_the_markdown_of_operators(changes: dict[str, Any], end: str) -> None:
    eager = replace(OP, provider="eager", ms=spread(0.4), speedup=None, rival=None)
    table = lines(results("ops", [eager, replace(OP, **changes)]))
    name = "gated\\_residual backward at 8 x 256 x 1152, bf16"
    assert (
        table[6]
        == "| operator | eager, ms | ditfast, ms | ditfast's rate | of limit | parity | best over best |"
    )
    assert table[8] == f"| {name} | 0.400 | 0.200 | {end}"
    assert "no tick, no speed-up; a tie is a difference within the run's noise" in table[10]


def test_the_markdown_of_operators_takes_our_fastest_with_a_tick() -> None:
    fast = replace(OP, provider="ditfast-b", ms=spread(0.1), rate=7200.0, speedup=2.0)
    faster = replace(OP, provider="ditfast-c", ms=spread(0.05), parity=False)
    table = lines(results("ops", [OP, fast, faster]))
    assert table[8].endswith(
        "| 0.200 | 0.100 | 0.050 | 7,200 GB/s (ditfast-b) | 90 % | ✓ | 2.00x over compile |"
    )


def test_the_markdown_of_curves_states_no_power_law_of_two_points_or_a_cloud() -> None:
    def points(provider: str, *times: float) -> list[ScalingRow]:
        rows = [model_row(provider, ms, "DiT-S/2", 4**index) for index, ms in enumerate(times)]
        return [ScalingRow("batch", row.batch, row) for row in rows]

    rows = [
        *points("ditfast", 1.0, 2.0, 4.0),
        *points("reference", 1.0, 2.0),
        *points("diffusers", 1.0, 9.0, 2.0),
    ]
    table = lines(results("scaling", rows))
    case = "| batch | DiT-S/2, forward, bf16 |"
    assert table[6:11] == [
        "| time against | held | provider | exponent | r² | points |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        f"{case} ditfast | 0.50 | 1.000 | 3 |",
        f"{case} reference | none stated (1: 1.00 ms, 4: 2.00 ms) | 1.000 | 2 |",
        # logs 0, 2.197, 0.693 at 0, 1, 2: r² is 0.693^2 / (2 * 2.524)
        f"{case} diffusers | none stated (1: 1.00 ms, 4: 9.00 ms, 16: 2.00 ms) | 0.095 | 3 |",
    ]


def test_table_md_holds_costs_and_numerics_under_their_conditions() -> None:
    text = markdown(report_of(results("cost", [COST]), results("verify", made_up.verify_rows(ok=False))))
    machine, computed = text.split("## Computed without a device\n\n")
    assert (
        "| layer\\_norm\\_modulate | triton | fp16 | d\\_x | 1.0e+00 | 1.0e-03 | 2.0e-03 | **✗ failed** |"
        in machine
    )
    assert computed.startswith(
        "Computed without a device, torch 9.9.9, triton 8.8.8, ditfast 0.0.test (012345678)."
    )
    assert "| ditfast | 1,207 | 12.3 | 4.56 | 371 | 2.50 | 7.25 |" in computed


def test_nothing_from_a_file_is_taken_for_markdown() -> None:
    assert escape("a\\b|c\nd <e> & *f* _g_ `h` [i](j) ~k~ #l") == (
        "a\\\\b\\|c d &lt;e&gt; &amp; \\*f\\* \\_g\\_ \\`h\\` \\[i\\](j) \\~k\\~ \\#l"
    )
    assert link("../a b/c(1)_d.json") == "[../a b/c(1)\\_d.json](../a%20b/c%281%29_d.json)"
    evil = "<b>|*x*"
    gpu = {**made_up.GPU, "gpu": {**made_up.GPU["gpu"], "name": evil, "driver": evil}, "ditfast": evil}
    rows = [
        replace(FULL, model=evil, provider="ditfast-" + evil),
        model_row("reference-compile" + evil, 9.0, evil),
    ]
    memory = MemoryRow(evil, "adaln_zero", (32, 32), 1, "bf16", evil, "ditfast", "error", evil)
    limits = replace(made_up.CEILINGS, matmul_tflops={evil: 1.0})
    report = report_of(
        results("models", rows, gpu, ceilings=limits, complete=False), results("memory", [memory], gpu)
    )
    text = markdown(report)
    assert text.count("&lt;b&gt;\\|\\*x\\*") > 10 and evil not in text and "<" not in text
