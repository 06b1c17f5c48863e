"""A user's own model before and after ``ditfast.accelerate``, timed side by side, with parity against fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ditfast

from ...parity import judge
from ...testing.inputs import randomize_
from ..cases.transforms import compile_unavailable
from ..measure.preparing import clear, explain
from ..measure.timing import AGAIN, measure, noise, sampler, with_repeat
from ..records.metrics import with_speedups
from ..records.rows import OwnMode, OwnRow

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ditfast.adapters.accelerate import Report


def before_after(
    model: nn.Module,
    inputs: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> tuple[Report, list[OwnRow]]:
    """(what was accelerated, rows of the forward and of training), on random parameters.

    Args:
        model: is copied, and left as it is.
        inputs: of its forward; tensors are moved, floating ones to ``dtype``.
        seconds: for each way in each mode.

    Raises:
        ValueError: nothing to accelerate, or no inputs.
    """
    if not inputs:
        raise ValueError("the factory must return (model, inputs) for a benchmark, got the model alone")
    slow = randomize_(copy.deepcopy(model)).to(device, dtype).eval()
    fast = copy.deepcopy(slow)
    report = ditfast.accelerate(fast)
    moved = tuple(_moved(value, device, dtype) for value in inputs)
    rows: list[OwnRow] = []
    modes: list[OwnMode] = ["forward", "train"]
    for mode in modes:
        rows += _rows(slow, fast, moved, mode, device, dtype, seconds)
        clear(device)
    return report, rows


def _rows(
    slow: nn.Module,
    fast: nn.Module,
    inputs: tuple[Any, ...],
    mode: OwnMode,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> list[OwnRow]:
    ways: dict[str, Callable[..., Any]] = {"before": slow, "ditfast": fast}
    rows = {name: OwnRow(name, mode, "error") for name in ("before", "before-compile", "ditfast")}
    reason = compile_unavailable(device)
    if reason is None:
        ways["before-compile"] = torch.compile(slow)
    else:
        rows["before-compile"] = replace(rows["before-compile"], status="unavailable", note=reason)
    calls = {name: _call(way, slow if name != "ditfast" else fast, inputs, mode) for name, way in ways.items()}
    running = {}
    for name, call in calls.items():
        try:
            call(0)
            running[name] = sampler(call, device)
        except Exception as error:  # a way's failure is its row
            status, note = explain(error)
            rows[name] = replace(rows[name], status=status, note=note)
    measured = measure(with_repeat(running, "before") if "before" in running else running, device, seconds)
    second = measured.times.pop("before" + AGAIN, None)
    share = noise(measured.times["before"], second) if second and "before" in measured.times else None
    for name, spread in measured.times.items():
        rows[name] = replace(rows[name], status="ok", ms=spread, noise=share)
    try:
        rows["ditfast"] = replace(rows["ditfast"], parity=_parity(slow, fast, inputs, mode, dtype))
    except Exception as error:  # no fp64 in the model's code, say
        rows["ditfast"] = replace(rows["ditfast"], note=f"parity not judged: {explain(error)[1]}")
    return with_speedups(rows.values())


def _call(way: Callable[..., Any], model: nn.Module, inputs: tuple[Any, ...], mode: OwnMode) -> Callable[[int], object]:
    def forward(_: int) -> object:
        with torch.no_grad():
            return way(*inputs)

    def train(_: int) -> object:
        loss = first_tensor(way(*inputs)).float().square().mean()
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    return forward if mode == "forward" else train


def _parity(slow: nn.Module, fast: nn.Module, inputs: tuple[Any, ...], mode: OwnMode, dtype: torch.dtype) -> bool:
    """Whether outputs, or every gradient for one random incoming gradient, keep the rule for models."""
    exact = copy.deepcopy(slow).double()
    runs = [(exact, tuple(_moved(value, None, torch.float64) for value in inputs)), (slow, inputs), (fast, inputs)]
    if mode == "forward":
        with torch.no_grad():
            oracle, yardstick, actual = ([first_tensor(model(*values))] for model, values in runs)
    else:
        oracle, yardstick, actual = (_gradients(model, values) for model, values in runs)
    return all(
        judge("model", result, reference_result, exact_result, dtype).ok
        for result, reference_result, exact_result in zip(actual, yardstick, oracle, strict=True)
    )


def _gradients(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    out = first_tensor(model(*inputs))
    generator = torch.Generator().manual_seed(0)
    # the same numbers for each dtype
    incoming = torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(out, learning, incoming, materialize_grads=True, allow_unused=True))


def first_tensor(out: Any) -> Tensor:
    """The tensor of an output: itself, the first of a tuple, or a diffusers output's ``sample``."""
    if isinstance(out, (tuple, list)) and out:
        out = out[0]
    out = getattr(out, "sample", out)
    if not isinstance(out, Tensor):
        raise TypeError(f"the model must give a tensor, or a tuple with one first, got {type(out).__name__}")
    return out


def _moved(value: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device or value.device, dtype if value.is_floating_point() else value.dtype)


def table(rows: list[OwnRow]) -> RenderableType:
    """For a terminal."""
    from rich.console import Console, Group

    from ...console import line, plain_table
    from ..report.terminal import speedup, tick

    grid = plain_table()
    for header in ("mode", "provider", "ms", "quartiles", "parity", "speed-up"):
        grid.add_column(header, justify="left" if header in ("mode", "provider") else "right")
    for row in rows:
        times = ("-", "-") if row.ms is None else (f"{row.ms.median:.4g}", f"{row.ms.p25:.4g}-{row.ms.p75:.4g}")
        grid.add_row(row.mode, row.provider, *times, tick(row.parity, Console().options.ascii_only), speedup(row))
    notes = [line(f"{row.mode}, {row.provider}: {row.note}") for row in rows if row.note]
    return Group(grid, *notes, line("train: forward and backward. speed-up: over the faster of the others."))
