"""``ditfast bench ops``: hand-computed columns, the parity gate, failures, and the command."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ditfast.bench.cases import attention as ops_attention
from ditfast.bench.records.files import Ceilings, Results
from ditfast.bench.records.metrics import with_speedups
from ditfast.bench.records.rows import OpRow, Spread
from ditfast.bench.suites import ops as ops_bench
from ditfast.bench.suites.ops import blank_row, run_operator, with_op_shares
from ditfast.cli.command import app
from ditfast.ops import attention_implementations as backends
from ditfast.testing.operators import OPERATORS, Operator, Shape, Work, draw_inputs, work
from ditfast.testing.units import Direction

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_limits")
LIMITS = Ceilings(100.0, 1 << 20, {"fp32": 0.5}, {"fp32": 1024})
SHAPE = Shape(2, 5, 72)


def row(provider: str, ms: float, parity: bool | None = True) -> OpRow:
    blank = blank_row("gated_residual", "forward", Shape(2, 3, 4), torch.float32, provider)
    return replace(blank, status="ok", ms=Spread(ms, ms, ms, 5, 1), parity=parity)


def test_speedup_over_the_fastest_rival_beside_a_tick() -> None:
    rows = with_speedups([row("eager", 4.0), row("compile", 3.0, None), row("ditfast", 2.0)])
    assert [item.speedup for item in rows] == [None, None, 1.5]
    assert rows[2].rival == "compile"
    for parity in (False, None):
        assert with_speedups([row("eager", 4.0), row("ditfast", 2.0, parity)])[1].speedup is None
    assert with_speedups([row("ditfast", 2.0)])[0].speedup is None


def test_work_by_hand() -> None:
    shape = Shape(2, 3, 8, num_heads=2, ratio=4)  # 48 elements, vectors of 16; hidden 32: 192 elements, weights 256
    fused = "gated_residual_layer_norm_modulate"
    # r, branch in; r, norm out; gate, shift, scale
    assert work(fused, "forward", shape, 2) == Work(12 * 48, (4 * 48 + 3 * 16) * 2, "GB/s")
    # d_r, d_out, r, branch in; d_x, d_branch out; gate, scale in, three gradients out
    assert work(fused, "backward", shape, 2) == Work(24 * 48, (6 * 48 + 5 * 16) * 2, "GB/s")
    assert work("layer_norm_modulate", "backward", shape, 4).bytes == (3 * 48 + 3 * 16) * 4
    assert work("gated_residual", "forward", shape, 4).bytes == (3 * 48 + 16) * 4
    gemm = 2 * 6 * 8 * 32
    assert work("linear_gelu", "forward", shape, 2) == Work(gemm, (48 + 256 + 192) * 2, "TFLOP/s")
    assert work("linear_gelu", "backward", shape, 2) == Work(2 * gemm, (2 * (48 + 256) + 192) * 2, "TFLOP/s")
    assert work("linear_gated_residual", "forward", shape, 2) == Work(gemm, (192 + 256 + 96) * 2, "TFLOP/s")
    assert work("linear_gated_residual", "backward", shape, 2).bytes == (2 * (192 + 256) + 48) * 2
    assert work("gelu_mlp", "forward", shape, 2) == Work(2 * gemm, (96 + 512) * 2, "TFLOP/s")
    assert work("gelu_mlp", "backward", shape, 2) == Work(4 * gemm, (3 * 48 + 4 * 256) * 2, "TFLOP/s")
    attention = 4 * 2 * 3 * 3 * 8
    assert work("self_attention", "forward", shape, 2) == Work(attention, 4 * 48 * 2, "TFLOP/s")
    assert work("self_attention", "backward", shape, 2) == Work(attention * 5 // 2, 8 * 48 * 2, "TFLOP/s")
    assert work("self_attention+bias", "forward", shape, 2).bytes == (4 * 48 + 2 * 9) * 2
    assert set(ops_bench.MEASURED) == {name for name in OPERATORS if work_is_known(name)}


def work_is_known(name: str) -> bool:
    try:
        return work(name, "forward", SHAPE, 2).bytes > 0
    except KeyError:
        return False


def test_rates_and_shares_by_hand() -> None:
    assert Work(3 * 10**9, 0, "TFLOP/s").rate(6.0) == 0.5
    assert Work(0, 3 * 10**6, "GB/s").rate(6.0) == 0.5
    moved = replace(row("ditfast", 1.0), rate=25.0)
    computed = replace(moved, unit="TFLOP/s", rate=0.1)
    unknown = replace(computed, dtype="bf16")
    assert [item.share for item in with_op_shares([moved, computed, unknown], LIMITS)] == [0.25, 0.2, None]


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_bench, "compile_unavailable", lambda device: "left out here")


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.quick
def test_a_wrong_operator_gets_no_tick_and_no_speedup(direction: Direction) -> None:
    right = OPERATORS["gated_residual"]
    wrong = replace(right, fused=lambda residual, branch, gate: residual + branch * gate.unsqueeze(1) * 1.01)
    for operator, parity in ((right, True), (wrong, False)):
        eager, compiled, ours = run_operator(operator, direction, SHAPE, torch.float32, CPU, 0.01)
        assert (ours.status, ours.parity, ours.speedup is not None) == ("ok", parity, parity)
        assert ("parity failed: " in ours.note) != parity
        assert (compiled.status, compiled.ms, compiled.note) == ("unavailable", None, "left out here")
        assert eager.ms is not None
        assert eager.rate == pytest.approx(work("gated_residual", direction, SHAPE, 4).bytes / eager.ms.median / 1e6)
        assert eager.noise == ours.noise is not None
        assert (eager.timed, eager.tokens, eager.width) == ("calls", 5, 72)


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(("direction", "judged"), [("forward", [False]), ("backward", [True])])
def test_what_is_judged_is_what_is_timed(direction: Direction, judged: list[bool]) -> None:
    """Without gradients another implementation may run, so that is the one to judge where the forward is timed."""
    with_grad: list[bool] = []

    def spy(**inputs: Tensor) -> Any:
        with_grad.append(any(value.requires_grad for value in inputs.values()))
        return OPERATORS["linear_gelu"].formula(**inputs)

    run_operator(replace(OPERATORS["linear_gelu"], fused=spy), direction, SHAPE, torch.float32, CPU, 0.01)
    assert with_grad[:1] == judged
    assert len(set(with_grad)) == 1


@pytest.mark.usefixtures("no_compile")
def test_a_slow_operator_is_caught() -> None:
    """The same result for twenty times the work: parity holds, and the speed-up says what it costs."""
    right = OPERATORS["gated_residual"]

    def slow(residual: Tensor, branch: Tensor, gate: Tensor) -> Any:
        for _ in range(20):
            result = right.formula(residual, branch, gate)
        return result

    rows = run_operator(replace(right, fused=slow), "forward", Shape(8, 64, 384), torch.float32, CPU, 0.05)
    assert rows[2].parity is True
    assert rows[2].speedup is not None and rows[2].speedup < 0.5


@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("boom"), "error"), (torch.OutOfMemoryError("9 GiB"), "oom")]
)
def test_a_failing_operator_is_a_row_and_the_others_go_on(error: Exception, status: str) -> None:
    def fail(**inputs: Tensor) -> Tensor:
        raise error

    rows = run_operator(
        replace(OPERATORS["gated_residual"], fused=fail), "forward", SHAPE, torch.float32, CPU, 0.01
    )
    assert (rows[0].status, rows[2].status, rows[2].ms) == ("ok", status, None)
    assert str(error) in rows[2].note


@pytest.mark.usefixtures("no_compile")
def test_inputs_that_do_not_fit_fail_everybody() -> None:
    def draw(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("9 GiB")

    operator: Operator = replace(OPERATORS["gated_residual"], draw=draw)
    rows = run_operator(operator, "forward", SHAPE, torch.float32, CPU, 0.01)
    assert [item.status for item in rows] == ["oom", "unavailable", "oom"]


def test_timed_inputs_are_random_and_rotate() -> None:
    pool = ops_bench._pool(OPERATORS["gated_residual"], SHAPE, torch.float32, CPU)
    assert len(pool) == 192
    large = ops_bench._pool(OPERATORS["gated_residual"], Shape(4, 256, 1152), torch.float32, CPU)
    assert len(large) == 8  # of 9.4 MB each, past 64 MiB
    assert not torch.equal(pool[0]["residual"], pool[1]["residual"])
    assert all(float((inputs["branch"] != 0).float().mean()) > 0.9 for inputs in pool)
    wide = draw_inputs(OPERATORS["gelu_mlp"], replace(SHAPE, ratio=4), torch.float32, CPU)
    assert wide["w1"].shape == (288, 72)


def ops(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", "ops", "--device", "cpu", "--seconds", "0.02", *map(str, arguments)])


@pytest.mark.usefixtures("no_compile")
def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    small = ("--direction", "forward", "--batch", 1, "--width", 72, "--tokens", 5, "--json", path)
    result = ops("--operator", "gated_residual", *small)
    assert result.exit_code == 0, result.output
    assert "of the copy bandwidth" not in result.stderr and "GB/s over the copy bandwidth" in result.stdout
    results = Results.load(path, "ops")
    assert results.complete and results.ceilings is not None
    assert [item.provider for item in results.rows] == ["eager", "compile", "ditfast"]
    ours = results.rows[2]
    assert ours.parity is True and ours.share == pytest.approx(ours.rate / results.ceilings.copy_gb_per_s)
    assert [reading["when"] for reading in results.readings] == ["before", "after"]

    again = ops("--operator", "gated_residual", "--operator", "layer_norm_modulate", *small, "--continue")
    assert again.exit_code == 0, again.output
    assert "gated_residual, forward, B=1 T=5 D=72, fp32: measured before" in again.stderr
    both_runs = Results.load(path, "ops")
    assert (both_runs.parts, len(both_runs.rows)) == (2, 6)
    assert both_runs.rows[2].ms == ours.ms


@pytest.mark.usefixtures("no_compile")
def test_shapes_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Shape] = []

    def run(operator: Operator, direction: str, shape: Shape, *_: object) -> list[OpRow]:
        shapes.append(shape)
        return [replace(row("ditfast", 1.0), width=shape.width, tokens=shape.tokens)]

    monkeypatch.setattr(ops_bench, "run_operator", run)
    assert ops("--model", "DiT-XL/2", "--model", "DiT-B/4", "--operator", "gelu_mlp", "--batch", 3).exit_code == 0
    assert set(shapes) == {Shape(3, 256, 1152, 16, ratio=4, layers=29), Shape(3, 64, 768, 12, ratio=4, layers=13)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operator", "gated"], "--operator must be one of"),
        (["--operator", "gated_residua"], "did you mean 'gated_residual'?"),
        (["--model", "DiT-XXL/2"], "did you mean 'DiT-XL/2'?"),
        (["--tokens", 0], "--tokens must be at least 1, got 0"),
        (["--dtype", "fp8"], "dtype must be one of fp32, bf16, fp16, got 'fp8'"),
        (["--continue"], "--continue needs --json FILE"),
        (["--json", "/no/such/folder/x.json"], "--json must be a file in a folder that exists"),
    ],
)
def test_bad_arguments(arguments: list[object], message: str) -> None:
    result = ops(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


#: why a package of FlashAttention has no time: absent, not for this GPU, or not for these tensors
NO_PACKAGE = r"the package flash-attn\S* \(.+\) is not installed|the package .+ cannot be imported: .+"
NOT_FOR_THIS = r"it needs sm_\d+.*, the GPU is sm_\d+|it takes no additive bias"


def check_rivals(rows: dict[str, OpRow]) -> None:
    """Each rival has a time, or none and the reason."""
    for provider in ops_attention.PROVIDERS:
        item = rows[provider]
        assert item.status in ("ok", "unavailable"), item
        assert (item.ms is not None) == (item.status == "ok")
        if item.status == "unavailable" and provider.startswith("flash-attn"):
            assert re.fullmatch(f"{NO_PACKAGE}|{NOT_FOR_THIS}", item.note), item
        assert item.status == "ok" or item.note


@pytest.mark.kernels
@pytest.mark.usefixtures("no_compile")
@pytest.mark.parametrize("name", ["self_attention", "self_attention+bias"])
def test_missing_packages_have_rows_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's rows without FlashAttention's packages, on any machine."""
    for module in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)

    def reason(backend: backends.AttentionBackend, gpu: int | None) -> str | None:
        return backends.import_reason(backend) if backend in backends.PACKAGES else "it needs a CUDA GPU"

    providers = partial(ops_bench.providers, name, "forward", torch.device("cuda"))
    monkeypatch.setattr(backends, "machine_reason", reason)
    monkeypatch.setattr(ops_bench, "providers", lambda *_: providers())
    backends.import_reason.cache_clear()
    backends._function.cache_clear()
    device, shape = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Shape(1, 5, 24, num_heads=2)
    measured = run_operator(OPERATORS[name], "forward", shape, torch.float32, device, 0.01)
    rows = {row.provider: row for row in measured}
    backends.import_reason.cache_clear()
    assert tuple(rows) == providers()
    check_rivals(rows)
    packages = [provider for provider in rows if provider.startswith("flash-attn")]
    assert len(packages) == 3
    for provider in packages:
        assert rows[provider].status == "unavailable" and "is not installed" in rows[provider].note
        assert (rows[provider].parity, rows[provider].speedup) == (None, None)
    # and the others are measured beside them
    assert all(rows[provider].status == "ok" for provider in ("eager", "ditfast", "ditfast-triton"))
    assert rows["ditfast"].parity is True and rows["ditfast-triton"].parity is True


