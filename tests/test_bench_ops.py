"""``ditfast bench ops``: hand-computed columns, the parity gate, and the command."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from ditfast.bench import ops_bench
from ditfast.bench.ceilings import Ceilings
from ditfast.bench.operators import OPERATORS, Shape
from ditfast.bench.ops_bench import OpRow, run_operator, with_speedup, work
from ditfast.bench.timing import Spread
from ditfast.cli import app

CPU = torch.device("cpu")
LIMITS = Ceilings(100.0, 1 << 20, {"fp32": 0.5}, {"fp32": 1024})


def row(provider, ms, parity=True):
    return OpRow(
        "gated_residual", "forward", 2, 3, 4, "fp32", provider, Spread(ms, ms, ms, 5, 1), 1.0, "GB/s", 0.5, parity
    )


def test_speedup_over_the_fastest_rival_beside_a_tick():
    rows = with_speedup([row("eager", 4.0), row("compile", 3.0, None), row("ditfast", 2.0)])
    assert [item.speedup for item in rows] == [None, None, 1.5]
    for parity in (False, None):
        assert with_speedup([row("eager", 4.0), row("ditfast", 2.0, parity)])[1].speedup is None
    assert with_speedup([row("ditfast", 2.0)])[0].speedup is None


def test_work_by_hand():
    shape = Shape(2, 3, 8)  # 48 elements
    assert work("gated_residual_layer_norm_modulate", "forward", shape, 2) == (4 * 48 * 2, "GB/s")
    assert work("gated_residual_layer_norm_modulate", "backward", shape, 2) == (6 * 48 * 2, "GB/s")
    assert work("layer_norm_modulate", "backward", shape, 4) == (3 * 48 * 4, "GB/s")
    assert work("linear_gelu", "forward", shape, 2) == (2 * 6 * 8 * 16, "TFLOP/s")
    assert work("gelu_mlp", "backward", shape, 2) == (8 * 6 * 8 * 16, "TFLOP/s")
    assert work("self_attention", "forward", shape, 2) == (4 * 2 * 3 * 3 * 8, "TFLOP/s")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_operator_gets_no_tick_and_no_speedup(direction, monkeypatch):
    monkeypatch.setattr(ops_bench, "compile_unavailable", lambda device: "left out here")
    right = OPERATORS["gated_residual"]
    wrong = replace(right, fused=lambda residual, branch, gate: residual + branch * gate.unsqueeze(1) * 1.01)
    for operator, parity in ((right, True), (wrong, False)):
        eager, compiled, ours = run_operator(operator, direction, Shape(2, 5, 72), torch.float32, CPU, LIMITS, 0.01)
        assert (ours.parity, ours.speedup is not None) == (parity, parity)
        assert compiled.ms is None and compiled.note == "left out here"
        assert eager.rate == pytest.approx(3 * 720 * 4 / eager.ms.median / 1e6)
        assert eager.share == pytest.approx(eager.rate / 100.0)


def test_the_command(tmp_path):
    path = tmp_path / "ops.json"
    arguments = ["bench", "ops", "--operator", "gated_residual", "--direction", "forward", "--batch", "1"]
    arguments += ["--width", "72", "--tokens", "5", "--seconds", "0.02", "--json", str(path), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(path.read_text())
    assert data["schema"] == ops_bench.SCHEMA
    assert data["environment"]["packages"]["torch"]
    assert [item["provider"] for item in data["rows"]] == ["eager", "compile", "ditfast"]
    assert data["rows"][2]["parity"] is True


def test_bad_arguments():
    result = CliRunner().invoke(app, ["bench", "ops", "--operator", "gated"])
    assert result.exit_code == 2
    assert "--operator must be one of" in result.output
