"""What a host spends on eager models before and between their launches: process time, with nothing computed.

Triton launches on a GPU that is not there, and torch's CPU kernels are replaced by one that returns at once
(kernels/rehearsal/). A call then costs what it costs on a GPU's host up to the launches: Python, dispatcher, autograd,
shapes, allocation, Triton's launchers. Stubs in Python in the place of operators would hide torch's own share, and a
dispatch mode or meta tensors would add Python to every operator; neither is in what is timed.

What differs from a GPU's host is said below every table (HOST_DIFFERENCES).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import ditfast
from ditfast import ops
from ditfast.config import DiTConfig
from ditfast.model import blocks, dit
from ditfast.training import diffusion_loss

from ...testing.units import Direction
from ..cases.case import Case
from ..cases.official import official_style
from ..cases.workload import Inputs, make_inputs
from ..measure.timing import Call, Sampler, measure, sampler
from ..records.rows import HostPart, HostRow, Spread
from .cost import BUILDERS, trace

#: name -> how the model is built on the meta device
MODELS: Mapping[str, Callable[[DiTConfig], nn.Module]] = {
    **{name: BUILDERS[name] for name in ("reference", "ditfast")},
    "official": official_style,
    "accelerated": official_style,
}
PROVIDERS = tuple(MODELS)
# what ditfast's models call, by where they look it up
_OPERATORS = {
    ops: (
        *("timestep_embedding", "conditioning", "layer_norm_modulate", "gated_residual"),
        *("gated_residual_layer_norm_modulate", "self_attention", "gelu_mlp"),
    ),
    blocks: ("adaln", "attached", "norm_linear", "norm_attention", "norm_mlp"),
    dit: ("infer_blocks", "modulations_together"),
}
_CPU = torch.device("cpu")
_SEED = 0
_PART_SHARE = 1 / 16  # of the seconds, for each level of a part


def measure_case(case: Case, seconds: float, arch: str, report: Callable[[str], None]) -> list[HostRow]:
    """The rows of a case, timed in turns in this process, and ditfast's parts.

    Args:
        case: in bf16, "forward" or "train".
        seconds: time for each model.
        arch: of the GPU that is not there.
        report: told of what begins.

    Raises:
        ValueError: another dtype or mode.
        RuntimeError: nothing can be rehearsed here, with the reason.
    """
    from ditfast.kernels.rehearsal import nothing_computed, rehearse

    if case.dtype != torch.bfloat16 or case.mode not in ("forward", "train"):
        raise ValueError(f"case must be in bf16 and of the mode forward or train, got {case.label}")
    report(f"{case.label}: counting launches")
    launches = {
        name: trace(case.config, case.batch, case.dtype, case.mode, name).total_launches
        for name in PROVIDERS
        if name in BUILDERS
    }
    inputs = make_inputs(case, _CPU, _SEED)
    # the loss keeps the tables of its first call
    x0, timesteps, labels, *_ = inputs
    diffusion_loss(lambda x, t, y: x, x0, timesteps, labels, x0)
    calls = {name: _call(case, name, inputs) for name in PROVIDERS}
    with rehearse(arch) as gpu, nothing_computed() as replaced:
        report(f"{case.label}: compiling kernels, where Triton's cache lacks them")
        counts = {}
        for name, call in calls.items():
            call(0)
            before = gpu.launches, replaced()
            call(0)
            counts[name] = gpu.launches - before[0], replaced() - before[1]
        report(f"{case.label}: timing")
        times, least = _times(calls, seconds)
        report(f"{case.label}: timing ditfast's parts")
        parts = _parts(case, calls["ditfast"], seconds * _PART_SHARE, lambda: gpu.launches)
    return [
        HostRow(
            **case.columns,
            provider=name,
            arch=arch,
            process_ms=times[name],
            least_ms=least[name],
            launches=launches.get(name),
            triton_launches=counts[name][0],
            replaced=counts[name][1],
            parts=parts if name == "ditfast" else [],
        )
        for name in PROVIDERS
    ]


def _call(case: Case, name: str, inputs: Inputs) -> Call:
    """One call of a provider's model, whose weights nobody has written unless accelerate looks at them."""
    with torch.device("meta"):
        model = nn.Module.to(MODELS[name](case.config), case.dtype)
    model = model.to_empty(device=_CPU).eval()
    if name == "accelerated":
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        ditfast.accelerate(model, check=False, strict=True)
    if not case.training:

        def forward(_: int) -> None:
            with torch.no_grad():  # as samplers do
                model(*inputs)

        return forward
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train(_: int) -> None:
        x0, t, y, noise = inputs
        diffusion_loss(lambda x, t, y: model(x.to(case.dtype), t, y), x0, t, y, noise).backward()
        for parameter in parameters:  # as an optimiser's zero_grad
            parameter.grad = None

    return train


