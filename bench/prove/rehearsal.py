"""``ditfast rehearse``: every operator and model design launched on GPUs that are not there (kernels/rehearsal/).

It proves that each kernel compiles for the architecture as Triton specialises it when it is launched, takes no more
shared memory than a block may have, and has a grid and tensor maps that a driver accepts. Nothing is computed.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from ditfast import DiT, DiTConfig
from ditfast.config import Conditioning
from ditfast.ops import use_backend
from ditfast.ops.backend import Backend

from ...testing.inputs import random_batch
from ...testing.operators import OPERATORS, Inputs, Operator, Shape, draw_inputs
from ..cases.case import DTYPES
from ..cases.precision import float32_precision
from ..measure.processes import end_with_parent
from .kernels import kernel_functions
from .uncomputed import Uncomputed

if TYPE_CHECKING:
    from ditfast.kernels.rehearsal import Compilation

SCHEMA = "ditfast.rehearsal/1"
BRIEF_ARCHITECTURES = ("sm_90", "sm_80")  # the others launch what sm_80 does, within less shared memory
_DEPTH = 2  # blocks: one that is handed a branch, and one that hands one on


class Sizes(NamedTuple):
    """Sizes to vary: (width, heads), batches, tokens of operators, (latent height, width, patch) of models, and head
    dims of attention beside those of the widths."""

    widths: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    tokens: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...]
    head_dims: tuple[int, ...] = ()


# 256 tokens, and 257 or 17 x 15 of them
BRIEF = Sizes(((384, 6), (1152, 16)), (1, 3), (256, 257), ((32, 32, 2), (34, 30, 2)))
# where shared memory is what may fail: the largest tiles, and every head dim
NARROW = BRIEF._replace(batches=(3, 256), head_dims=(32, 48, 80, 96, 128))
FULL = Sizes(
    ((384, 6), (768, 12), (1024, 16), (1152, 16)),
    (1, 3, 256),
    (1, 16, 64, 256, 257, 1024),
    ((32, 32, 8), (32, 32, 4), (32, 32, 2), (34, 30, 2), (64, 64, 2)),
    NARROW.head_dims,
)


@dataclass(frozen=True)
class Part:
    """The work of one process: "operators" or "models" in one dtype on one architecture."""

    arch: str
    dtype: str
    subject: str
    full: bool


@dataclass
class Outcome:
    """The result of a part; ``failures`` are sentences."""

    part: Part
    cases: int = 0
    launches: int = 0
    tensor_maps: int = 0
    compilations: list[Compilation] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Case(NamedTuple):
    """A call to run; ``launches``: whether it must launch kernels, or must launch none."""

    name: str
    run: Callable[[], Any]
    launches: bool = True


def rehearse(
    architectures: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    full: bool = False,
    processes: int | None = None,
) -> Iterator[Outcome]:
    """Each part as it ends, side by side in processes of their own.

    Args:
        architectures: keys of ``ditfast.kernels.rehearsal.GPUS``; by default sm_90 and sm_80, with ``full`` all.
        dtypes: of "fp32", "bf16", "fp16"; by default bf16, with ``full`` all three.
        full: every model's width, token count and patch size, batches up to 256 (on architectures with about 100 KB of
            shared memory a block the sizes that take most of it); else those of S/2 and XL/2, batches 1 and 3.
        processes: at once; by default as many as there are cores.

    Raises:
        ValueError: an unknown architecture or dtype, or kernels cannot be rehearsed here, with the reason.
    """
    try:
        from ditfast.kernels.rehearsal import GPUS, unavailable
    except ImportError as error:
        raise ValueError(f"rehearsing kernels needs the package triton: {error}") from None
    if (reason := unavailable()) is not None:
        raise ValueError(f"kernels cannot be rehearsed: {reason}")
    for name, requested, choices in (("arch", architectures, GPUS), ("dtype", dtypes, DTYPES)):
        for value in requested or ():
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    architectures = architectures or (tuple(GPUS) if full else BRIEF_ARCHITECTURES)
    dtypes = dtypes or (tuple(DTYPES) if full else ("bf16",))
    parts = [Part(*item, full) for item in itertools.product(architectures, dtypes, ("operators", "models"))]
    # fresh interpreters: a forked one would inherit threads and drivers
    pool = ProcessPoolExecutor(
        processes or os.cpu_count(), get_context("spawn"), initializer=end_with_parent, initargs=(signal.SIGKILL,)
    )
    try:
        for future in as_completed([pool.submit(rehearse_part, part) for part in parts]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def rehearse_part(part: Part) -> Outcome:
    """One part in this process; a case that fails is noted, and the next one runs."""
    from ditfast.kernels import rehearsal

    torch.set_num_threads(1)
    outcome = Outcome(part)
    dtype, sizes = DTYPES[part.dtype], BRIEF
    if part.full:
        sizes = FULL if part.arch in BRIEF_ARCHITECTURES else NARROW
    cases = operator_cases(dtype, sizes) if part.subject == "operators" else model_cases(dtype, sizes)
    with rehearsal.rehearse(part.arch) as recorded, Uncomputed():
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            with float32_precision(precision):
                for case in cases:
                    label = f"{case.name} on {part.arch}" + (", TF32" if precision == "high" else "")
                    before = recorded.launches
                    outcome.cases += 1
                    try:
                        case.run()
                    except Exception as error:  # it would be raised on a GPU too
                        text = " ".join(str(error).split())[:300]
                        outcome.failures.append(f"{label}: {type(error).__name__}: {text}")
                    else:
                        if (recorded.launches > before) != case.launches:
                            outcome.failures.append(f"{label}: launched {recorded.launches - before} kernels")
        outcome.launches, outcome.tensor_maps = recorded.launches, recorded.tensor_maps
        outcome.compilations = recorded.compilations
    return outcome


def operator_cases(dtype: torch.dtype, sizes: Sizes) -> list[Case]:
    """Every operator as "auto" chooses and with its kernel demanded, with gradients and without."""
    cases: list[Case] = []
    for (width, heads), batch, tokens in itertools.product(sizes.widths, sizes.batches, sizes.tokens):
        shape = Shape(batch, tokens, width, num_heads=heads, ratio=4)
        for operator in OPERATORS.values():
            for mixed in (False, True) if operator.mixed and dtype != torch.float32 else (False,):
                cases += _cases_of(operator, shape, dtype, mixed)
    for head_dim, tokens in itertools.product(sizes.head_dims, (64, 257)):
        shape = Shape(3, tokens, 2 * head_dim, num_heads=2)
        for operator in (OPERATORS["self_attention"], OPERATORS["self_attention+bias"]):
            cases += _cases_of(operator, shape, dtype)
    # rows that are no multiples of 16 bytes, at addresses that are none either
    shape = Shape(3, 64, sizes.widths[0][0], num_heads=sizes.widths[0][1], ratio=4)
    for operator in OPERATORS.values():
        cases += _cases_of(operator, shape, dtype, layout=_misaligned)
    return cases


def _cases_of(
    operator: Operator,
    shape: Shape,
    dtype: torch.dtype,
    mixed: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Iterator[Case]:
    """One a backend, each in inference and, where the operator has gradients, in training, which launches a kernel."""
    kind = (", fp32 stream" if mixed else "") + (", misaligned" if layout is _misaligned else "")
    sizes = f"B={shape.batch} T={shape.tokens} D={shape.width} H={shape.num_heads}"
    backends: tuple[Backend, ...] = ("auto", "triton") if operator.kernel else ("auto",)
    for backend in backends:
        run = partial(_run_operator, operator, shape, dtype, mixed, layout, backend)
        yield Case(f"{operator.name}{kind}, {backend}, {dtype}, {sizes}", run)


def _run_operator(
    operator: Operator,
    shape: Shape,
    dtype: torch.dtype,
    mixed: bool,
    layout: Callable[[Tensor], Tensor],
    backend: Backend,
) -> None:
    inputs = {name: layout(x) for name, x in draw_inputs(operator, shape, dtype, "cpu", mixed).items()}
    options = operator.options(shape)
    for learns in (False, True) if operator.differentiable(inputs) else (False,):
        with use_backend(backend):
            _forward_and_backward(partial(operator.fused, **options), inputs, learns)


def _forward_and_backward(function: Callable[..., Any], inputs: Inputs, learns: bool) -> None:
    leaves = {
        name: x.detach().requires_grad_(learns and x.is_floating_point()) for name, x in inputs.items()
    }
    outputs = function(**leaves)
    if learns:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        learning = [x for x in leaves.values() if x.requires_grad]
        torch.autograd.grad(outputs, learning, [torch.empty_like(output) for output in outputs])


def _misaligned(x: Tensor) -> Tensor:
    if x.ndim < 2 or not x.is_floating_point():
        return x
    return x.new_empty((*x.shape[:-1], x.shape[-1] + 3))[..., 1:-2]


def model_cases(dtype: torch.dtype, sizes: Sizes) -> list[Case]:
    """Every design in inference, guided, with its modulations given, in training, and in training under autocast."""
    cases = []
    for (width, heads), (height, across, patch) in itertools.product(sizes.widths, sizes.grids):
        for design in get_args(Conditioning):
            config = DiTConfig(
                depth=_DEPTH,
                hidden_size=width,
                num_heads=heads,
                latent_size=(height, across),
                patch_size=patch,
                num_classes=10,
                conditioning=design,
            )
            for batch, training in itertools.product(sizes.batches, (False, True)):
                how = "training" if training else "inference"
                name = f"DiT, {design}, {how}, {dtype}, B={batch} T={config.num_tokens} D={width}"
                run = partial(train if training else infer, config, batch, dtype)
                cases.append(Case(name, run, launches=design.startswith("adaln")))  # others run the reference's code
    return cases


def infer(config: DiTConfig, batch: int, dtype: torch.dtype) -> None:
    """A model's forward, guided, and with its modulations given."""
    model = DiT(config).to(dtype).eval()
    x, t, y = random_batch(config, batch, dtype=dtype)
    with torch.inference_mode():
        model(x, t, y)
        if config.null_class is not None:
            doubled, times, labels = (torch.cat([each, each]) for each in (x, t, y))
            model.forward_with_cfg(doubled, times, labels, 4.0)
        if model.fused:
            model.forward_modulated(x, model.modulation(t, y))


