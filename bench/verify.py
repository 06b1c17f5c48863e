"""``ditfast verify``: the numerics rule over every operator and model design on this machine's device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from ditfast import DiT, DiTConfig, reference
from ditfast.config import Conditioning
from ditfast.kernels import launch
from ditfast.ops import interpreter_unavailable, use_backend

from .cases import DTYPES
from .environment import parse_device
from .inputs import random_batch, randomize_
from .operators import OPERATORS, Shape, check
from .parity import VANISHING, Verdict, judge
from .rows import VerifyRow

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
_ROW_OPERATORS = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")


def verify(device: str | None = None, dtypes: Sequence[str] | None = None) -> Iterator[VerifyRow]:
    """All rows of ``ditfast verify``, operators first.

    Args:
        device: "cpu", "cuda" or "cuda:N"; by default a GPU where there is one.
        dtypes: of "fp32", "bf16", "fp16"; all three by default.

    Raises:
        ValueError: a device that is not there, or an unknown dtype.
    """
    for label in dtypes or ():
        if label not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {label!r}")
    where = parse_device(device)
    chosen = {label: dtype for label, dtype in DTYPES.items() if not dtypes or label in dtypes}
    yield from verify_operators(where, chosen)
    yield from verify_models(where, chosen)


def verify_operators(device: torch.device, dtypes: dict[str, torch.dtype]) -> Iterator[VerifyRow]:
    """A row per operator, dtype and backend: outputs and every gradient over odd shapes, the worst one shown.

    Kernels run on a GPU, or in Triton's interpreter where it is on; elsewhere there are rows of the formulas only.
    """
    on_gpu = launch.on_gpu(torch.empty(0, device=device))  # in a rehearsal too
    interpreted = device.type == "cpu" and interpreter_unavailable() is None
    for operator in OPERATORS.values():
        # on a GPU the choice among candidates, and the kernel whatever the choice
        backends = (["auto", "kernel"] if operator.kernel else ["auto"]) if on_gpu else ["torch"]
        if operator.kernel and interpreted:
            backends.append("interpreter")
        for backend, (label, dtype) in itertools.product(backends, dtypes.items()):
            # the interpreter truncates to bf16 instead of rounding, which tells at large means
            coarse = backend == "interpreter" and dtype == torch.bfloat16
            slow = backend == "interpreter" and operator.name not in _ROW_OPERATORS
            shapes = [shape for shape in (_SMALL if slow else _SHAPES) if not (coarse and shape.mean)]
            for mixed in (False, True) if operator.mixed and dtype != torch.float32 else (False,):
                with use_backend("triton" if backend in ("kernel", "interpreter") else "auto"):
                    # without gradients other code runs: a library's epilogue, or a kernel that stores less
                    wanted: list[tuple[tuple[str, ...] | None, str]] = [(None, "")]
                    if operator.gradients and operator.name not in _ROW_OPERATORS:
                        wanted.append(((), ", inference"))
                    verdicts = {
                        f"{name} at B={shape.batch} T={shape.tokens} D={shape.width}{where}": verdict
                        for shape in shapes
                        for subset, where in wanted
                        for name, verdict in check(operator, shape, dtype, device, mixed, subset).items()
                    }
                yield _worst(operator.name, backend, f"{label}, fp32 stream" if mixed else label, verdicts)


def verify_models(device: torch.device, dtypes: dict[str, torch.dtype]) -> Iterator[VerifyRow]:
    """A row per design and dtype: outputs, guided outputs and every parameter gradient of a small DiT."""
    for conditioning in get_args(Conditioning):
        config = DiTConfig(
            depth=3, hidden_size=288, num_heads=4, latent_size=(8, 12), num_classes=10, conditioning=conditioning
        )
        for label, dtype in dtypes.items():
            yield _worst(f"DiT, {conditioning}", "auto", label, check_model(config, dtype, device))


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
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = {name: parameter for name, parameter in named.items() if not name.endswith(VANISHING)}
    gradients = torch.autograd.grad(output, list(named.values()), incoming)
    return results | {f"d_{name}": gradient for name, gradient in zip(named, gradients, strict=True)}


def render(rows: Sequence[VerifyRow]) -> Table:
    """The table of ``ditfast verify``."""
    table = Table(title="Parity with fp64: ours must not exceed the bound", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("operator or model", "backend", "dtype", "worst tensor"):
        table.add_column(header, no_wrap=True)
    for header in ("ours", "eager PyTorch", "bound", "verdict"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        verdict = "[green]pass[/]" if row.ok else "[red]FAIL[/]"
        numbers = ("not finite" if value is None else f"{value:.2e}" for value in (row.error, row.yardstick, row.bound))
        table.add_row(row.subject, row.backend, row.dtype, row.tensor, *numbers, verdict)
    return table


def _worst(subject: str, backend: str, dtype: str, verdicts: dict[str, Verdict]) -> VerifyRow:
    """The tensor furthest past its bound, or closest to it."""

    def share(verdict: Verdict) -> float:
        return verdict.error / verdict.bound if verdict.bound else (0.0 if verdict.ok else float("inf"))

    name, verdict = max(verdicts.items(), key=lambda item: (not item[1].ok, share(item[1])))
    error = verdict.error if math.isfinite(verdict.error) else None
    return VerifyRow(subject, backend, dtype, name, error, verdict.yardstick, verdict.bound, verdict.ok)
