"""``ditfast bench host``: replaced kernels compute nothing and come back, rows of both models, result files, reports.

What is marked rehearsal launches on a GPU that is not there: `pytest -m rehearsal`. No test judges a time.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from ditfast import DiT, DiTConfig, ops
from ditfast.bench.cases.case import Case
from ditfast.bench.commands import host as host_command
from ditfast.bench.records.files import Results
from ditfast.bench.records.rows import HostPart, HostRow, Spread
from ditfast.bench.report.page import page
from ditfast.bench.report.tables import host_tables
from ditfast.bench.suites import host
from ditfast.bench.suites.cost import trace
from ditfast.cli.command import app
from ditfast.console import print_tables
from ditfast.model import blocks
from ditfast.testing.inputs import random_batch
from tests.report.conftest import CPU as CPU_ENVIRONMENT
from tests.report.conftest import report_of, results

pytest.importorskip("triton", reason="needs the package triton")
from ditfast.kernels.rehearsal import nothing_computed, rehearse, torch_kernels, unavailable  # noqa: E402

BF16 = torch.bfloat16
TINY = DiTConfig(depth=2, hidden_size=144, num_heads=2, latent_size=8, patch_size=2, num_classes=10)
LEVELS = ("public", "launcher", "launch")
MARKS = (
    pytest.mark.rehearsal,
    pytest.mark.skipif(unavailable() is not None, reason=f"cannot rehearse: {unavailable()}"),
)


def rehearsed(test):
    for mark in MARKS:
        test = mark(test)
    return test


def of(ms: float) -> Spread:
    return Spread(ms, ms * 0.9, ms * 1.1, 7, 1)


def made_up() -> Results:
    """No figure here was measured."""
    part = HostPart("gelu_mlp", "forward", 28, 1, of(0.05), of(0.02), None)
    case = ("DiT-XL/2", "adaln_zero", (32, 32), 1, "bf16", "forward")
    rows = [
        HostRow(*case, "reference", "sm_90", of(5.0), 4.0, 585, 0, 787),
        HostRow(*case, "ditfast", "sm_90", of(11.0), 10.0, 207, 87, 267, [part]),
    ]
    settings = {"device": "cpu", "dtype": "bf16"}
    return results("host", rows, CPU_ENVIRONMENT, ceilings=None, readings=[], settings=settings)


@rehearsed
@pytest.mark.parametrize(
    ("name", "function"),
    {
        "add": lambda x, out: torch.add(x, x, out=out),
        "mm": lambda x, out: torch.mm(x, x, out=out),
        "addmm": lambda x, out: torch.addmm(x, x, x, out=out),
        "gelu": lambda x, out: torch.ops.aten.gelu.out(x, approximate="tanh", out=out),
        "silu": lambda x, out: torch.ops.aten.silu.out(x, out=out),
        "copy": lambda x, out: out.copy_(x),
        "cat": lambda x, out: torch.cat([x[:, :8], x[:, 8:]], 1, out=out),
        "sum": lambda x, out: torch.sum(x.expand(3, 16, 16), 0, out=out),
    }.items(),
)
def test_torchs_kernels_write_nothing(name, function):
    x, out = torch.ones(16, 16, dtype=BF16), torch.full((16, 16), 7.0, dtype=BF16)
    with nothing_computed() as calls:
        function(x, out)
        assert calls() > 0
    assert out.eq(7.0).all(), name
    function(x, out)
    assert not out.eq(7.0).any(), name


@rehearsed
def test_gemms_attention_and_norms_are_called_and_not_computed():
    """Each is one call of a kernel; a Linear's bias is another, which a GPU's library saves."""
    x = torch.empty(1, 256, 1152, dtype=BF16)
    weight, bias = torch.empty(1152, 1152, dtype=BF16), torch.empty(1152, dtype=BF16)
    heads = x.view(1, 256, 16, 72).transpose(1, 2)
    with nothing_computed() as calls:
        counts = []
        for function in (
            lambda: x[0] @ weight,
            lambda: F.linear(x, weight, bias),
            lambda: F.scaled_dot_product_attention(heads, heads, heads),
            lambda: F.layer_norm(x, (1152,)),
            lambda: F.gelu(x, approximate="tanh"),
            lambda: F.silu(x),
        ):
            before = calls()
            function()
            counts.append(calls() - before)
    assert counts == [1, 2, 1, 1, 1, 1]


@rehearsed
def test_kernels_come_back_after_an_exception():
    x = torch.ones(8, 8, dtype=BF16)
    enabled = torch.backends.mkldnn.enabled
    with pytest.raises(KeyError), nothing_computed():
        raise KeyError
    assert torch.backends.mkldnn.enabled == enabled
    assert (x @ x).eq(8).all() and F.gelu(x).gt(0.8).all() and (x + x).eq(2).all()


@rehearsed
def test_a_torch_with_kernels_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr(torch_kernels, "KERNELS", (*torch_kernels.KERNELS, "no_such_stub"))
    with pytest.raises(RuntimeError, match="elsewhere, it has no at::native::no_such_stub"), nothing_computed():
        pass
    with pytest.raises(ValueError, match="bench host needs a call without its kernels, and torch's kernels cannot be"):
        host_command._make_plan((), (), (), None, "sm_90")
    monkeypatch.setattr(torch_kernels, "KERNELS", ("mul_stub",))
    with pytest.raises(RuntimeError, match="keeps them elsewhere, add in bf16 was computed"), nothing_computed():
        pass
    assert torch.ones(2).mul(3).eq(3).all()


@rehearsed
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_case(mode):
    """Each model's row, their counts, and ditfast's operators at every level."""
    functions = {name: getattr(blocks, name) for name in ("adaln", "norm_attention", "norm_mlp")}
    functions |= {name: getattr(ops, name) for name in ("self_attention", "gelu_mlp")}
    messages = []
    rows = host.measure_case(Case(TINY, 1, BF16, mode), 0.02, "sm_90", messages.append)
    reference, fast, official, accelerated = rows
    assert len(messages) == 4 and all(f"batch 1, {mode}, bf16: " in text for text in messages)
    assert [row.provider for row in rows] == ["reference", "ditfast", "official", "accelerated"]
    assert official.triton_launches == 0 and official.replaced >= reference.replaced
    # each block adds its last branch, and its gradient's sums are taken, on their own; the sinusoid, in inference the
    # conditioning, and in training the modulations are the model's own
    apart = {"forward": TINY.depth - 2, "train": 3 * TINY.depth - 2}[mode]
    assert accelerated.triton_launches == fast.triton_launches + apart
    for row in rows:
        traced = row.provider in ("reference", "ditfast")
        expected = trace(TINY, 1, BF16, mode, row.provider).total_launches if traced else None
        assert row.launches == expected
        assert 0 < row.least_ms <= row.process_ms.p25 and row.mode == mode and row.arch == "sm_90"
    assert reference.triton_launches == 0 and not reference.parts
    assert reference.replaced > fast.replaced > 20
    assert fast.triton_launches == launches_of_a_call(mode) > 0
    parts = {(part.operator, part.direction): part for part in fast.parts}
    if mode == "forward":
        assert {operator: part.uses for (operator, _), part in parts.items()} == {
            "timestep_embedding": 1,
            "conditioning": 1,
            "modulations_together": 1,
            "infer_blocks": 1,
            "gated_residual_layer_norm_modulate": 1,
        }
        # all of Triton's launches are made by the parts
        assert sum(part.uses * part.launches for part in fast.parts) == fast.triton_launches
    else:
        uses = Counter({operator: part.uses for (operator, direction), part in parts.items() if direction == "forward"})
        assert uses == {
            "timestep_embedding": 1,
            "modulations_together": 1,
            "attached": 3,
            "norm_attention": 2,
            "norm_mlp": 2,
            "adaln": 1,
        }
        backward = {name for name, direction in parts if direction == "backward"}
        assert backward == {*uses} - {"timestep_embedding", "modulations_together"}
        assert parts["norm_attention", "backward"].launches == 4
    for part in fast.parts:
        levels = [getattr(part, level) for level in LEVELS]
        assert levels[0] is not None
        assert part.launches == 0 or all(levels)
        assert part.launches > 0 or levels[2] is None
    assert all(getattr(blocks if name in vars(blocks) else ops, name) is function
               for name, function in functions.items())  # fmt: skip
    assert torch.ones(2).add(1).eq(2).all()


def launches_of_a_call(mode: str) -> int:
    model = DiT(TINY).to(BF16).eval()
    x, t, y = random_batch(TINY, 1, dtype=BF16)
    with rehearse("sm_90") as rehearsal:
        if mode == "forward":
            with torch.no_grad():
                model(x, t, y)
        else:
            model(x, t, y).sum().backward()
        return rehearsal.launches


@rehearsed
def test_a_failure_leaves_everything_as_it_was(monkeypatch):
    before = ops.gelu_mlp

    def fails(*_):
        raise KeyError("made up")

    monkeypatch.setattr(host, "_part", fails)
    with pytest.raises(KeyError, match="made up"):
        host.measure_case(Case(TINY, 1, BF16), 0.02, "sm_80", lambda text: None)
    assert ops.gelu_mlp is before
    assert torch.ones(4, dtype=BF16).add(1).eq(2).all()
    with rehearse("sm_80"):
        pass  # none is under way


@rehearsed
def test_the_command(tmp_path, monkeypatch):
    """Rows that load again, the caption, one thread while it measures and as many as before afterwards."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    arguments = ["bench", "host", "--model", "DiT-S/8", "--mode", "forward", "--seconds", "0.02", "--json", "host.json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    loaded = Results.load(Path("host.json"), "host")
    assert loaded.complete and loaded.environment["cpu"]["torch_threads"] == 1
    assert [(row.provider, row.batch) for row in loaded.rows] == [(name, 1) for name in host.PROVIDERS]
    assert loaded.settings["seconds"] == 0.02 and loaded.settings["arch"] == "sm_90"
    assert "what the driver takes for each launch" in result.output
    assert "gated_residual_layer_norm_modulate" in result.output and "compiling kernels" in result.output
    # two norms a block: head dims of 64 take SDPA in inference, which no kernel of ditfast's serves
    blocks = next(part for part in loaded.rows[1].parts if part.operator == "infer_blocks")
    assert (blocks.uses, blocks.launches) == (1, 2 * 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "cfg"], "mode must be one of forward, train, got 'cfg'"),
        (["--model", "DiT-X"], "model must be one of"),
        (["--arch", "sm_70"], "arch must be one of sm_80, sm_86, sm_89, sm_90, sm_120, got 'sm_70'"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    result = CliRunner().invoke(app, ["bench", "host", *options])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.skipif(unavailable() is None, reason="kernels can be rehearsed in this process")
def test_where_nothing_can_be_rehearsed_the_reason_is_given():
    result = CliRunner().invoke(app, ["bench", "host"])
    message = f"error: bench host launches on a GPU that is not there, and cannot here: {unavailable()}\n"
    assert (result.exit_code, result.stderr) == (2, message)
    with pytest.raises(RuntimeError, match="torch's kernels cannot be replaced: "), nothing_computed():
        pass


@rehearsed
def test_without_gcc_the_reason_is_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="cannot here: gcc, which builds the driver's stub"):
        host_command._make_plan((), (), (), None, "sm_90")


