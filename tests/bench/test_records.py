"""Result files, the derived columns, and the comparison of two runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditfast import DiTConfig
from ditfast.bench.measure.flops import flops_per_image
from ditfast.bench.records.compare import compare
from ditfast.bench.records.files import Ceilings, Results, highest, schema
from ditfast.bench.records.metrics import images_per_second, is_tie, tflops, with_shares, with_speedups
from ditfast.bench.records.rows import ModelRow, Spread, Status

CEILINGS = Ceilings(100.0, 4, matmul_tflops={"bf16": 2.0, "tf32": 1.0}, matmul_size={"bf16": 8, "tf32": 8})


def row(
    provider: str, ms: float | None = 10.0, parity: bool | None = True, noise: float = 0.01, batch: int = 1
) -> ModelRow:
    status: Status = "error" if ms is None else "ok"
    spread = None if ms is None else Spread(ms, ms * 0.999, ms * 1.001, 5, 1)
    blank = ModelRow(
        "DiT-S/8", "adaln_zero", (32, 32), 16, 384, 12, batch, "bf16", "forward", provider, "bf16", status
    )
    return replace(blank, ms=spread, parity=parity, noise=noise)


def results(*rows: ModelRow, environment: dict[str, Any] | None = None) -> Results:
    return Results("models", environment or {"gpu": None}, {}, CEILINGS, rows=list(rows), complete=True)


def test_columns_by_hand() -> None:
    assert images_per_second(32, 4.0) == 8000.0
    assert tflops(3 * 10**9, 6.0) == 0.5
    assert is_tie(1.25, 0.25) and is_tie(0.8, 0.25)
    assert not is_tie(1.26, 0.25) and not is_tie(0.79, 0.25)


@pytest.mark.parametrize(
    ("precision", "weight_bytes", "share", "ceiling"),
    [
        ("bf16", 30 * 10**6, 0.25, "matmul"),  # 0.5 of 2 TFLOP/s; 5 of 100 GB/s
        ("tf32", 30 * 10**6, 0.5, "matmul"),  # 0.5 of 1 TFLOP/s
        ("bf16", 300 * 10**6, 0.5, "copy"),  # 300 MB in 6 ms: 50 of 100 GB/s
        ("fp16", 1, None, None),  # not measured
    ],
)
@pytest.mark.quick
def test_shares_by_hand(precision: str, weight_bytes: int, share: float | None, ceiling: str | None) -> None:
    before = replace(row("a", 6.0), precision=precision, weight_bytes=weight_bytes, tflops=0.5)
    [after] = with_shares([before], CEILINGS)
    assert (after.ceiling_share, after.ceiling) == (share, ceiling)


def test_a_limit_is_the_highest_measured() -> None:
    later = Ceilings(50.0, 8, {"bf16": 3.0, "fp32": 0.5}, {"bf16": 16, "fp32": 4})
    assert highest(None, later) == later
    expected = Ceilings(100.0, 4, {"bf16": 3.0, "tf32": 1.0, "fp32": 0.5}, {"bf16": 16, "tf32": 8, "fp32": 4})
    assert highest(CEILINGS, later) == expected
    assert highest(later, CEILINGS) == expected


def test_flops_by_hand() -> None:
    config = DiTConfig(depth=2, hidden_size=72, num_heads=2, latent_size=(8, 4), num_classes=10)
    tokens, width = 4 * 2, 72
    patch = tokens * width * 4 * 4  # 2 x 2 positions of 4 channels
    sinusoid = 256 * width
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    final = 2 * width**2 + tokens * width * 4 * 8
    macs = patch + sinusoid + width**2 + 2 * block + final
    assert flops_per_image(config, "forward") == 2 * macs
    assert flops_per_image(config, "cfg") == 4 * macs
    # the backward needs no gradient of the latents and of the sinusoid
    assert flops_per_image(config, "train") == 2 * (3 * macs - patch - sinusoid)


def test_speedup_is_over_the_fastest_rival_that_ran() -> None:
    rivals = [row("reference", 10.0), row("diffusers", 8.0, parity=None)]
    rows = with_speedups([*rivals, row("ditfast", 4.0), row("x", None)])
    assert [item.speedup for item in rows] == [None, None, 2.0, None]
    assert rows[2].rival == "diffusers"


def test_no_tick_no_speedup_and_no_rival_no_speedup() -> None:
    for parity in (False, None):
        assert with_speedups([row("reference"), row("ditfast", 1.0, parity=parity)])[1].speedup is None
    assert with_speedups([row("reference", None), row("ditfast", 1.0)])[1].speedup is None
    # ours are no rivals of each other
    assert with_speedups([row("ditfast"), row("ditfast-graph", 1.0)])[1].speedup is None


def test_of_equal_rivals_the_first_is_named() -> None:
    assert with_speedups([row("a", 8.0), row("b", 8.0), row("ditfast", 8.0)])[2].rival == "a"


@pytest.mark.quick
def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    before = results(row("reference"), row("ditfast", 4.0), row("x", None))
    before.save(path)
    assert Results.load(path) == before
    assert json.loads(path.read_text())["schema"] == schema("models") == "ditfast.bench.models/1"
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]


def damaged(change: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(results(row("reference")).to_dict()))
    change(data)
    return data  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="ditfast.bench/1"), "must have one of the schemas .*, got 'ditfast.bench/1'"),
        (lambda d: d.update(schema=["ditfast.bench.models/1"]), "must have one of the schemas"),
        (lambda d: d.update(schema="ditfast.bench.ops/2"), r"results.rows\[0\] must hold operator, "),
        (lambda d: d.pop("schema"), "must have one of the schemas 'ditfast.bench.models/1', .*, got None"),
        (lambda d: d.pop("rows"), r"missing: \['rows'\]"),
        (lambda d: d["rows"][0].pop("status"), r"results.rows\[0\].*missing: \['status'\]"),
        (lambda d: d["rows"][0].update(more=1), r"results.rows\[0\].*unknown: \['more'\]"),
        (lambda d: d["rows"][0].update(batch="1"), r"results.rows\[0\].batch must be int, got '1'"),
        (lambda d: d["rows"][0].update(batch=True), r"results.rows\[0\].batch must be int, got 'True'"),
        (lambda d: d["rows"][0].update(status="fine"), "status must be one of ok, oom, error, unavailable, got 'fine'"),
        (lambda d: d["rows"][0].update(latent_size=[32]), r"latent_size must be 2 values"),
        (lambda d: d["rows"][0]["ms"].update(median=float("nan")), r"ms.median must be a finite number, got 'nan'"),
        (lambda d: d["rows"][0]["ms"].update(median=0.0), r"ms: times must be above 0 and in order, got 9.99, 0.0"),
        (lambda d: d["rows"][0]["ms"].update(p25=11.0), r"ms: times must be above 0 and in order"),
        (lambda d: d["rows"][0].update(speedup=0), r"results.rows\[0\].speedup must be above 0"),
        (lambda d: d["rows"][0].update(peak_bytes=10**30), r"peak_bytes must be at least 0 and below"),
        (lambda d: d["rows"][0].update(error=-1.0), r"results.rows\[0\].error must be at least 0"),
        (lambda d: d["rows"][0].update(ms=None), r"results.rows\[0\].ms must be there exactly where status is ok"),
        (lambda d: d["rows"][0].update(noise=10**400), r"noise must be a finite number"),
        (lambda d: d["ceilings"].update(copy_gb_per_s=0), r"results.ceilings: copy_gb_per_s must be above 0, got 0"),
        (lambda d: d.update(rows={}), "results.rows must be a list"),
        (lambda d: d["ceilings"].update(matmul_tflops=[1]), "ceilings.matmul_tflops must be an object"),
    ],
)
def test_other_schemas_and_damage_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(damaged(change)))
    with pytest.raises(ValueError, match=message) as caught:
        Results.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema": "ditfast.bench.models/1"', b"[" * 100_000]
)
def test_files_without_results_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="old.json"):
        Results.load(path)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    results(row("reference")).save(path)
    old = path.read_text()

    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        results(row("reference"), row("ditfast")).save(path)
    assert path.read_text() == old
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]


def test_not_finite_numbers_never_reach_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        results(replace(row("reference"), error=float("inf"))).save(tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_compare_matches_rows_and_calls_noise_a_tie() -> None:
    old = results(row("a", 10.0), row("b", 10.0), row("c", 10.0), row("gone"), row("failed", None))
    new = results(row("a", 5.0), row("b", 12.0), row("c", 10.05), row("new"), row("failed"), row("a", 9.0, batch=2))
    comparison = compare(old, new)
    verdicts = {change.row.provider: (change.verdict, round(change.speedup, 3)) for change in comparison.changes}
    assert verdicts == {"a": ("faster", 2.0), "b": ("slower", 0.833), "c": ("tie", 0.995)}
    assert (comparison.only_old, comparison.only_new) == (1, 3)


def test_compare_takes_the_larger_noise_and_overlapping_quartiles_as_ties() -> None:
    noisy = row("a", 10.0, noise=0.3)
    assert compare(results(noisy), results(row("a", 12.0))).changes[0].verdict == "tie"
    assert compare(results(row("a", 12.0)), results(noisy)).changes[0].verdict == "tie"
    wide = replace(row("a"), ms=Spread(10.0, 9.0, 12.5, 5, 1))
    assert compare(results(wide), results(row("a", 12.0))).changes[0].verdict == "tie"


def test_compare_says_which_conditions_differ() -> None:
    old = results(row("a"), environment={"gpu": {"name": "H100", "driver": "1"}, "packages": {"torch": "2.9"}})
    new = results(row("a"), environment={"gpu": None, "packages": {"torch": "2.9"}})
    assert compare(old, new).conditions == ["gpu name: H100 then, None now", "gpu driver: 1 then, None now"]
