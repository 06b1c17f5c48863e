"""The providers: everything that can run a case, ours and the rivals, by name. A new one is one ``register``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

import ditfast

from . import diffusers_dit
from .cases import Case, unknown
from .precision import float32_precision
from .transforms import compile_unavailable, compiled, graphed
from .variants import Transform, Variant, inference_variant, training_variant
from .workload import Workload


@dataclass(frozen=True)
class Provider:
    """One way to run a case.

    Attributes:
        name: as given to --providers; ours are "ditfast" and "ditfast-...", all others are rivals.
        summary: what it is, in a line.
        build: makes it for a workload; may raise, which becomes a row.
        unavailable: why it cannot run a case on a device, or None.
        precision: what it computes in, where that is not the case's dtype.
        constants: fields of the config in which its function differs from the case's; its oracle and
            yardstick are the reference with these.
    """

    name: str
    summary: str
    build: Callable[[Workload], Variant]
    unavailable: Callable[[Case, torch.device], str | None] = lambda case, device: None
    precision: str | None = None
    constants: Mapping[str, float] = field(default_factory=dict)


PROVIDERS: dict[str, Provider] = {}


def register(provider: Provider) -> None:
    """Adds a provider to the registry.

    Raises:
        ValueError: the name is taken.
    """
    if provider.name in PROVIDERS:
        raise ValueError(f"name must be new, got {provider.name!r}, which is registered")
    PROVIDERS[provider.name] = provider


def get_provider(name: str) -> Provider:
    """The provider of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name not in PROVIDERS:
        raise ValueError(unknown("provider", name, PROVIDERS))
    return PROVIDERS[name]


def _needs_cuda(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA GPU"


def _tf32_unavailable(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    return None if torch.cuda.get_device_capability(device)[0] >= 8 else "needs a GPU with TF32 (sm_80 or newer)"


def _compile_unavailable(case: Case, device: torch.device) -> str | None:
    return compile_unavailable(device)


def _build_reference(work: Workload, transform: Transform | None = None) -> Variant:
    if work.case.mode == "train":
        return training_variant(work.own_model(), transform=transform)
    return inference_variant(work.model, work.case.mode, shared=True, transform=transform)


def _build_tf32(work: Workload) -> Variant:
    model = work.own_model(torch.float32)
    tf32 = partial(float32_precision, "high")
    if work.case.mode == "train":
        return training_variant(model, dtype=torch.float32, switch=tf32)
    return inference_variant(model, work.case.mode, shared=False, dtype=torch.float32, switch=tf32)


def _build_ditfast(work: Workload, transform: Transform | None = None) -> Variant:
    training = work.case.mode == "train"
    source = work.own_model() if training else work.model
    with torch.device("meta"):
        model = ditfast.DiT(work.case.config)
    model.load_state_dict(source.state_dict(), assign=True)
    model.eval()
    if training:
        return training_variant(model, transform=transform)
    return inference_variant(model, work.case.mode, shared=True, transform=transform)


def _graphed_unavailable(case: Case, device: torch.device) -> str | None:
    if case.mode == "train":
        return "graphs are captured for inference only"
    return _needs_cuda(case, device)


register(
    Provider(
        "reference-tf32",
        "the reference, eager, fp32 weights with TF32 matmuls: as officially released",
        _build_tf32,
        _tf32_unavailable,
        precision="tf32",
    )
)
register(Provider("reference", "the reference, eager, in the case's dtype", _build_reference))
for _name, _mode, _unavailable in (
    ("reference-compile", "default", _compile_unavailable),
    ("reference-max-autotune", "max-autotune-no-cudagraphs", _compile_unavailable),
    ("reference-reduce-overhead", "reduce-overhead", _compile_unavailable),
):
    register(
        Provider(
            _name,
            f"the reference under torch.compile, mode {_mode}",
            partial(_build_reference, transform=partial(compiled, mode=_mode)),
            _unavailable,
        )
    )
register(
    Provider(
        "diffusers",
        "diffusers' DiTTransformer2DModel with the same weights and its own constants",
        diffusers_dit.build,
        diffusers_dit.unavailable,
        constants=diffusers_dit.CONSTANTS,
    )
)
register(Provider("ditfast", "ditfast.DiT", _build_ditfast))
register(
    Provider(
        "ditfast-compile",
        "ditfast.DiT under torch.compile",
        partial(_build_ditfast, transform=compiled),
        _compile_unavailable,
    )
)
register(
    Provider(
        "ditfast-graph",
        "ditfast.DiT in a CUDA graph with static buffers",
        partial(_build_ditfast, transform=graphed),
        _graphed_unavailable,
    )
)
