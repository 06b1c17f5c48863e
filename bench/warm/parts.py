"""The calls that ``ditfast warm`` makes on a rehearsed GPU, by purpose: those of the models and commands themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

from ditfast.config import VAE_FACTOR, DiTConfig
from ditfast.model import dit
from ditfast.ops.modulations import modulations_together

from ...testing.operators import OPERATORS, Shape
from ..cases import attention
from ..cases.case import Case, Mode, defaults, dtype_name, is_training
from ..cases.providers import get_provider
from ..cases.workload import Workload, build_model, make_inputs
from ..prove import rehearsal, verify
from ..suites import ops

if TYPE_CHECKING:
    from ...testing.units import Direction
    from ..tune.family import Target
    from ..tune.measure import Task

#: the values of --for; without it the models' own forward and training
PURPOSES = ("verify", "bench", "tune")
#: the models' batches: tiles change with the rows, and at XL/2 no batch between these launches other kernels
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_DEPTH = 2  # later blocks launch the same kernels as the second
_OPS_BATCHES = (8, 256)  # of ``ditfast bench ops`` on a GPU
_CPU = torch.device("cpu")  # a rehearsal takes it for its GPU

Run = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Part:
    """The calls that one process makes in turn.

    Attributes:
        arch: such as sm_90.
        purpose: "model" or one of PURPOSES.
        dtype: torch's.
        config: None for verify, which has models of its own.
        mode: of bench, and of the models.
        batches: empty for those of the purpose.
    """

    arch: str
    purpose: str
    dtype: torch.dtype
    config: DiTConfig | None = None
    mode: Mode | None = None
    batches: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """A short description, without the architecture."""
        size = ""
        if self.config is not None:
            height, width = (VAE_FACTOR * size for size in self.config.latent_hw)
            size = f"{height} px" if height == width else f"{height}x{width} px"
        name = self.config.name if self.config is not None else ""
        purpose = "" if self.purpose == "model" else self.purpose
        return " ".join(filter(None, [purpose, name, size, self.mode, dtype_name(self.dtype)]))


def plan(
    arch: str,
    purposes: Sequence[str],
    configs: Sequence[DiTConfig],
    dtypes: Sequence[torch.dtype],
    modes: Sequence[Mode],
    batches: Sequence[int] = (),
    verify_dtypes: Sequence[torch.dtype] = (),
) -> list[Part]:
    """The parts, in the order of the arguments.

    Args:
        purposes: of PURPOSES; empty for the models' own forward and training.
        batches: replace those of each purpose.
        verify_dtypes: replace ``dtypes`` for verify.
    """
    parts: list[Part] = []
    for purpose in purposes or ("model",):
        if purpose == "verify":
            parts += [Part(arch, purpose, dtype) for dtype in verify_dtypes or dtypes]
            continue
        chosen: Sequence[Mode | None] = (None,) if purpose == "tune" else modes
        parts += [Part(arch, purpose, *item, tuple(batches)) for item in product(dtypes, configs, chosen)]
    return parts


def runs(part: Part) -> Iterator[Run]:
    """(description, call) of every launch in a part; to be called within a rehearsal."""
    if part.purpose == "verify":
        for item in verify.checks(_CPU, [dtype_name(part.dtype)]):
            yield f"{item.subject}, {item.backend}, {item.dtype}", partial(item.judge, _CPU)
        return
    assert part.config is not None
    config = replace(part.config, depth=min(part.config.depth, _DEPTH))
    calls = {"model": _model, "bench": _benchmarked, "tune": _candidates}[part.purpose](config, part)
    for name, run in calls:
        yield name, partial(_with_modulations_of, part.config.depth, run)


def _with_modulations_of(depth: int, run: Callable[[], object]) -> None:
    """Runs a shortened model with as many modulations as the whole has: their kernel depends on the number."""

    def deep(c: Tensor, parameters: Sequence[Tensor | None]) -> Tensor | None:
        *blocks, weight, bias = parameters
        together = modulations_together(c, [*blocks[:2] * depth, weight, bias])
        columns = sum(len(weight) for weight in parameters[::2] if weight is not None)
        return None if together is None else together[:, -columns:]

    with patch.object(dit, "modulations_together", deep):
        run()


def _model(config: DiTConfig, part: Part) -> Iterator[Run]:
    """Forward, also guided and with modulations passed in, as in sampling; training, also under autocast."""
    run = rehearsal.train if is_training(part.mode or "forward") else rehearsal.infer
    for batch in part.batches or BATCHES:
        yield f"batch {batch}", partial(run, config, batch, part.dtype)


def _benchmarked(config: DiTConfig, part: Part) -> Iterator[Run]:
    """``ditfast bench models`` in one mode; for forward and train also that direction of ``ditfast bench ops``."""
    mode = part.mode or "forward"
    for batch in part.batches or defaults(torch.device("cuda"), full=True).batches:
        case = Case(config, batch, part.dtype, mode)
        yield f"batch {batch}", partial(_benchmark, case)
    directions: dict[Mode, Direction] = {"forward": "forward", "train": "backward"}
    if mode not in directions:
        return
    assert part.config is not None
    sizes, layers = (config.num_tokens, config.hidden_size), part.config.depth + 1
    model_shapes = [
        Shape(batch, *sizes, num_heads=config.num_heads, ratio=4, layers=layers)
        for batch in part.batches or _OPS_BATCHES
    ]
    for name in ops.MEASURED:
        for shape in (*model_shapes, *(attention.SHAPES if name == "self_attention" else ())):
            call = partial(ops.launch_once, OPERATORS[name], directions[mode], shape, part.dtype, _CPU)
            yield f"{name} at B={shape.batch} T={shape.tokens} D={shape.width}", call


def _benchmark(case: Case) -> None:
    """The launches of the provider ditfast, without the optimiser, which has no kernels of ours."""
    inputs = make_inputs(case, _CPU, 0)
    model = build_model(case.config, _CPU, case.dtype, 0)
    variant = get_provider("ditfast").build(Workload(case, _CPU, model, [inputs]))
    if case.training:
        variant.gradients(inputs)
    else:
        variant.step(inputs)


def _candidates(config: DiTConfig, part: Part) -> Iterator[Run]:
    """Every candidate of ``ditfast tune`` with the kernels of ours that it launches."""
    from ditfast.kernels.rehearsal import GPUS

    from ..tune.family import Target
    from ..tune.plan import BATCHES as TUNED
    from ..tune.plan import plan as tasks

    gpu = GPUS[part.arch]
    target = Target(gpu.name, gpu.capability[0], gpu.multiprocessors)
    for task in tasks({config.name: part.config or config}, [part.dtype], part.batches or TUNED):
        yield f"{task.key} ({task.family.describe(task.shape)})", partial(_tune, task, target)


def _tune(task: Task, target: Target) -> None:
    family = task.family
    with torch.no_grad(), family.conditions(task.dtype):
        inputs = family.draw(task.shape, task.dtype, _CPU, 0)
        for config in family.candidates(task.shape, task.dtype, target).values():
            # a library may be absent or take no CPU tensors
            with nullcontext() if getattr(config, "candidate", "triton") == "triton" else suppress(Exception):
                family.call(config, inputs)
