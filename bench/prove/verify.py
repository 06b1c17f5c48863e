"""``ditfast verify``: the numerics rule over every operator and model design on this machine's device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ditfast import DiT, DiTConfig, reference
from ditfast.config import Conditioning
from ditfast.kernels import launch
from ditfast.ops import interpreter_unavailable, use_backend

from ...parity import VANISHING, Verdict, judge
from ...testing.inputs import random_batch, randomize_
from ...testing.operators import OPERATORS, Shape, check
from ..cases.case import DTYPES
from ..records.rows import VerifyRow

_SHAPES = (
    Shape(1, 1, 72),
    Shape(3, 7, 200, num_heads=5),
    Shape(3, 64, 384, num_heads=6),
    Shape(1, 257, 1152, num_heads=16),
    Shape(2, 16, 1024, num_heads=8, mean=100.0),
)
# in the interpreter, where a tile of a matrix product takes milliseconds: several tiles, no more
_SMALL = (
    Shape(1, 1, 72),
    Shape(3, 7, 200, num_heads=5),
    Shape(2, 65, 144, num_heads=2),
    Shape(1, 5, 1152, num_heads=16),
)
_NOTE_LENGTH = 300
_ROW_OPERATORS = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")


@dataclass(frozen=True)
class Check:
    """One row of ``ditfast verify``, to be made in this process or in another.

    Attributes:
        subject, backend, dtype: of the row.
        group: its checks share a process: a family of operators, or the models, in one working dtype.
        judge: makes the verdicts by name on a device; a partial of a module's function, so that it can be pickled.
    """

    subject: str
    backend: str
    dtype: str
    group: tuple[str, str]
    judge: Callable[[torch.device], dict[str, Verdict]]

    @property
    def key(self) -> tuple[object, ...]:
        """That of its row."""
        return (self.subject, self.backend, self.dtype)


def checks(device: torch.device, dtypes: Sequence[str] | None = None) -> list[Check]:
    """All rows of ``ditfast verify`` in the order of its table, operators first.

    Args:
        device: of the checks.
        dtypes: of "fp32", "bf16", "fp16"; all three by default.

    Raises:
        ValueError: an unknown dtype.
    """
    for label in dtypes or ():
        if label not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {label!r}")
    chosen = [label for label in DTYPES if not dtypes or label in dtypes]
    return [*_operator_checks(device, chosen), *_model_checks(chosen)]


def groups(items: Iterable[Check]) -> list[list[Check]]:
    """The checks that share a process, in the order of their first ones."""
    parts: dict[tuple[str, str], list[Check]] = {}
    for item in items:
        parts.setdefault(item.group, []).append(item)
    return list(parts.values())


def run_check(item: Check, device: torch.device) -> VerifyRow:
    """The row of a check; a failed one with the reason, if it raises."""
    try:
        verdicts = item.judge(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a kernel's fault must fail this check, not the next
        name, verdict = max(verdicts.items(), key=lambda pair: (not pair[1].ok, _share(pair[1])))
    except Exception as exception:  # whatever it is, the other checks are to run
        return failed(item, f"{type(exception).__name__}: {exception}")
    error, yardstick, bound = (
        value if math.isfinite(value) else None for value in (verdict.error, verdict.yardstick, verdict.bound)
    )
    return VerifyRow(item.subject, item.backend, item.dtype, name, error, yardstick, bound, verdict.ok)


def failed(item: Check, reason: str) -> VerifyRow:
    """The row of a check without a verdict; its note is the reason in one line."""
    note = " ".join(reason.split())
    if len(note) > _NOTE_LENGTH:  # the beginning says what, the end of a compiler's message why
        note = f"{note[: _NOTE_LENGTH * 2 // 3]} ... {note[-_NOTE_LENGTH // 3 + 5 :]}"
    return VerifyRow(item.subject, item.backend, item.dtype, "", None, None, None, False, note)


def _operator_checks(device: torch.device, dtypes: Sequence[str]) -> Iterator[Check]:
    """One an operator, backend and dtype.

    Kernels run on a GPU, or in Triton's interpreter if it is on; otherwise only the formulas have rows.
    """
    on_gpu = device.type == "cuda" or launch.rehearsed is not None
    interpreted = device.type == "cpu" and interpreter_unavailable() is None
    for operator in OPERATORS.values():
        # on a GPU the choice among candidates, and the kernel whatever the choice
        backends = (["auto", "kernel"] if operator.kernel else ["auto"]) if on_gpu else ["torch"]
        if operator.kernel and interpreted:
            backends.append("interpreter")
        for backend, dtype in itertools.product(backends, dtypes):
            for mixed in (False, True) if operator.mixed and dtype != "fp32" else (False,):
                judge_it = partial(_judge_operator, operator.name, backend, dtype, mixed)
                label = f"{dtype}, fp32 stream" if mixed else dtype
                yield Check(operator.name, backend, label, (operator.family, dtype), judge_it)


def _model_checks(dtypes: Sequence[str]) -> Iterator[Check]:
    """One a design and dtype."""
    for conditioning, dtype in itertools.product(get_args(Conditioning), dtypes):
        judge_it = partial(_judge_model, conditioning, dtype)
        yield Check(f"DiT, {conditioning}", "auto", dtype, ("models", dtype), judge_it)


def _judge_operator(name: str, backend: str, label: str, mixed: bool, device: torch.device) -> dict[str, Verdict]:
    """Outputs and every gradient of an operator over odd shapes."""
    operator, dtype = OPERATORS[name], DTYPES[label]
    # the interpreter truncates to bf16 instead of rounding, which tells at large means
    coarse = backend == "interpreter" and dtype == torch.bfloat16
    slow = backend == "interpreter" and name not in _ROW_OPERATORS
    shapes = [shape for shape in (_SMALL if slow else _SHAPES) if not (coarse and shape.mean)]
    # without gradients other code runs: a library's epilogue, or a kernel that stores less
    subsets: list[tuple[tuple[str, ...] | None, str]] = [(None, "")]
    if operator.gradients and name not in _ROW_OPERATORS:
        subsets.append(((), ", inference"))
    with use_backend("triton" if backend in ("kernel", "interpreter") else "auto"):
        return {
            f"{tensor} at B={shape.batch} T={shape.tokens} D={shape.width}{suffix}": verdict
            for shape in shapes
            for subset, suffix in subsets
            for tensor, verdict in check(operator, shape, dtype, device, mixed, subset).items()
        }


def _judge_model(conditioning: Conditioning, label: str, device: torch.device) -> dict[str, Verdict]:
    """Outputs, guided outputs and every parameter gradient of a small DiT."""
    config = DiTConfig(
        depth=3, hidden_size=288, num_heads=4, latent_size=(8, 12), num_classes=10, conditioning=conditioning
    )
    return check_model(config, DTYPES[label], device)


def check_model(
    config: DiTConfig, dtype: torch.dtype, device: torch.device | str = "cpu", batch: int = 3, seed: int = 0
) -> dict[str, Verdict]:
    """Judges ``ditfast.DiT`` by the model rule: forward, guided forward, and every parameter's gradient.

    Returns:
        verdicts by name: ``output``, ``guided output``, ``d_<parameter>``.
    """
    yardstick = randomize_(reference.DiT(config), seed).to(device, dtype).eval()
    model = DiT(config).to(device, dtype).eval()
    model.load_state_dict(yardstick.state_dict())
    oracle = reference.DiT(config).to(device, torch.float64).eval()
    oracle.load_state_dict(yardstick.state_dict())
    x, t, y = random_batch(config, batch, device, dtype, seed)
    actual, expected, exact = (run_model(candidate, x, t, y) for candidate in (model, yardstick, oracle))
    return {name: judge("model", actual[name], expected[name], exact[name], dtype) for name in exact}


def run_model(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Outputs, guided outputs (no gradients), and the gradient of every trainable parameter, in eval mode."""
    config = model.config
    assert isinstance(config, DiTConfig)
    dtype = next(model.parameters()).dtype
    x = x.to(dtype)
    results = {}
    if config.null_class is not None:
        with torch.no_grad():
            double = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, config.null_class)]))
            results["guided output"] = model.forward_with_cfg(*double, 4.0)  # type: ignore[operator]
    output = model(x, t, y)
    results["output"] = output.detach()
    incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = {name: parameter for name, parameter in parameters.items() if not name.endswith(VANISHING)}
    gradients = torch.autograd.grad(output, list(parameters.values()), incoming)
    return results | {f"d_{name}": gradient for name, gradient in zip(parameters, gradients, strict=True)}


def render(rows: Sequence[VerifyRow]) -> Table:
    """The table of ``ditfast verify``."""
    table = Table(title="Parity with fp64: ours must not exceed the bound", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("operator or model", "backend", "dtype"):
        table.add_column(header, no_wrap=True)
    table.add_column("worst tensor", max_width=60)  # or why there is none, in several lines
    for header in ("ours", "eager PyTorch", "bound", "verdict"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        verdict = "[green]pass[/]" if row.ok else "[red]FAIL[/]"
        absent = "-" if row.note else "not finite"
        numbers = (absent if value is None else f"{value:.2e}" for value in (row.error, row.yardstick, row.bound))
        table.add_row(row.subject, row.backend, row.dtype, escape(row.note or row.tensor), *numbers, verdict)
    return table


def _share(verdict: Verdict) -> float:
    """The error as a share of its bound; the worst tensor has the largest."""
    return verdict.error / verdict.bound if verdict.bound else (0.0 if verdict.ok else float("inf"))
