"""Fits, and a run beside an older one: by hand, with ditfast and its rivals told apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ditfast.bench.records.compare import compare
from ditfast.bench.report.compared import comparison_table
from ditfast.bench.report.data import Compared
from ditfast.bench.report.fits import fit_exponent, is_power_law
from tests.report import conftest as made_up
from tests.report.conftest import model_row, results, spread

E = math.e


@pytest.mark.quick
@pytest.mark.parametrize(
    ("values", "times", "expected"),
    [
        ([1, 2, 4], [3.0, 12.0, 48.0], (2.0, 1.0)),
        ([1, 4], [8.0, 4.0], (-0.5, 1.0)),
        ([64, 128, 256], [5.0, 5.0, 5.0], (0.0, 1.0)),
        # logs (0, 1, 2) against (0, 2, 1): slope 1/2, r 1/2
        ([1.0, E, E**2], [1.0, E**2, E], (0.5, 0.25)),
    ],
)
def test_exponents_by_hand(values: list[float], times: list[float], expected: tuple[float, float]) -> None:
    assert fit_exponent(values, times) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "times", "message"),
    [
        ([1, 2], [1.0], "times must have one entry a value, got 1 for 2 values"),
        ([1], [1.0], r"values must hold at least two different ones, got \[1\]"),
        ([2, 2], [1.0, 2.0], "at least two different ones"),
        ([0, 2], [1.0, 2.0], "values must be finite and above 0, got 0"),
        ([1, 2], [1.0, math.nan], "times must be finite and above 0, got nan"),
    ],
)
def test_points_without_a_fit_are_refused(values: list[float], times: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_exponent(values, times)


def test_operators_and_curves_are_compared_too() -> None:
    new = made_up.op_case("linear_gelu", "forward", 8, 4608)
    old = [replace(row, ms=spread(row.ms.median / 2)) if row.ms else row for row in new]
    comparison = compare(results("ops", old), results("ops", new))
    assert [(change.row.provider, change.speedup, change.is_regression) for change in comparison.changes] == [
        ("eager", 0.5, False),
        ("compile", 0.5, False),
        ("ditfast", 0.5, True),
    ]
    points = made_up.scaling_rows()
    lost = [replace(p, row=replace(p.row, ms=None, status="oom")) if p.value == 64 else p for p in points]
    comparison = compare(results("scaling", points), results("scaling", lost))
    # 64 tokens and 64 images, of three providers each; none of them is a change
    assert len(comparison.lost) == 6 and comparison.regressed == 2
    assert {change.verdict for change in comparison.changes} == {"tie"}


def test_a_lost_tick_is_a_regression_and_other_suites_have_no_times() -> None:
    old, new = model_row(), model_row(parity=False)
    comparison = compare(results("models", [old]), results("models", [new]))
    assert (comparison.unticked, comparison.regressed) == ([new], 1)
    with pytest.raises(
        ValueError, match="suites models, ops, scaling can be compared, got memory and memory"
    ):
        compare(results("memory", []), results("memory", []))


def test_a_power_law_needs_three_points_near_a_line() -> None:
    assert [is_power_law(*fit) for fit in ((3, 0.95), (3, 0.949), (2, 1.0))] == [True, False, False]


def pair(old: list, new: list, **environment: object) -> Compared:
    comparison = compare(results("models", old), results("models", new, {**made_up.GPU, **environment}))
    return Compared("old.json", "new.json", "Test GPU", comparison)


@pytest.mark.quick
def test_a_full_comparison_by_hand() -> None:
    """then / now: slower, faster, tied, and three that were lost, of ditfast and of rivals."""
    times = {
        "ditfast": (10.0, 20.0),
        "ditfast-graph": (20.0, 8.0),
        "ditfast-compile": (10.0, 10.1),
        "reference-compile": (30.0, 10.0),
        "reference": (10.0, 40.0),
        "diffusers": (5.0, None),
    }
    old = [model_row(name, before, noise=0.03) for name, (before, _) in times.items()]
    new = [model_row(name, after, noise=0.012) for name, (_, after) in times.items()]
    old.append(model_row("ditfast-x", 3.0))
    new.append(model_row("ditfast-x", None))
    compared = pair(old, new)
    assert compared.comparison.regressed == 2
    case = "DiT-XL/2, batch 256, bf16, forward, "
    rows = [[cell.text for cell in row] for row in comparison_table(compared).rows]
    assert rows == [
        [f"{case}diffusers", "-", "-", "-", "-", "no longer runs (a rival)"],
        [f"{case}ditfast-x", "-", "-", "-", "-", "✗ no longer runs"],
        [f"{case}ditfast", "10.0", "20.0", "0.50x", "1.2 %", "✗ regression"],
        [f"{case}reference", "10.0", "40.0", "0.25x", "1.2 %", "slower (a rival)"],
        [f"{case}ditfast-graph", "20.0", "8.00", "2.50x", "1.2 %", "faster"],
        [f"{case}reference-compile", "30.0", "10.0", "3.00x", "1.2 %", "faster"],
        [f"{case}ditfast-compile", "10.0", "10.1", "0.99x", "1.2 %", "a tie"],
    ]
    assert comparison_table(compared).notes == [
        "A change within the noise of either run, or with overlapping quartiles, is a tie.",
        "Measured in one run alone: 2 rows only then, 0 rows only now.",
    ]


def test_the_larger_noise_of_the_two_makes_a_tie() -> None:
    """20 % slower, with quartiles apart: past 15 % of noise, within 25 %."""
    rows = [replace(model_row(ms=ms), ms=spread(ms, 0.001), noise=0.15) for ms in (10.0, 12.0)]
    assert compare(*(results("models", [row]) for row in rows)).changes[0].verdict == "slower"
    for noisy in (0, 1):
        changed = [replace(row, noise=0.25) if index == noisy else row for index, row in enumerate(rows)]
        assert compare(*(results("models", [row]) for row in changed)).changes[0].verdict == "tie"
    # within no noise, but the quartiles overlap
    changed = [replace(row, ms=spread(row.ms.median, 0.1), noise=0.0) for row in rows]
    assert compare(*(results("models", [row]) for row in changed)).changes[0].verdict == "tie"


def test_a_lost_rival_is_no_regression() -> None:
    compared = pair([model_row("reference"), model_row()], [model_row("reference", None), model_row()])
    assert compared.comparison.regressed == 0
    lost = comparison_table(compared).rows[0]
    assert [lost[0].text, lost[-1].text, lost[-1].tone] == [
        "DiT-XL/2, batch 256, bf16, forward, reference",
        "no longer runs (a rival)",
        "quiet",
    ]


def test_differing_conditions_are_listed_and_odd_ones_do_no_harm() -> None:
    packages = {"torch": "9.9.9", "triton": "8.8.9", "diffusers": "0.1"}
    compared = pair(
        [model_row()], [model_row()], packages=packages, gpu={**made_up.GPU["gpu"], "cuda": "12"}, cpu="odd"
    )
    assert compared.comparison.conditions == [
        "cpu model: Test CPU then, None now",
        "cpu torch_threads: 2 then, None now",
        "gpu cuda: 99.9 then, 12 now",
        "packages triton: 8.8.8 then, 8.8.9 now",
        "packages diffusers: None then, 0.1 now",
    ]