def test_cudnn_has_no_gradient_of_a_bias() -> None:
    qkv, bias = torch.randn(1, 5, 72), torch.randn(2, 5, 5)
    reason = "torch has no gradient of a bias for cuDNN's attention"
    assert ops_attention.unavailable("sdpa-cudnn", qkv, 2, bias, backward=True) == reason
    assert ops_attention.unavailable("sdpa-cudnn", qkv, 2, bias) == "it needs a CUDA GPU"
    assert ops_attention.unavailable("sdpa-cudnn", qkv, 2, backward=True) == "it needs a CUDA GPU"


@pytest.mark.gpu
@pytest.mark.usefixtures("no_compile")  # which takes minutes for all of them
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ops_bench.MEASURED)
def test_on_a_gpu_rounds_are_captured(name: str, direction: Direction) -> None:
    shape, gpu = Shape(2, 64, 384, num_heads=6, ratio=4), torch.device("cuda")
    rows = {row.provider: row for row in run_operator(OPERATORS[name], direction, shape, torch.bfloat16, gpu, 0.05)}
    assert tuple(rows) == ops_bench.providers(name, direction, gpu)
    assert {row.timed for row in rows.values() if row.status == "ok"} == {"graph"}
    if ops_attention.is_attention(name):
        check_rivals(rows)
    for provider in rows.keys() & {"eager", "gemm", "ditfast", "ditfast-triton"}:
        assert (rows[provider].status, rows[provider].note) == ("ok", "")
    assert rows["ditfast"].parity is True