def train(config: DiTConfig, batch: int, dtype: torch.dtype) -> None:
    """A model's forward and backward, in this dtype and under its autocast."""
    model = DiT(config).to(dtype).train()
    x, t, y = random_batch(config, batch, dtype=dtype)
    _train(model, x, t, y)
    if dtype != torch.float32:
        _train(model.float(), x.float(), t, y, torch.autocast("cpu", dtype))


def _train(
    model: nn.Module, x: Tensor, t: Tensor, y: Tensor, autocast: AbstractContextManager[Any] | None = None
) -> None:
    with autocast or nullcontext():
        output = model(x, t, y)
    output.backward(torch.empty_like(output))
    model.zero_grad()


def unreached(outcomes: Sequence[Outcome]) -> list[str]:
    """Kernels that no case has launched, as sentences; TMA's is for some architectures alone."""
    from ditfast.kernels.configs.gemm import PERSISTENT
    from ditfast.kernels.rehearsal import GPUS

    all_kernels = set(kernel_functions())
    missing = []
    for arch in dict.fromkeys(outcome.part.arch for outcome in outcomes):
        expected = all_kernels if GPUS[arch].capability[0] in PERSISTENT else all_kernels - {"_gemm_tma_kernel"}
        launched = {item.kernel for outcome in outcomes if outcome.part.arch == arch for item in outcome.compilations}
        missing += [f"{name} was never launched on {arch}" for name in sorted(expected - launched)]
    return missing


