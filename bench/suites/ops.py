"""The rows of ``ditfast bench ops``: each operator forward and backward beside eager PyTorch and torch.compile.

On a GPU whole rounds over the rotated inputs are captured in a CUDA graph and replayed: the question is the kernels,
not the host that launches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from ...testing.operators import OPERATORS, Operator, Shape, check, draw_inputs, work
from ...testing.units import Direction
from ..cases import attention
from ..cases.case import dtype_name
from ..cases.transforms import captured, compile_unavailable
from ..measure.preparing import clear, explain, failed
from ..measure.timing import AGAIN, Call, Sampler, measure, noise, sampler, with_repeat
from ..records.files import Ceilings
from ..records.metrics import with_speedups
from ..records.rows import OpRow, is_ours

# those on (B, D) vectors are one short launch, with no ceiling to be held against
MEASURED = tuple(name for name in OPERATORS if name not in ("conditioning", "timestep_embedding"))
PROVIDERS = ("eager", "compile", "max-autotune", "gemm", *attention.PROVIDERS, "ditfast")
#: whose epilogue is held against the library's GEMM alone, the provider "gemm": a yardstick, no rival
EPILOGUES = ("linear_gelu", "linear_gated_residual")
_COMPILE_MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_POOL_BYTES = 256 << 20  # rotated inputs, past any L2
_POOL_BYTES_CPU = 64 << 20
_MAX_POOL = 192


def run_operator(
    operator: Operator,
    direction: Direction,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    chosen: Sequence[str] = PROVIDERS,
    save: Callable[[list[OpRow]], None] | None = None,
) -> list[OpRow]:
    """Rows of eager, torch.compile and ditfast, timed side by side; without shares (see :func:`with_op_shares`).

    On CUDA torch.compile also with max-autotune, and of attention each implementation; for a forward of EPILOGUES the
    library's GEMM alone besides.

    Args:
        chosen: those of PROVIDERS that may have a row.
        save: handed our rows, timed without a rival, before the rivals are compiled.
    """
    names = [name for name in providers(operator.name, direction, device) if name in chosen]
    rows = {name: blank_row(operator.name, direction, shape, dtype, name) for name in names}
    functions: dict[str, Callable[..., Any]] = {"ditfast": operator.fused, "eager": operator.formula}
    functions["gemm"] = _gemm_alone
    functions |= {name: attention.implementation(name) for name in names if name in attention.PROVIDERS}
    functions = {name: function for name, function in functions.items() if name in names}
    reason = compile_unavailable(device)
    for name in _COMPILE_MODES.keys() & set(names):
        if reason is None:
            compiled = torch.compile(operator.formula, fullgraph=True, dynamic=False, mode=_COMPILE_MODES[name])
            functions[name] = compiled
        else:
            rows[name] = replace(rows[name], status="unavailable", note=reason)
    try:
        pool = _pool(operator, shape, dtype, device)
    except Exception as error:  # nobody can run without inputs
        return [row if row.note else failed(row, error) for row in rows.values()]
    try:
        case = _Case(operator, direction, shape, dtype, device, seconds, pool)
        ours = {name: function for name, function in functions.items() if is_ours(name)}
        # a compiled backward that donates its buffers runs only once
        with functorch_config.patch(donated_buffer=False):
            if save is not None and ours and len(ours) < len(functions):
                rows = _measure(case, ours, rows)
                save(_rated(rows, ours))
            rows = _measure(case, functions, rows)
    finally:
        clear(device)
    return _rated(rows, rows)


def _rated(rows: dict[str, OpRow], names: Iterable[str]) -> list[OpRow]:
    """The rows of these names with their speed-ups, in the order of PROVIDERS; the yardstick is no rival."""
    rated = {row.provider: row for row in with_speedups([row for name, row in rows.items() if name != "gemm"])}
    return sorted(((rows | rated)[name] for name in names), key=_position)


def providers(operator: str, direction: Direction, device: torch.device) -> tuple[str, ...]:
    """Those that have a row in a case."""
    left_out = set() if device.type == "cuda" else {"max-autotune", *attention.PROVIDERS}
    if not attention.is_attention(operator):
        left_out |= set(attention.PROVIDERS)
    if operator not in EPILOGUES or direction == "backward":
        left_out.add("gemm")
    return tuple(name for name in PROVIDERS if name not in left_out)


def _position(row: OpRow) -> int:
    return PROVIDERS.index(row.provider)


def shapes_of(operator: str, shapes: Sequence[Shape] | None, default: Sequence[Shape]) -> Sequence[Shape]:
    """The shapes asked for; else attention's own, and the models' for the others."""
    return shapes or (attention.SHAPES if operator == "self_attention" else default)


def _gemm_alone(x: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def blank_row(operator: str, direction: Direction, shape: Shape, dtype: torch.dtype, provider: str) -> OpRow:
    """The row before anything is known."""
    least = work(operator, direction, shape, dtype.itemsize)
    return OpRow(
        operator=operator,
        direction=direction,
        batch=shape.batch,
        tokens=shape.tokens,
        width=shape.width,
        dtype=dtype_name(dtype),
        provider=provider,
        status="error",
        timed="calls",
        flops=least.flops,
        bytes=least.bytes,
        unit=least.unit,
        num_heads=shape.num_heads if attention.is_attention(operator) else None,
    )


def with_op_shares(rows: Sequence[OpRow], ceilings: Ceilings) -> list[OpRow]:
    """The rows with ``share``: of the copy bandwidth, or of the matmul in their dtype where that was measured."""

    def share(row: OpRow) -> float | None:
        peak = ceilings.copy_gb_per_s if row.unit == "GB/s" else ceilings.matmul_tflops.get(row.dtype)
        return None if row.rate is None or peak is None else row.rate / peak

    return [replace(row, share=share(row)) for row in rows]


@dataclass(frozen=True)
class _Case:
    """What the providers of a case are measured on; ``pool``: the inputs that rotate."""

    operator: Operator
    direction: Direction
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    seconds: float
    pool: list[dict[str, Tensor]]


def _measure(case: _Case, functions: dict[str, Callable[..., Any]], rows: dict[str, OpRow]) -> dict[str, OpRow]:
    """The rows with times, ticks and failures of these functions, timed side by side."""
    rows, pool, shape, dtype = dict(rows), case.pool, case.shape, case.dtype
    makers: dict[str, Callable[[], Call]] = {}
    for name, function in functions.items():
        if name in attention.PROVIDERS:
            inputs, backward = pool[0], case.direction == "backward"
            reason = attention.unavailable(name, inputs["qkv"], shape.num_heads, inputs.get("bias"), backward)
            if reason is not None:
                rows[name] = replace(rows[name], status="unavailable", note=reason)
                continue
        try:
            # on the very shape that is timed: launch configurations depend on it
            # and the implementation on whether gradients are wanted
            if name != "gemm" and rows[name].parity is None:
                judged, gradients = replace(case.operator, fused=function), _gradients(case.direction)
                verdicts = check(judged, shape, dtype, case.device, wanted=gradients)
                parity = all(verdict.ok for verdict in verdicts.values())
                rows[name] = replace(rows[name], parity=parity, note="" if parity else _failing(verdicts))
            maker = partial(_call, function, case.operator, shape, pool, case.direction)
            maker()(0)
            makers[name] = maker
        except Exception as error:  # a provider's failure is its row
            rows[name] = failed(rows[name], error)
    samplers, timed, reason = _samplers(makers, len(pool), case.device)
    repeated = "eager" if "eager" in samplers else next(iter(samplers), None)
    if repeated is not None:
        samplers = with_repeat(samplers, repeated)
    measured = measure(samplers, case.device, case.seconds)
    second = measured.times.pop(f"{repeated}{AGAIN}", None)
    share = noise(measured.times[repeated], second) if repeated in measured.times and second else None
    for name, failure in measured.failures.items():
        if name in rows:
            rows[name] = failed(rows[name], failure)
    least = work(case.operator.name, case.direction, shape, dtype.itemsize)
    for name, spread in measured.times.items():
        rate = least.rate(spread.median)
        notes = [note for note in dict.fromkeys((*rows[name].note.split("; "), reason)) if note]
        row = replace(rows[name], status="ok", ms=spread, rate=rate, timed=timed, noise=share)
        rows[name] = replace(row, note="; ".join(notes))
    return rows


def launch_once(
    operator: Operator, direction: Direction, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    """What :func:`run_operator` launches of ours, once and untimed: the judged call, and the timed one."""
    functions = {"ditfast": operator.fused}
    if attention.is_attention(operator.name):
        functions["ditfast-triton"] = attention.implementation("ditfast-triton")
    for function in functions.values():
        check(replace(operator, fused=function), shape, dtype, device, wanted=_gradients(direction))
        _call(function, operator, shape, [draw_inputs(operator, shape, dtype, device)], direction)(0)


def _gradients(direction: Direction) -> tuple[str, ...] | None:
    return () if direction == "forward" else None


def _failing(verdicts: dict[str, Any]) -> str:
    name, worst = max(verdicts.items(), key=lambda item: item[1].error / max(item[1].bound, 1e-300))
    return f"parity failed: {name}: error {worst.error:.2e} is above the bound {worst.bound:.2e}"


def _samplers(
    makers: dict[str, Callable[[], Call]], count: int, device: torch.device
) -> tuple[dict[str, Sampler], Literal["graph", "calls"], str]:
    """(samplers, how they time, why not by graphs): all by graphs or none, so that rows can be compared."""
    plain = {name: sampler(make(), device) for name, make in makers.items()}
    if device.type != "cuda":
        return plain, "calls", ""
    graphs = {}
    for name, make in makers.items():
        try:
            # a call of its own: a backward belongs to the stream of its forward, which must be the captured one
            graphs[name] = _per_call(sampler(_replay(captured(make(), count)), device), count)
        except Exception as error:  # whatever the capture forbids
            return plain, "calls", f"with launches: {name} cannot be captured ({explain(error)[1]})"
    return graphs, "graph", ""


def _replay(replay: Callable[[], object]) -> Call:
    return lambda number: replay()


def _per_call(rounds: Sampler, count: int) -> Sampler:
    """A sampler of calls from one of rounds of ``count``: as many whole rounds as come closest."""

    def sample(calls: int) -> float:
        whole = max(1, round(calls / count))
        return rounds(whole) / (whole * count) * calls

    return sample


def _pool(operator: Operator, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[dict[str, Tensor]]:
    first = draw_inputs(operator, shape, dtype, device)
    size = sum(value.nbytes for value in first.values())
    limit = _POOL_BYTES if device.type == "cuda" else _POOL_BYTES_CPU
    count = min(max(2, math.ceil(limit / max(size, 1))), _MAX_POOL)
    return [first, *(draw_inputs(operator, shape, dtype, device, seed=seed) for seed in range(1, count))]


def _call(
    function: Callable[..., Any], operator: Operator, shape: Shape, pool: list[dict[str, Tensor]], direction: Direction
) -> Call:
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
