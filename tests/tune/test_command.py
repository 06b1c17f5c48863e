"""The command ``ditfast tune``: its plan without a GPU, its table, its endings."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from ditfast.cli.command import app
from ditfast.testing.operators import Shape

pytest.importorskip("triton")
from ditfast.bench.tune import command, measure, plan, table  # noqa: E402
from ditfast.kernels.configs import tables  # noqa: E402
from tests.tune.made_up import BRIEF, CPU, FAST, GPU, Doubling, pretend  # noqa: E402


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.quick
@pytest.mark.usefixtures("no_gpu")
def test_a_dry_run_needs_no_gpu() -> None:
    result = invoke("--dry-run", "--model", "DiT-S/8", "--batch", "256")
    assert result.exit_code == 0, result.output
    assert "the plan for sm_90 (132 multiprocessors)" in result.stdout
    for key in ("linear_gelu/bfloat16/1536/384/4096", "adaln_bwd/bfloat16/384/16"):
        (line,) = (line for line in result.stdout.splitlines() if key in line)
        assert "DiT-S/8" in line
    assert "M=4096 N=1536 K=384" in result.stdout and "TMA 128x" in result.stdout
    assert "15 shapes, " in result.stdout
    sizes = invoke("--dry-run", "--model", "DiT-S/8", "--batch", "256", "--image-size", "256", "--image-size", "512")
    assert "attention_fwd/bfloat16/64/64 " in sizes.stdout and "DiT-S/8 512" in sizes.stdout
    older = invoke("--dry-run", "--model", "DiT-S/8", "--gpu", "sm_80", "--dtype", "fp16")
    assert "sm_80 (108 multiprocessors)" in older.stdout
    assert "TMA" not in older.stdout and "linear_gelu/float16/1536/384/16/" not in older.stdout
    assert "linear_gelu/float16/1536/384/16 " in older.stdout  # batch 1


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tune measures a GPU, and there is none; --dry-run lists the plan"),
        (("--gpu", "sm_80"), "--gpu is for --dry-run"),
        (("--device", "cpu"), "--device must be cuda or cuda:N, got 'cpu'"),
        (("--dry-run", "--batch", "0"), "--batch must be at least 1, got 0"),
        (("--dry-run", "--model", "DiT-XXL/2"), "did you mean 'DiT-XL/2'?"),
        (("--dry-run", "--dtype", "fp8"), "dtype must be one of"),
        (("--budget", "soon"), "--budget must look like 90s, 9m or 1h, got 'soon'"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, no_gpu: None, tmp_path: Path) -> Iterator[Path]:
    """The command on a CPU that takes itself for an H200, with one operator of three shapes; where its table goes."""
    pretend(monkeypatch, tmp_path / "configs")
    monkeypatch.setattr(plan, "FAMILIES", ((Doubling(),),))
    monkeypatch.setattr(plan, "SECONDS", BRIEF)
    monkeypatch.setattr(command, "_gpu", lambda name: CPU)
    table.refresh()
    yield tmp_path / "configs" / "nvidia-h200.json"
    table.refresh()


def on_stub(*arguments: str | Path) -> Result:
    return invoke("--model", "DiT-S/8", "--dtype", "fp32", "--batch", 1, "--batch", 2, "--batch", 4, *arguments)


def test_the_command_writes_where_tables_are_looked_up(stub: Path, tmp_path: Path) -> None:
    result = on_stub()
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines[0] == f"NVIDIA H200: 3 shapes, 0 measured before; {stub}"
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"[{number}/3] adaln_bwd/float32/4/{tokens} (B={tokens // 16} T={tokens} D=4)"
        for number, tokens in ((1, 16), (2, 32), (3, 64))
    ]
    assert result.stdout == f"{stub}: 3 shapes measured, 0 failed, 0 left for another run\n"
    table = tables.read_table(stub)
    assert (table["gpu"], len(table["entries"])) == (GPU.name, 3)
    assert table["environment"]["packages"]["torch"] and table["environment"]["source"]

    assert "0 shapes, 3 measured before" in on_stub().stderr
    assert "3 shapes, 0 measured before" in on_stub("--again").stderr
    elsewhere = tmp_path / "elsewhere.json"
    assert on_stub("--out", elsewhere).exit_code == 0
    assert tables.read_table(elsewhere)["entries"] == table["entries"]
    cut = on_stub("--out", tmp_path / "cut.json", "--budget", "1e-9")
    assert cut.exit_code == 0
    assert "0 shapes measured, 0 failed, 3 left for another run" in cut.stdout
    assert not (tmp_path / "cut.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_interrupted(number: signal.Signals, stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(shape: Shape) -> None:
        if shape.batch == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(plan, "FAMILIES", ((Doubling(hook=interrupt),),))
    result = on_stub()
    assert result.exit_code == 130, result.output
    assert "interrupted; what was measured is kept" in result.stderr
    assert len(tables.read_table(stub)["entries"]) == 2


def test_the_command_on_a_gpu_that_was_lost(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise measure.GpuLost("a key: a candidate left the GPU in an error")

    monkeypatch.setattr(plan, "measure_task", lost)
    result = on_stub()
    assert result.exit_code == 1
    message = "error: a key: a candidate left the GPU in an error; what was measured before is kept"
    assert result.stderr.splitlines()[-1] == message


def test_the_command_refuses_a_damaged_table(stub: Path) -> None:
    stub.parent.mkdir()
    stub.write_text("{")
    result = on_stub()
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {stub} is not a readable table")
    assert stub.read_text() == "{"


def test_the_command_reports_that_nothing_was_measured(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "FAMILIES", ((Doubling((FAST._replace(factor=1.0),)),),))
    result = on_stub()
    assert result.exit_code == 1
    assert "0 shapes measured, 3 failed, 0 left" in result.stdout
