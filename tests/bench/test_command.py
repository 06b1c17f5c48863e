"""``ditfast bench`` as a user meets it: options, exit codes, interruption, files and tables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from ditfast import MODELS, DiTConfig
from ditfast.bench.cases import diffusers_dit
from ditfast.bench.cases.case import MODES, Case, defaults, parse_dtype, parse_image_size
from ditfast.bench.cases.providers import PROVIDERS, Provider
from ditfast.bench.cases.variants import Variant
from ditfast.bench.cases.workload import Inputs, Workload, make_inputs, make_pool
from ditfast.bench.commands import models as models_command
from ditfast.bench.records.files import Results
from ditfast.bench.report.terminal import results_table
from ditfast.cli.command import app
from ditfast.console import print_tables

TINY = DiTConfig(depth=2, hidden_size=64, num_heads=2, patch_size=8, num_classes=10)
pytestmark = pytest.mark.usefixtures("quick_limits")
QUICK = ("--device", "cpu", "--seconds", "0.01")


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiT-S/8 becomes a model that takes no time."""
    monkeypatch.setattr("ditfast.config.MODELS", {**MODELS, "DiT-S/8": TINY})


def add_provider(monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[[Workload], Variant]) -> None:
    monkeypatch.setitem(PROVIDERS, name, Provider(name, "fake", build))


