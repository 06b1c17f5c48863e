"""What ``ditfast tune`` knows of the operators: the plan, the keys, and each candidate against fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ditfast
from ditfast import DiTConfig, ops
from ditfast.reference import ops as formulas
from ditfast.testing.inputs import random_batch, randomize_
from ditfast.testing.operators import OPERATORS, Inputs, Shape, draw_inputs

pytest.importorskip("triton")
from ditfast.bench.tune import attention as tune_attention  # noqa: E402
from ditfast.bench.tune import linear as tune_linear  # noqa: E402
from ditfast.bench.tune import measure, spaces  # noqa: E402
from ditfast.bench.tune import plan as tuning  # noqa: E402
from ditfast.bench.tune import table as tune_table  # noqa: E402
from ditfast.bench.tune.adaln import AdaLNBackward, AdaLNForward  # noqa: E402
from ditfast.bench.tune.attention import AttentionChoice, Choice  # noqa: E402
from ditfast.bench.tune.family import Family, Results, Target  # noqa: E402
from ditfast.bench.tune.measure import Task  # noqa: E402
from ditfast.kernels import launch, linear
from ditfast.kernels.configs import attention, gemm, tables  # noqa: E402
from ditfast.kernels.configs import rows as row_config
from ditfast.kernels.configs.gemm import GemmConfig  # noqa: E402
from ditfast.kernels.configs.rows import RowConfig  # noqa: E402
from ditfast.ops.attention_implementations import Case, choose  # noqa: E402
from tests.tune.made_up import BRIEF, GPU, new_table, pretend  # noqa: E402

CPU = torch.device("cpu")
CHOICES = ("attention_inference", "attention_training")
SMALL = DiTConfig(depth=1, hidden_size=72, num_heads=3, latent_size=(4, 4))


@pytest.fixture
def h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which an H200's table is looked up."""
    pretend(monkeypatch, tmp_path)
    tune_table.refresh()
    yield tmp_path
    tune_table.refresh()


def families() -> list[Family[Any]]:
    return [family for group in tuning.FAMILIES for family in group]


def everything(dtypes: tuple[torch.dtype, ...]) -> list[Task]:
    return tuning.plan(dict(ditfast.MODELS), dtypes)


def test_every_operator_of_the_tables_is_tuned() -> None:
    assert sorted(family.operator for family in families()) == sorted(tables.OPERATORS)


@pytest.mark.quick
def test_the_plan_is_in_order_of_value() -> None:
    names = ("DiT-S/2", "DiT-XL/2")
    tasks = tuning.plan({name: DiTConfig.named(name) for name in names}, [torch.bfloat16])
    keys = [item.key for item in tasks]
    assert len(set(keys)) == len(keys)
    assert keys[:5] == [
        "linear_gelu/bfloat16/4608/1152/65536",
        "linear_gelu_save/bfloat16/4608/1152/65536",
        "linear_gelu_backward/bfloat16/4608/1152/65536",
        "adaln_fwd/bfloat16/1152/256",
        "adaln_bwd/bfloat16/1152/256",
    ]
    assert [item.shape.batch for item in tasks if item.key.startswith("linear_gelu/")] == 2 * list(tuning.BATCHES)
    assert sorted(tuning.BATCHES) == [2**power for power in range(9)]
    models = [item.model for item in tasks if not item.family.operator.startswith("linear_gated")]
    assert models == sorted(models, reverse=True)  # XL before S
    # models of other patch sizes run the same matrices at other batches
    tasks_of_both = tuning.plan({name: DiTConfig.named(name) for name in ("DiT-XL/2", "DiT-XL/4")}, [torch.bfloat16])
    shared = {item.key for item in tasks_of_both if item.model == "DiT-XL/4"}
    assert "linear_gelu/bfloat16/4608/1152/64" in shared and "linear_gelu/bfloat16/4608/1152/256" not in shared


@pytest.mark.quick
@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_every_candidate_may_stand_in_a_table(arch: str) -> None:
    target = tuning.ARCHITECTURES[arch]
    for item in everything((torch.bfloat16, torch.float32)):
        candidates = item.family.candidates(item.shape, item.dtype, target)
        configs = list(candidates.values())
        assert configs[0] == item.family.heuristic(item.shape, item.dtype, target)
        assert len(set(configs)) == len(configs) > 1, item.key
        for config in configs:
            assert tables._wrong(item.key, item.family.fields(config)) == "", (item.key, config)
        tiles = [config for config in configs if isinstance(config, GemmConfig) and config.candidate == "triton"]
        assert not any(tile.tma for tile in tiles) or target.major >= 9
        # what takes the place of TMA where a matrix cannot be described to it
        assert {tile.block_m for tile in tiles if tile.tma} <= {tile.block_m for tile, _ in gemm.PORTABLE}
        if item.family.operator == "linear_gelu_backward":
            rows = gemm.sum_rows(item.shape.batch * item.shape.tokens, item.dtype)
            assert {config.block_m for config in configs} == {rows}