@pytest.mark.gpu
def test_on_a_gpu_compiled_rounds_are_captured() -> None:
    shape, gpu = Shape(2, 64, 384), torch.device("cuda")
    rows = run_operator(OPERATORS["gated_residual"], "forward", shape, torch.bfloat16, gpu, 0.05)
    assert [row.provider for row in rows] == ["eager", "compile", "max-autotune", "ditfast"]
    assert {(row.status, row.timed, row.note) for row in rows} == {("ok", "graph", "")}


def test_a_round_is_divided_by_its_calls() -> None:
    run: list[int] = []

    def rounds(count: int) -> float:
        run.append(count)
        return 8.0 * count

    sampler: Callable[[int], float] = ops_bench._per_call(rounds, 4)
    assert sampler(3) == 6.0  # a round for three calls, of which it holds four
    assert sampler(10) == 20.0  # two rounds, not ten
    assert run == [1, 2]


@pytest.mark.usefixtures("no_compile")
def test_the_gemm_alone_is_a_yardstick() -> None:
    """It is neither judged nor a rival, however fast; a backward has none."""
    right = OPERATORS["linear_gelu"]
    rows = {row.provider: row for row in run_operator(right, "forward", SHAPE, torch.float32, CPU, 0.01)}
    assert list(rows) == ["eager", "compile", "gemm", "ditfast"]
    assert tuple(rows) == ops_bench.providers("linear_gelu", "forward", CPU)
    assert rows["gemm"].status == "ok" and rows["gemm"].ms is not None
    assert (rows["gemm"].parity, rows["gemm"].speedup) == (None, None)
    assert rows["ditfast"].rival == "eager"
    assert "gemm" not in ops_bench.providers("linear_gelu", "backward", CPU)
    assert "gemm" not in ops_bench.providers("gated_residual", "forward", CPU)
    assert "max-autotune" in ops_bench.providers("gated_residual", "forward", torch.device("cuda"))