def test_smoke(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    result = bench("--model", "DiT-S/8", "--batch", 1, "--providers", "reference,ditfast", "--json", path, *QUICK)
    assert result.exit_code == 0, result.output
    for text in ("DiT-S/8", "reference", "ditfast", "images/s", "TFLOP/s", "of limit", "memory", "speed-up"):
        assert text in result.stdout
    results = Results.load(path)
    assert results.complete
    assert [row.provider for row in results.rows] == ["reference", "ditfast"]
    reference, ours = results.rows
    assert reference.parity is True and ours.parity is True
    assert ours.rival == "reference" and ours.speedup is not None
    assert reference.speedup is None
    for row in results.rows:
        assert row.ms is not None and row.ms.p25 <= row.ms.median <= row.ms.p75
        assert row.images_per_s == pytest.approx(1e3 / row.ms.median)
        assert row.tflops == pytest.approx(2 * 0.357974016 / row.ms.median, rel=1e-6)
        assert row.peak_bytes is not None and row.peak_bytes > 33_148_160 * 4
        assert row.first_call_ms is not None and row.noise is not None
    environment = results.environment
    assert environment["packages"]["torch"] == metadata.version("torch")
    assert environment["cpu"]["torch_threads"] == torch.get_num_threads()
    assert {"ditfast", "commit", "dirty", "python", "os", "gpu"} <= environment.keys()
    assert results.ceilings is not None and results.ceilings.matmul_tflops["fp32"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "DiT-S/3"], "did you mean 'DiT-S/"),
        (["--model", "dit-xl/2"], "did you mean 'DiT-XL/2'?"),
        (["--providers", "reference,ditfst"], "got 'ditfst'; did you mean 'ditfast'?"),
        (["--providers", ","], "--providers must name at least one of"),
        (["--dtype", "bf61"], "dtype must be one of fp32, bf16, fp16, got 'bf61'; did you mean 'bf16'?"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--image-size", "big"], "image size must look like 256 or 256x512 (height x width), got 'big'"),
        (["--image-size", "250"], "image_size height must be a multiple of"),
        (["--device", "tpu9"], "--device must be cpu, cuda or cuda:N, got 'tpu9'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--device", "cpu", "--providers", "ditfast-graph"], "ditfast-graph: needs a CUDA GPU"),
        (["--json", "/no/such/folder/r.json"], "--json must be a file in a folder that exists"),
        (["--compare", "/no/such/file.json"], "/no/such/file.json"),
    ],
)
def test_wrong_options_exit_with_2_and_say_what_was_wanted(arguments: Sequence[str], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""


def test_another_schema_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text('{"schema": "ditfast.bench/0"}')
    result = bench("--compare", old)
    assert result.exit_code == 2
    assert "must have the schema 'ditfast.bench.models/1', got 'ditfast.bench/0'" in result.stderr
    assert str(old) in result.stderr


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_interruption_keeps_the_rows_so_far(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(work: Workload) -> Variant:
        if work.case.batch == 2:
            os.kill(os.getpid(), getattr(signal, how))
        return PROVIDERS["reference"].build(work)

    add_provider(monkeypatch, "patient", build)
    handler = signal.getsignal(signal.SIGTERM)
    path = tmp_path / "r.json"
    arguments = ("--model", "DiT-S/8", "--batch", 1, "--batch", 2, "--providers", "patient,ditfast", "--json", path)
    result = bench(*arguments, *QUICK)
    assert result.exit_code == 130, result.output
    assert "patient" in result.stdout
    assert "Interrupted or out of time: these are the rows so far." in result.stdout
    results = Results.load(path)
    assert not results.complete
    statuses = [(row.provider, row.batch, row.status) for row in results.rows]
    assert statuses == [("patient", 1, "ok"), ("ditfast", 1, "ok"), ("ditfast", 2, "ok")]
    assert results.rows[2].speedup is None  # its rival was not there yet
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.usefixtures("tiny")
def test_interruption_before_any_rows_keeps_an_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(work: Workload) -> Variant:
        raise KeyboardInterrupt

    add_provider(monkeypatch, "patient", build)
    path = tmp_path / "r.json"
    path.write_text("older")
    result = bench("--model", "DiT-S/8", "--batch", 1, "--providers", "patient", "--json", path, *QUICK)
    assert result.exit_code == 130
    assert "interrupted before the first rows" in result.stderr
    assert path.read_text() == "older"


@pytest.mark.usefixtures("tiny")
@pytest.mark.quick
def test_no_parity_shows_no_speedup_and_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(work: Workload) -> Variant:
        variant = PROVIDERS["reference"].build(work)
        inner = variant.step

        def step(inputs: Inputs) -> Tensor:
            return inner(inputs) * 1.001

        return replace(variant, step=step)

    add_provider(monkeypatch, "ditfast-wrong", build)
    path = tmp_path / "r.json"
    arguments = ("--model", "DiT-S/8", "--batch", 1, "--providers", "reference,ditfast-wrong", "--json", path, *QUICK)
    result = bench(*arguments)
    assert result.exit_code == 1, result.output
    [line] = [line for line in result.stdout.splitlines() if line.strip().startswith("ditfast-wrong")]
    assert ("✗" in line or "NO" in line) and "x" not in line.replace("ditfast-wrong", "")
    assert "ditfast-wrong: parity failed: output: error" in result.stdout
    assert Results.load(path).rows[1].speedup is None

    compared = bench(*arguments, "--compare", path)  # the older file is read before it is replaced
    assert compared.exit_code == 1
    assert f"against {path}" in compared.stdout
    assert "then, ms" in compared.stdout


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("mode", ["cfg", "train"])
def test_other_modes_dtypes_and_sizes(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    arguments = ("--model", "DiT-S/8", "--batch", 2, "--providers", "reference,ditfast", "--json", path, "--mode", mode)
    result = bench(*arguments, "--dtype", "bf16", "--image-size", "128x256", "--conditioning", "adaln", *QUICK)
    assert result.exit_code == 0, result.output
    for row in Results.load(path).rows:
        assert (row.mode, row.dtype, row.latent_size, row.conditioning) == (mode, "bf16", (16, 32), "adaln")
        assert row.parity is True


def test_defaults() -> None:
    cpu, gpu = defaults(torch.device("cpu")), defaults(torch.device("cuda"))
    assert cpu.models == ("DiT-S/8", "DiT-S/4")
    everything = defaults(torch.device("cuda"), full=True)
    assert gpu.models == ("DiT-XL/2",) and gpu.batches == (1, 256)
    assert set(everything.models) == set(MODELS) and len(everything.models) == 12
    assert (everything.batches, everything.modes) == ((1, 8, 32, 128, 256), MODES)
    assert set(gpu.providers) == set(everything.providers) == set(PROVIDERS)
    assert set(cpu.providers) < set(gpu.providers)


def test_everything_is_all_sizes_and_the_smallest_patches_at_512_px(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = replace(defaults(torch.device("cuda"), full=True), dtype=torch.float32)
    monkeypatch.setattr("ditfast.bench.cases.case.defaults", lambda device, full: everything)
    plan = models_command.make_plan((), (), (), (), None, "cpu", (), "adaln_zero", None, "auto", (), full=True)
    models = [(case.config.name, case.config.latent_hw) for case in plan.cases]
    assert len(plan.cases) == 16 * 4 * 5 == len(set(plan.cases))
    assert {name for name, size in models if size == (32, 32)} == set(MODELS)
    assert {name for name, size in models if size == (64, 64)} == {f"DiT-{size}/2" for size in ("S", "B", "L", "XL")}
    assert set(plan.settings["modes"]) == set(MODES)


@pytest.mark.parametrize("batches", [None, [1]])
def test_only_the_default_run_stops_compiling_in_time(
    batches: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_command, "_COMPILE_UNTIL", -1.0)
    plan = models_command.make_plan(
        (), batches or (), (), (), None, "cpu", (), "adaln_zero", None, "auto", (), full=False
    )
    reasons = {p.name: p.unavailable(plan.cases[0], plan.device) or "" for p in plan.providers}
    assert reasons["reference"] == reasons["ditfast"] == ""
    assert ("stays under two minutes" in reasons["reference-compile"]) == (batches is None)
    # what the default leaves out is listed with the reason
    assert plan.settings["providers_left_out"]["reference-tf32"] == "needs a CUDA GPU"
    reason = diffusers_dit.missing() or "--providers diffusers runs it"
    assert reason in plan.settings["providers_left_out"]["diffusers"]


def test_parsing() -> None:
    assert parse_dtype("torch.bfloat16") is parse_dtype("bf16") is torch.bfloat16
    assert parse_image_size("256") == (256, 256)
    assert parse_image_size("256x512") == (256, 512)


def test_inputs_are_random_and_rotate() -> None:
    case = Case(TINY, 2, torch.bfloat16, "cfg")
    pool = make_pool(case, torch.device("cpu"), weight_bytes=100 << 20, seed=0)
    assert len(pool) == 3  # two reads of 100 MiB lie between two uses of an input
    assert len(make_pool(case, torch.device("cpu"), weight_bytes=1, seed=0)) > 3
    x, t, y = pool[0]
    assert (x.shape, t.shape, y.shape) == ((4, 4, 32, 32), (4,), (2,))
    assert torch.equal(x[:2], x[2:]) and torch.equal(t[:2], t[2:])
    assert all(bool((inputs[0] != 0).float().mean() > 0.9) for inputs in pool)
    assert not torch.equal(pool[0][0], pool[1][0])
    x0, _, _, noise = make_inputs(Case(TINY, 2, torch.float32, "train"), torch.device("cpu"), 0)
    assert not torch.equal(x0, noise)


@pytest.mark.usefixtures("tiny")
def test_table_of_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(work: Workload) -> Variant:
        if work.case.batch == 2:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return PROVIDERS["reference"].build(work)

    add_provider(monkeypatch, "greedy", build)
    path = tmp_path / "r.json"
    arguments = ("--batch", 1, "--batch", 2, "--providers", "greedy,ditfast-graph,ditfast", "--json", path, *QUICK)
    result = bench("--model", "DiT-S/8", *arguments)
    assert result.exit_code == 0, result.output
    assert "out of memory" in result.stdout
    assert "greedy: the largest measured batch that fits is 1" in result.stdout
    assert "Not measured: ditfast-graph: needs a CUDA GPU" in result.stdout
    assert result.stdout.count("ditfast-graph") == 1  # once, not in every case
    capsys.readouterr()
    print_tables(results_table(Results.load(path), ascii_only=True))
    printed = capsys.readouterr().out
    assert "+-" in printed and "yes" in printed and "✓" not in printed


def test_the_command_loads_without_torch() -> None:
    code = "import sys, ditfast.bench.command; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.compiler
def test_compiled_reference_runs_with_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditfast.config.MODELS", {**MODELS, "DiT-S/8": replace(TINY, depth=1)})
    path = tmp_path / "r.json"
    result = bench("--model", "DiT-S/8", "--batch", 2, "--providers", "reference-compile", "--json", path, *QUICK)
    assert result.exit_code == 0, result.output
    [row] = Results.load(path).rows
    assert (row.status, row.parity) == ("ok", True)
    assert row.first_call_ms is not None and row.ms is not None and row.first_call_ms > row.ms.median


def test_compiling_without_a_compiler_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditfast.bench.cases import transforms

    monkeypatch.setenv("CXX", "no-such-compiler")
    transforms._no_compiler.cache_clear()
    try:
        result = bench("--model", "DiT-S/8", "--device", "cpu", "--providers", "reference-compile")
    finally:
        transforms._no_compiler.cache_clear()
    assert result.exit_code == 2
    assert "needs a C++ compiler, and there is no no-such-compiler" in result.stderr
