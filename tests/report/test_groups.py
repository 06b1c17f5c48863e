"""How result files are grouped and what is said of their conditions: measured, measured again, or only traced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditfast.bench.report import write
from ditfast.bench.report.conditions import conditions, version
from ditfast.bench.report.page import page
from ditfast.bench.report.roofline import NO_COST
from tests.report import conftest as made_up
from tests.report.conftest import model_row, report_of, results

GPU = made_up.GPU["gpu"]


@pytest.mark.parametrize(
    "change",
    [
        {"commit": "fedcba"},
        {"dirty": True},
        {"source": "00ff"},
        {"ditfast": "1.0"},
        {"packages": {"torch": "9.9.8", "triton": "8.8.8"}},
        {"packages": {"torch": "9.9.9", "triton": "8.8.9"}},
        {"packages": {"torch": "9.9.9", "triton": "8.8.8", "diffusers": "7.7"}},
        {"gpu": {**GPU, "driver": "1"}},
        {"gpu": {**GPU, "cuda": "1"}},
    ],
)
def test_other_versions_never_share_a_group(change: dict[str, Any]) -> None:
    """Files without a common row stay apart too."""
    runs = results("models", [model_row()]), results("ops", [], {**made_up.GPU, **change})
    labels = [machine.label for machine in report_of(*runs).machines]
    assert labels == ["Test GPU (versions 1 of 2)", "Test GPU (versions 2 of 2)"]
    assert len(report_of(runs[0], results("ops", [])).machines) == 1


def test_labels_say_why_there_are_several() -> None:
    run, other = (
        results("models", [model_row()]),
        results("models", [model_row()], {**made_up.GPU, "commit": "f"}),
    )
    report = report_of(run, other, run, run)
    assert [machine.label for machine in report.machines] == [
        "Test GPU (versions 1 of 2)",
        "Test GPU (versions 1 of 2; measured again)",
        "Test GPU (versions 1 of 2; measured again, 2)",
        "Test GPU (versions 2 of 2)",
    ]
    assert [machine.number for machine in report.machines] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"ditfast": "1.0"}, "ditfast 1.0"),
        ({"ditfast": "1.0", "commit": "0123456789ab", "source": "0f1e2d3c4b"}, "ditfast 1.0 (012345678)"),
        (
            {"ditfast": "1.0", "commit": "0123456789ab", "dirty": True, "source": "0f1e2d3c4b"},
            "ditfast 1.0 (012345678 with uncommitted changes, source 0f1e2d3c)",
        ),
        ({"ditfast": "1.0", "dirty": True}, "ditfast 1.0 (with uncommitted changes)"),
        ({"source": "0f1e2d3c4b"}, "ditfast of an unknown version (source 0f1e2d3c)"),
    ],
)
def test_versions_in_words(environment: dict[str, Any], text: str) -> None:
    assert version(environment) == text


def test_conditions_by_hand() -> None:
    readings = [
        {"when": "before", "sm_clock_mhz": 1000.0, "temperature_c": 30.0},
        {"when": "after", "sm_clock_mhz": 1500.0, "power_draw_w": 400.0},
        {"when": "before", "sm_clock_mhz": 1100.0},
        {"when": "after", "sm_clock_mhz": 1700.0, "memory_clock_mhz": 2600.0},
    ]
    [machine] = report_of(results("models", [model_row()], readings=readings)).machines
    assert conditions(machine) == [
        ("device", "Test GPU"),
        ("driver", "111.22"),
        ("CUDA", "99.9"),
        ("memory", "100 GiB"),
        ("power limit", "500 W"),
        ("host", "Test CPU, 2 threads"),
        ("torch", "9.9.9"),
        ("triton", "8.8.8"),
        ("ditfast", "0.0.test (012345678)"),
        ("Python", "3.11.0"),
        ("system", "Test OS"),
        (
            "limits, measured in the same runs",
            "copy 4,000 GB/s; matmul bf16 800 TFLOP/s; matmul tf32 400 TFLOP/s",
        ),
        ("clocks, 0.json", "before: SM 1,000 MHz, 30 °C; after: SM 1,700 MHz, memory 2,600 MHz"),
    ]


def test_odd_values_in_an_environment_do_no_harm() -> None:
    environment = {
        "gpu": {"name": ["a", "b"], "driver": 1, "cuda": {}, "memory_bytes": "x", "power_limit_w": "500"},
        "cpu": [],
        "packages": 3,
        "commit": 12,
        "source": 0.5,
        "dirty": "yes",
        "os": {},
    }
    report = report_of(
        results("models", [model_row()], environment, readings=[{"when": "before", "sm_clock_mhz": "x"}])
    )
    [machine] = report.machines
    names = [name for name, _ in conditions(machine)]
    assert names == ["device", "driver", "ditfast", "limits, measured in the same runs"]
    assert page(report, [])


def test_traced_values_are_never_called_measured() -> None:
    meta, cost = made_up.traced_memory(), results("cost", made_up.cost_rows()[:3], ceilings=None, readings=[])
    other = replace(cost, environment={**made_up.GPU, "commit": "fedcba987654"})
    report = report_of(meta, cost, other, cost)
    assert report.machines == []
    assert [(group.label, [run.name for run in group.runs]) for group in report.computed] == [
        ("Computed without a device (versions 1 of 2)", ["0.json", "1.json"]),
        ("Computed without a device (versions 1 of 2; computed again)", ["3.json"]),
        ("Computed without a device (versions 2 of 2)", ["2.json"]),
    ]
    html = page(report, [])
    assert "Memory, traced on meta tensors, not measured" in html and "on Test GPU" not in html
    assert "ditfast 0.0.test (fedcba987)" in html
    for section in ("computed", "computed-2", "computed-3"):
        assert f'<section id="{section}">' in html


def test_a_cost_is_asked_for_only_where_it_is_missing() -> None:
    traced = model_row("ditfast", tflops=500.0)
    for row, changes, expected in (
        (traced, {}, True),
        (replace(traced, provider="reference-compile"), {}, False),
        (replace(traced, tflops=None), {}, False),
        (replace(traced, precision="tf32"), {}, False),
        (traced, {"ceilings": None}, False),
        (traced, {"settings": {"device": "cpu"}}, False),
    ):
        report = report_of(results("models", [row], **changes))
        assert (NO_COST in page(report, [])) == expected, changes
    report = report_of(results("models", [traced]), results("cost", made_up.cost_rows()))
    assert NO_COST not in page(report, [])


def test_plots_of_earlier_reports_go_and_other_files_stay(tmp_path: Path) -> None:
    write.prepare(tmp_path)
    (tmp_path / "plots" / "own.png").write_bytes(b"")
    write.write({"plots/a.png": b"1", "plots/b.png": b"1", "report.html": b""}, tmp_path)
    write.write({"plots/b.png": b"2", "plots/c.png": b"2", "report.html": b""}, tmp_path)
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == [".ditfast-plots", "b.png", "c.png", "own.png"]
    # a list that was tampered with deletes nothing else
    (tmp_path / "victim.png").write_bytes(b"")
    (tmp_path / "plots" / ".ditfast-plots").write_text('["../victim.png", "..", 3, "c.png"]')
    write.write({"plots/b.png": b"3"}, tmp_path)
    assert (tmp_path / "victim.png").exists() and not (tmp_path / "plots" / "c.png").exists()
    (tmp_path / "plots" / ".ditfast-plots").write_text("{")
    write.write({"plots/d.png": b"4"}, tmp_path)
    assert (tmp_path / "plots" / "b.png").read_bytes() == b"3"
