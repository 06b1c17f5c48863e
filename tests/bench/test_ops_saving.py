"""``ditfast bench ops``: ours saved before the rivals are there, and what becomes of a GPU that an error has broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from ditfast.bench.measure.preparing import failed
from ditfast.bench.records.files import Results
from ditfast.bench.records.rows import OpRow
from ditfast.bench.suites import ops as ops_bench
from ditfast.bench.suites.ops import run_operator
from ditfast.cli.command import app
from ditfast.testing.operators import OPERATORS, Shape

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_limits")
OPERATOR, SHAPE = OPERATORS["gated_residual"], Shape(2, 5, 72)


def run(save: Callable[[list[OpRow]], None], **changes: Any) -> list[OpRow]:
    operator = replace(OPERATOR, **changes)
    return run_operator(operator, "forward", SHAPE, torch.float32, CPU, 0.01, ("eager", "ditfast"), save)


def test_ours_is_saved_alone_then_timed_beside_the_rivals() -> None:
    saved: list[list[OpRow]] = []
    rows = run(saved.append)
    [alone] = saved
    assert [(row.provider, row.status, row.parity, row.speedup) for row in alone] == [("ditfast", "ok", True, None)]
    assert [row.provider for row in rows] == ["eager", "ditfast"]
    assert rows[1].speedup is not None and rows[1].rival == "eager"


def test_a_rival_that_interrupts_costs_nothing_of_ours() -> None:
    def interrupt(*args: Tensor, **kwargs: Tensor) -> Tensor:
        if saved:
            raise KeyboardInterrupt
        return OPERATOR.formula(*args, **kwargs)  # type: ignore[no-any-return]

    saved: list[list[OpRow]] = []
    with pytest.raises(KeyboardInterrupt):
        run(saved.append, formula=interrupt)
    assert [row.status for row in saved[0]] == ["ok"]


def test_a_failure_beside_the_rivals_keeps_no_time() -> None:
    def fail(*args: Tensor, **kwargs: Tensor) -> Tensor:
        if saved:
            raise RuntimeError("out of luck")
        return OPERATOR.fused(*args, **kwargs)  # type: ignore[no-any-return]

    saved: list[list[OpRow]] = []
    rows = {row.provider: row for row in run(saved.append, fused=fail)}
    assert saved[0][0].ms is not None
    assert (rows["ditfast"].status, rows["ditfast"].ms, rows["ditfast"].rate) == ("error", None, None)
    assert rows["eager"].status == "ok"


def ops(path: Path, *arguments: object) -> Result:
    options = ("--width", 72, "--tokens", 5, "--batch", 2, "--device", "cpu", "--seconds", 0.01, "--json", path)
    return CliRunner().invoke(app, ["bench", "ops", *map(str, (*options, *arguments))])


def test_a_broken_gpu_ends_the_run_and_the_next_one_begins_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a CUDA error that sticks every later call of the process fails, whoever makes it."""
    tried: list[str] = []
    inner = ops_bench.run_operator

    def broken(operator: Any, *arguments: Any) -> list[OpRow]:
        tried.append(operator.name)
        rows = inner(operator, *arguments)
        if operator.name == "gated_residual":
            return [failed(row, RuntimeError("an illegal memory access")) for row in rows]
        return rows

    monkeypatch.setattr(ops_bench, "run_operator", broken)
    monkeypatch.setattr("ditfast.bench.measure.preparing.computes", lambda device: False)
    names = ("gated_residual", "layer_norm_modulate")
    chosen = [word for name in names for word in ("--operator", name)]
    both_runs = (*chosen, "--direction", "forward", "--providers", "eager,ditfast")
    result = ops(tmp_path / "r.json", *both_runs)
    assert result.exit_code == 1, result.output
    assert "left the GPU in an error" in result.stderr
    assert tried == ["gated_residual"]
    assert not Results.load(tmp_path / "r.json").complete
    ops(tmp_path / "r.json", *both_runs, "--continue")
    assert tried[1:] == ["layer_norm_modulate", "gated_residual"]
    statuses = {(row.operator, row.status) for row in Results.load(tmp_path / "r.json").rows}
    assert statuses == {("gated_residual", "error"), ("layer_norm_modulate", "ok")}


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        ("eager,nobody", "--providers must be one of"),
        ("gemm", "none of the providers gemm runs one of these operators on cpu"),
    ],
)
def test_unknown_or_unfit_providers_are_refused(providers: str, message: str, tmp_path: Path) -> None:
    result = ops(tmp_path / "r.json", "--operator", "gated_residual", "--providers", providers)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "r.json").exists()
