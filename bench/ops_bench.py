"""``ditfast bench ops``: each operator forward and backward beside eager PyTorch and torch.compile.

Memory-bound operators are held against the measured copy bandwidth by the bytes they must move (each input read
once, each output written once), the others against the measured matmul by their FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch._functorch import config as functorch_config

from .ceilings import Ceilings
from .operators import OPERATORS, Operator, Shape, check, draw_inputs
from .timing import Spread, measure
from .transforms import compile_unavailable

SCHEMA = "ditfast.bench.ops/1"
Direction = Literal["forward", "backward"]

# tensors of (B, T, D) that must be read and written: forward, backward with every gradient
_UNITS = {
    "layer_norm_modulate": (2, 3),
    "gated_residual": (3, 3),
    "gated_residual_layer_norm_modulate": (4, 6),
}
# those on (B, D) vectors are one short launch, with no ceiling to be held against
MEASURED = tuple(name for name in OPERATORS if name not in ("conditioning", "timestep_embedding"))
_POOL_BYTES = 256 << 20  # rotated inputs, past any L2


@dataclass(frozen=True)
class OpRow:
    """One provider of one operator; ``rate`` is GB/s or TFLOP/s, ``share`` its part of the measured ceiling."""

    operator: str
    direction: Direction
    batch: int
    tokens: int
    width: int
    dtype: str
    provider: str
    ms: Spread | None
    rate: float | None
    unit: Literal["GB/s", "TFLOP/s"]
    share: float | None
    parity: bool | None
    speedup: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_operator(
    operator: Operator,
    direction: Direction,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
) -> list[OpRow]:
    """Rows of eager, torch.compile and ditfast, timed side by side; speed-ups only beside a parity tick."""
    label = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    functions: dict[str, Callable[..., Any]] = {"eager": operator.formula, "ditfast": operator.fused}
    notes = {}
    reason = compile_unavailable(device)
    if reason is None:
        functions["compile"] = torch.compile(operator.formula, fullgraph=True, dynamic=False)
    else:
        notes["compile"] = reason
    parity = {
        name: _parity(replace(operator, fused=function), shape, dtype, device) for name, function in functions.items()
    }
    pool = _pool(operator, shape, dtype, device)
    calls = {name: _call(function, operator, shape, pool, direction) for name, function in functions.items()}
    measured = measure(calls, device, seconds)
    notes |= {name: f"{type(error).__name__}: {error}"[:200] for name, error in measured.failures.items()}
    amount, unit = work(operator.name, direction, shape, dtype.itemsize)
    peak = ceilings.copy_gb_per_s if unit == "GB/s" else ceilings.matmul_tflops.get(label)
    rows = []
    for name in ("eager", "compile", "ditfast"):
        spread = measured.times.get(name)
        rate = amount / spread.median / (1e6 if unit == "GB/s" else 1e9) if spread else None
        rows.append(
            OpRow(
                operator.name,
                direction,
                shape.batch,
                shape.tokens,
                shape.width,
                label,
                name,
                spread,
                rate,
                unit,
                rate / peak if rate is not None and peak else None,
                parity.get(name),
                note=notes.get(name, ""),
            )
        )
    return with_speedup(rows)


def with_speedup(rows: Sequence[OpRow]) -> list[OpRow]:
    """Ours over the fastest other, where ours has its tick."""
    rivals = [row.ms.median for row in rows if row.provider != "ditfast" and row.ms is not None]
    return [
        replace(row, speedup=min(rivals) / row.ms.median)
        if row.provider == "ditfast" and row.parity and row.ms is not None and rivals
        else row
        for row in rows
    ]


def work(
    operator: str, direction: Direction, shape: Shape, itemsize: int
) -> tuple[float, Literal["GB/s", "TFLOP/s"]]:
    """(bytes that must move, "GB/s") of a memory-bound operator, or (FLOPs, "TFLOP/s")."""
    tokens = shape.batch * shape.tokens
    if operator in _UNITS:
        return _UNITS[operator][direction == "backward"] * tokens * shape.width * itemsize, "GB/s"
    gemm = 2 * tokens * shape.width * 2 * shape.width  # the harness' Linears widen by 2
    flops = {"linear_gelu": gemm, "linear_gated_residual": gemm, "gelu_mlp": 2 * gemm}.get(operator)
    if flops is None:
        flops = 4 * tokens * shape.tokens * shape.width
        return flops * (2.5 if direction == "backward" else 1), "TFLOP/s"
    return flops * (2 if direction == "backward" else 1), "TFLOP/s"


def _parity(operator: Operator, shape: Shape, dtype: torch.dtype, device: torch.device) -> bool | None:
    """The numerics rule on the very shape that is timed: launch configurations depend on it."""
    try:
        verdicts = check(operator, shape, dtype, device)
    except Exception:  # a failing rival has its row, with the note of its timing
        return None
    return all(verdict.ok for verdict in verdicts.values())


def _pool(operator: Operator, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[dict[str, Tensor]]:
    first = draw_inputs(operator, shape, dtype, device)
    size = sum(value.nbytes for value in first.values())
    limit = _POOL_BYTES if device.type == "cuda" else _POOL_BYTES // 8
    count = min(max(2, math.ceil(limit / max(size, 1))), 16)
    return [first, *(draw_inputs(operator, shape, dtype, device, seed=seed) for seed in range(1, count))]


def _call(
    function: Callable[..., Any], operator: Operator, shape: Shape, pool: list[dict[str, Tensor]], direction: Direction
) -> Callable[[int], object]:
    options = operator.options(shape)
    if direction == "forward":

        def forward(number: int) -> object:
            with torch.no_grad():
                return function(**pool[number % len(pool)], **options)

        return forward
    graphs: dict[int, tuple[Any, list[Tensor], list[Tensor]]] = {}

    def backward(number: int) -> object:
        index = number % len(pool)
        if index not in graphs:  # the forward is not part of the question
            wanted = operator.differentiable(pool[index])
            leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in pool[index].items()}
            outputs = function(**leaves, **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            inputs = [leaves[name] for name in wanted]
            graphs[index] = outputs, inputs, [torch.randn_like(output) for output in outputs]
        outputs, inputs, incoming = graphs[index]
        return torch.autograd.grad(outputs, inputs, incoming, retain_graph=True)

    return backward


def run_all(
    names: Sequence[str],
    directions: Sequence[Direction],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
) -> Iterator[list[OpRow]]:
    """The rows of one operator, direction and shape after another."""
    for name in names:
        for shape in shapes:
            for direction in directions:
                # a compiled backward that donates its buffers runs only once
                with functorch_config.patch(donated_buffer=False):
                    yield run_operator(OPERATORS[name], direction, shape, dtype, device, ceilings, seconds)
                torch.compiler.reset()


def to_json(rows: Sequence[OpRow], ceilings: Ceilings, environment: dict[str, Any]) -> dict[str, Any]:
    """The results with the conditions they were measured under."""
    return {
        "schema": SCHEMA,
        "environment": environment,
        "ceilings": asdict(ceilings),
        "rows": [row.to_dict() for row in rows],
    }


def render(rows: Sequence[OpRow], ceilings: Ceilings) -> Group:
    """The table of ``ditfast bench ops``, and what could not be measured and why."""
    limits = ", ".join(f"{name} matmul {rate:.3g} TFLOP/s" for name, rate in ceilings.matmul_tflops.items())
    title = f"Operators; limits measured in this run: copy {ceilings.copy_gb_per_s:.4g} GB/s, {limits}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("operator", "direction", "B x T x D", "dtype", "provider"):
        table.add_column(header, no_wrap=True)
    for header in ("ms", "quartiles", "rate", "of limit", "parity", "speed-up"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        times = ("-", "-") if row.ms is None else (f"{row.ms.median:.4g}", f"{row.ms.p25:.4g}-{row.ms.p75:.4g}")
        table.add_row(
            row.operator,
            row.direction,
            f"{row.batch} x {row.tokens} x {row.width}",
            row.dtype,
            row.provider,
            *times,
            "-" if row.rate is None else f"{row.rate:.4g} {row.unit}",
            "-" if row.share is None else f"{row.share:.0%}",
            {True: "✓", False: "✗", None: "-"}[row.parity],
            "-" if row.speedup is None else f"{row.speedup:.2f}x",
        )
    notes = dict.fromkeys(f"{row.provider}: {row.note}" for row in rows if row.note)
    return Group(table, Text("\n".join(notes)))