def test_a_forwards_rows_are_left_to_the_batch() -> None:
    assert AdaLNForward().fields(RowConfig(1024, 128, 8, 4)) == {"block": 1024, "tail": 128, "num_warps": 4}
    assert AdaLNBackward().fields(RowConfig(1024, 128, 8, 4))["rows"] == 8


@pytest.mark.kernels
def test_the_plan_holds_the_keys_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward and training, and of the operator that no model runs."""
    keys: set[str] = set()

    def spy(gpu: int | None, *sizes: Any) -> dict[str, Any]:
        keys.add(tables.table_key(*sizes))
        return {}

    ampere = launch.Gpu("NVIDIA A100", (8, 0), 108)
    monkeypatch.setattr(launch, "gpu", lambda index: ampere)
    monkeypatch.setattr(linear, "gpu", lambda index: ampere)
    for module in (row_config, gemm, attention):
        monkeypatch.setattr(module, "tuned", spy)
        monkeypatch.setattr(module, "gpu_index", lambda x: 0)
    tune_table.refresh()
    model = randomize_(ditfast.DiT(SMALL))
    inputs = random_batch(SMALL, 3)
    with ops.use_backend("triton"):
        with torch.no_grad():
            model(*inputs)
        model(*inputs).sum().backward()
        plans = [tuning.plan({"small": SMALL}, [torch.float32], (3,), [family]) for family in tuning.FAMILIES]
        groups = [{item.key for item in plan} for plan in plans]
        # the choices are looked up where no backend is demanded: tests/ops/test_attention_backends.py
        assert keys == {key for key in groups[0] if not key.startswith(CHOICES)}
        for ratio in (1, 4):
            shape = Shape(3, SMALL.num_tokens, SMALL.hidden_size, ratio=ratio)
            tensors = draw_inputs(OPERATORS["linear_gated_residual"], shape, torch.float32, "cpu")
            ops.linear_gated_residual(**tensors)
            ops.linear_gated_residual(**{name: value.requires_grad_() for name, value in tensors.items()})
    assert {key for key in keys if key.startswith("linear_gated_residual")} == groups[1]
    tune_table.refresh()


@pytest.mark.quick
def test_a_launcher_takes_the_written_entry(h200: Path) -> None:
    """For every operator, even if the heuristic's choice was looked up before in the same process."""
    table = new_table(tables.table_path(GPU.name))
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, get_device=lambda: 0)
    times = {"ms": 1.0, "heuristic_ms": 2.0, "noise": 0.01}
    for item in tuning.plan({"DiT-XL/2": DiTConfig.named("DiT-XL/2")}, [torch.bfloat16], (64,)):
        family, shape = item.family, item.shape

        def looked_up(family: Any = family, shape: Shape = shape) -> Any:
            if family.operator in CHOICES:
                case = Case(shape.tokens, 72, x.dtype, False, family.operator == CHOICES[1])
                return Choice(choose(case, 0))
            if family.operator.startswith("attention"):
                return attention._launch_config(family.operator, 72, shape.tokens, x.dtype, 0, False, True)
            if family.operator.startswith("adaln"):
                return row_config.row_config(family.operator, shape.width, shape.tokens, shape.batch, x)
            if family.operator == "modulations":
                return gemm.modulations_config(*family.sizes(shape), x, x.dtype, x.dtype, False)
            return gemm.gemm_config(family.operator, *family.sizes(shape), x, False)

        heuristic, *others = family.candidates(shape, torch.bfloat16, GPU).values()
        assert looked_up() == heuristic
        for config in others:
            table.add(item.key, family.fields(config), times, family.describe(shape))
            choice = looked_up()
            assert family.fields(choice) == family.fields(config), item.key
            if getattr(config, "candidate", "triton") == "triton":
                assert choice == config