ATTENTION = ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "flash-attn-2", "flash-attn-3", "flash-attn-4")


def test_attention_is_set_beside_every_implementation_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    for direction in ("forward", "backward"):
        names = ops_bench.providers("self_attention", direction, gpu)
        assert names == ("eager", "compile", "max-autotune", *ATTENTION, "ditfast-triton", "ditfast")
        assert ops_bench.providers("self_attention", direction, CPU) == ("eager", "compile", "ditfast")
    assert not set(ATTENTION) & set(ops_bench.providers("gelu_mlp", "forward", gpu))
    shapes = ops_bench.shapes_of("self_attention", None, [SHAPE])
    sizes = {(shape.batch, shape.tokens, shape.width // shape.num_heads) for shape in shapes}
    assert sizes == {(64, 256, 72), (16, 1024, 72), (4, 4096, 72), (64, 256, 64), (16, 1024, 64), (4, 4096, 64)}
    assert ops_bench.shapes_of("self_attention", [SHAPE], []) == ops_bench.shapes_of("gelu_mlp", None, [SHAPE])


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["self_attention", "self_attention+bias"])
def test_implementations_that_cannot_run_say_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU only this project's kernels run, in the interpreter."""
    monkeypatch.setattr(ops_bench, "providers", lambda *_: ("eager", *ops_attention.PROVIDERS, "ditfast"))
    monkeypatch.setattr(ops_bench, "_POOL_BYTES_CPU", 1)
    shape = Shape(1, 5, 72, num_heads=1)
    rows = {row.provider: row for row in run_operator(OPERATORS[name], "forward", shape, torch.float32, CPU, 1e-3)}
    assert list(rows) == ["eager", *ops_attention.PROVIDERS, "ditfast"]
    assert {(rows[name].status, rows[name].note) for name in ATTENTION} == {("unavailable", "it needs a CUDA GPU")}
    for provider in ("eager", "ditfast-triton", "ditfast"):
        assert (rows[provider].status, rows[provider].parity) == ("ok", True), rows[provider]
    assert rows["ditfast-triton"].rival == "eager"
    assert {row.size for row in rows.values()} == {"1 x 5 x 1 x 72"}


@pytest.mark.parametrize("provider", ATTENTION)
def test_a_rivals_backward_is_as_its_library_has_it(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {}

    def run(backend: str, *_: object, **options: bool) -> Tensor:
        calls[backend] = options
        return torch.zeros(1)

    monkeypatch.setattr(ops_attention.backends, "run_library", run)
    ops_attention.implementation(provider)(torch.zeros(1, 5, 216), num_heads=1)
    assert calls == {ops_attention.PROVIDERS[provider]: {"deterministic": False, "alone": True}}