def _times(calls: Mapping[str, Call], seconds: float) -> tuple[dict[str, Spread], dict[str, float]]:
    """(spreads, the least) of the process times in ms of calls that take turns; what fails raises."""
    least: dict[str, float] = {}

    def noted(name: str, call: Call) -> Sampler:
        sample = sampler(call, _CPU, _process_clock)

        def noting(count: int) -> float:
            elapsed = sample(count)
            least[name] = min(least.get(name, math.inf), elapsed / count * 1e3)
            return elapsed

        return noting

    measured = measure({name: noted(name, call) for name, call in calls.items()}, _CPU, seconds)
    for error in measured.failures.values():
        raise error
    return measured.times, least


def _process_clock(thunk: Callable[[], None]) -> float:
    begin = time.process_time_ns()
    thunk()
    return (time.process_time_ns() - begin) / 1e9


@dataclass
class _Recorded:
    """One operator as a model called it last: the function, its arguments, and how often."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    uses: int = 0


def _parts(case: Case, call: Call, seconds: float, launches: Callable[[], int]) -> list[HostPart]:
    """Every operator that a call of the model makes, level by level."""
    operators: dict[str, _Recorded] = {}

    def note(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded = operators.setdefault(name, _Recorded(name, function))
        recorded.args, recorded.kwargs, recorded.uses = args, kwargs, recorded.uses + 1

    with ExitStack() as stack:
        for owner, names in _OPERATORS.items():
            for name in names:
                stack.enter_context(_watched(owner, name, note))
        call(0)
    return [part for recorded in operators.values() for part in _part(case, recorded, seconds, launches)]


def _part(case: Case, recorded: _Recorded, seconds: float, launches: Callable[[], int]) -> list[HostPart]:
    """Forward, and backward where the operator's results want a gradient."""

    def leaf(value: Any) -> Any:
        return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    args, kwargs = tree_map(leaf, recorded.args), tree_map(leaf, recorded.kwargs)

    def forward(_: int = 0) -> Any:
        return recorded.function(*args, **kwargs)

    def measured(direction: Direction, public: Call) -> HostPart:
        before = launches()
        with _layers() as layers:
            public(0)
        launched = launches() - before
        calls = {"public": public, **{name: _replay(below) for name, below in layers.items() if below}}
        times, _none = _times(calls, seconds)
        below = [times.get(name) for name in ("launcher", "launch")]
        return HostPart(recorded.name, direction, recorded.uses, launched, times["public"], *below)

    with torch.set_grad_enabled(case.training):
        parts = [measured("forward", forward)]
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        outputs = [x for x in tree_leaves(forward()) if isinstance(x, Tensor) and x.requires_grad and x.numel()]
        if case.training and leaves and outputs:
            gradients = [torch.empty_like(x) for x in outputs]

            def backward(_: int = 0) -> None:
                torch.autograd.grad(outputs, leaves, gradients, retain_graph=True, allow_unused=True)

            parts.append(measured("backward", backward))
    return parts


_Calls = list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]


def _replay(calls: _Calls) -> Call:
    # in an autograd node nothing that it calls wants a gradient
    calls = [(function, *tree_map_only(Tensor, Tensor.detach, arguments)) for function, *arguments in calls]

    def replay(_: int) -> None:
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return replay


@contextmanager
def _layers() -> Iterator[dict[str, _Calls]]:
    """What is called within at each level below the public operator: made again, it costs that level."""
    from ditfast.kernels import adaln, attention, attention_bwd, conditioning, launch, linear, modulations

    plans = (
        *(adaln.AdaLNForward, adaln.AdaLNBackward, attention.AttentionForward, attention_bwd.AttentionBackward),
        *(conditioning.TimestepEmbedding, conditioning.Conditioning, modulations.Modulations),
        *(linear.LinearGelu, linear.LinearGatedResidual, linear.LinearGeluBackward, linear.GeluBackward),
    )
    calls: dict[str, _Calls] = {"launcher": [], "launch": []}
    levels = {"launcher": plans, "launch": (launch.Launch,)}

    def noting(level: str) -> _Note:
        return lambda _, function, args, kwargs: calls[level].append((function, args, kwargs))

    with ExitStack() as stack:
        for level, owners in levels.items():
            for owner in owners:
                stack.enter_context(_watched(owner, "__call__", noting(level)))
        yield calls


_Note = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def _watched(owner: Any, name: str, note: _Note) -> Iterator[None]:
    """Within a ``with`` block ``note`` is told of every call of a function that is looked up in ``owner``."""
    function = getattr(owner, name)

    def watching(*args: Any, **kwargs: Any) -> Any:
        note(name, function, args, kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, watching)
    try:
        yield
    finally:
        setattr(owner, name, function)