def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few inputs and candidates: the interpreter takes milliseconds for each program."""
    monkeypatch.setattr(measure, "_POOL_BYTES_CPU", 1)
    monkeypatch.setattr(spaces, "HOPPER", spaces.HOPPER[-4:])
    monkeypatch.setattr(spaces, "PORTABLE", spaces.PORTABLE[-2:])
    monkeypatch.setattr(spaces, "MODULATIONS", spaces.MODULATIONS[:2])
    monkeypatch.setattr(spaces, "ATTENTION", {name: [(16, 16, 4, 1)] for name in spaces.ATTENTION})


@pytest.mark.kernels
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long), torch.float32],
    ids=["bf16", "fp16", "fp32"],
)
def test_every_operators_candidates_are_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    groups = [[replace(f, batch=2) if hasattr(f, "batch") else f for f in group] for group in tuning.FAMILIES]
    for item in tuning.plan({"small": SMALL}, [dtype], (3,), groups):
        with torch.no_grad(), item.family.conditions(dtype):
            contest = measure._Contest(item, GPU, CPU, None)
            right = contest.right()
        # on a CPU cuBLASLt's call is something else, whose GELU is the exact one, and SDPA lacks kernels
        wrong = set(contest.out) - {"cublaslt", "cudnn", "efficient", "flash"}
        assert not wrong, (item.key, contest.out)
        assert len(right) > 1


@pytest.mark.kernels
@pytest.mark.parametrize("operator", ["adaln_bwd", "linear_gelu_backward"])
def test_a_shape_is_measured_from_its_inputs_to_its_entry(
    operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch)
    [family] = [item for item in families() if item.operator == operator]
    if isinstance(family, AdaLNBackward):

        class Short(AdaLNBackward):
            def space(self, *arguments: Any) -> Iterator[RowConfig]:
                yield RowConfig(64, 0, 16, 1)  # leaves the row's end as it was
                yield RowConfig(128, 0, 8, 2)

        family = Short(batch=2)
    [item] = tuning.plan({"small": SMALL}, [torch.bfloat16], (1,), [[family]])
    table = new_table(tmp_path / "table.json")
    lines: list[str] = []
    assert tuning.run([item], GPU, CPU, table, lines.append, seconds=BRIEF) == (1, 0)
    assert list(tables.read_table(table.path)["entries"]) == [item.key]
    if operator == "adaln_bwd":
        assert "1 of 3 out, the first 64 lanes, 16 rows, 1 warp: wrong: " in lines[0]


@pytest.mark.kernels
@pytest.mark.parametrize("operator", [name for name in tables.OPERATORS if name.startswith("linear")])
def test_large_matrices_are_judged_by_their_ends(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows at either end, sums included, of the launch over the whole: right ones pass, a wrong one does not."""
    tiny(monkeypatch)
    monkeypatch.setattr(tune_linear, "_END_ROWS", 64)
    [family] = [item for item in families() if item.operator == operator]
    item = Task(family, Shape(4, 64, 16, ratio=4), torch.float32, "DiT")
    contest = measure._Contest(item, Target("an A100", 8, 108), CPU, None)
    with torch.no_grad():
        assert {len(value) for name, value in family.judged(contest.pool[0]).items() if name in ("x", "pre")} == {128}
        results = family.results(contest.configs["separate"], contest.pool[0])
        assert {len(value) for value in results.values() if value.ndim > 1} == {128}
        assert set(contest.right()) >= set(contest.configs) - {"cublaslt"}
        last = contest.pool[0]["d_out" if "d_out" in contest.pool[0] else "x"][-1]
        formula = family.formula

        def other(judged: Inputs) -> Results:
            return formula({name: value.clone() if len(value) == 128 else value for name, value in judged.items()})

        monkeypatch.setattr(type(family), "formula", lambda self, judged: other(judged))
        monkeypatch.setattr(type(family), "results", _after_changing(type(family).results, last))
        assert contest.right() == []


def _after_changing(results: Callable[..., Results], last: Tensor) -> Callable[..., Results]:
    def changed(self: Any, config: Any, inputs: Inputs) -> Results:
        before = last.clone()
        last.mul_(1.5)
        try:
            return results(self, config, inputs)
        finally:
            last.copy_(before)

    return changed


@pytest.mark.kernels
def test_a_backward_that_differs_from_run_to_run_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = itertools.cycle([1.0, 1.0 + torch.finfo(torch.float32).eps])

    def unsteady(backend: str, qkv: Tensor, num_heads: int) -> Tensor:
        if backend == "sdpa" and qkv.requires_grad:  # within rounding, as an order of additions is
            qkv = qkv * next(factors)
        return formulas.self_attention(qkv, num_heads)

    monkeypatch.setattr(tune_attention, "_run", unsteady)
    tiny(monkeypatch)
    for operator, out in zip(CHOICES, (set(), {"sdpa"}), strict=True):
        item = Task(AttentionChoice(operator), Shape(3, 16, 72, num_heads=3), torch.float32, "DiT")
        contest = measure._Contest(item, Target("an A100", 8, 108), CPU, None)
        with torch.no_grad():
            contest.right()
        assert set(contest.out) == out
        assert all("two runs differ" in reason for reason in contest.out.values())


@pytest.mark.kernels
@pytest.mark.parametrize("operator", [name for name in tables.OPERATORS if name.startswith("attention")])
def test_attention_is_judged_by_the_ends_of_a_batch(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    monkeypatch.setattr(tune_attention, "_END_SAMPLES", 1)
    [family] = [item for item in families() if item.operator == operator]
    item = Task(family, Shape(4, 16, 32, num_heads=2), torch.float32, "DiT")
    contest = measure._Contest(item, Target("an A100", 8, 108), CPU, None)
    with torch.no_grad():
        results = family.results(next(iter(contest.configs.values())), contest.pool[0])
        assert {len(value) for value in results.values() if value.ndim > 1} == {2}
        assert contest.right()
        monkeypatch.setattr(type(family), "results", _after_changing(type(family).results, contest.pool[0]["qkv"][-1]))
        assert contest.right() == []