def to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All outcomes as JSON-ready values."""
    import triton

    rows = [
        {
            "arch": outcome.part.arch,
            "dtype": outcome.part.dtype,
            "subject": outcome.part.subject,
            "cases": outcome.cases,
            "launches": outcome.launches,
            "tensor_maps": outcome.tensor_maps,
            "compilations": dict(Counter(item.kernel for item in outcome.compilations)),
            "failures": outcome.failures,
        }
        for outcome in outcomes
    ]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"schema": SCHEMA, **versions, "parts": rows, "unreached": unreached(outcomes)}


def render(outcomes: Sequence[Outcome]) -> Table:
    """The table of ``ditfast rehearse``: distinct compilations are those of a part, which another may share."""
    table = Table(title="Launched on GPUs that are not there", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("architecture", "dtype", "what"):
        table.add_column(header, no_wrap=True)
    for header in ("cases", "launches", "tensor maps", "compilations", "kernels", "failures"):
        table.add_column(header, justify="right", no_wrap=True)
    for outcome in sorted(outcomes, key=lambda item: (item.part.arch, item.part.dtype, item.part.subject)):
        part, compiled = outcome.part, outcome.compilations
        kernels = {item.kernel for item in compiled}
        counts = (outcome.cases, outcome.launches, outcome.tensor_maps, len(compiled), len(kernels))
        failures = f"[red]{len(outcome.failures)}[/]" if outcome.failures else "[green]0[/]"
        table.add_row(part.arch, part.dtype, part.subject, *map(str, counts), failures)
    return table