def test_a_case_that_is_not_measured():
    with pytest.raises(ValueError, match=r"case must be in bf16 and of the mode forward or train, got .* fp32"):
        host.measure_case(Case(TINY, 1, torch.float32), 1.0, "sm_90", print)


@rehearsed
def test_the_plan():
    plan = host_command._make_plan((), (), (), None, "sm_90")
    assert [(case.config.name, case.batch, case.mode) for case in plan.cases] == [
        ("DiT-XL/2", 1, "forward"),
        ("DiT-XL/2", 1, "train"),
    ]


def test_results_load_again(tmp_path):
    path = tmp_path / "host.json"
    results = made_up()
    results.save(path)
    assert Results.load(path) == results
    data = json.loads(path.read_text())
    assert data["schema"] == "ditfast.bench.host/1"
    data["rows"][1]["parts"][0]["launch"] = "none"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"results\.rows\[1\]\.parts\[0\]\.launch"):
        Results.load(path)


def test_the_table(capsys):
    print_tables(host_command.tables(made_up()))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["DiT-XL/2", "1", "forward", "reference", "4.00", "1.00x", "5.00", "+-", "0.500", "585", "0"] in lines
    assert ["ditfast", "10.0", "2.50x", "11.0", "+-", "1.10", "207", "87"] in lines
    assert ["gelu_mlp", "forward", "28", "1", "50.0", "20.0", "-"] in lines
    print_tables(host_command.tables(replace(made_up(), rows=[], complete=False)))
    assert "no rows" in capsys.readouterr().out


def test_the_report():
    report = report_of(made_up())
    models, parts = host_tables(report.machines[0])
    assert [cell.text for cell in models.rows[1]][3:] == ["ditfast", "10.0", "11.0", "9.90 to 12.1", "207", "87"]
    assert [cell.text for cell in parts.rows[0]][3:] == ["gelu_mlp, forward", "28", "1", "50.0", "20.0", "-"]
    html = page(report, [])
    assert "The host&#x27;s time of an eager call" in html and "microseconds a call" in html
