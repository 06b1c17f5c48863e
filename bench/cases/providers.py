"""The providers: everything that can run a case, ours and the rivals, by name. A new one is one ``register``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

import ditfast

from . import diffusers_dit
from .case import Case, unknown
from .precision import float32_precision
from .transforms import compile_unavailable, compiled, graphed
from .variants import Switch, Transform, Variant, inference_variant, training_variant
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
        isolate: whether on a GPU it runs in a process of its own: compilation, its caches and private memory
            pools would otherwise be the neighbours' too.
    """

    name: str
    summary: str
    build: Callable[[Workload], Variant]
    unavailable: Callable[[Case, torch.device], str | None] = lambda case, device: None
    precision: str | None = None
    constants: Mapping[str, float] = field(default_factory=dict)
    isolate: bool = False


PROVIDERS: dict[str, Provider] = {}


def register(provider: Provider) -> None:
    """Adds a provider to the registry.

    Raises:
        ValueError: the name is taken.
    """
    if provider.name in PROVIDERS:
        raise ValueError(f"name must be new, got {provider.name!r}, which is registered")
    PROVIDERS[provider.name] = provider


def load_plugins(names: Sequence[str]) -> None:
    """Imports the modules (``package.module``) or files (``folder/file.py``) that register providers, once each.

    Raises:
        ValueError: there is none of that name, or it fails.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                load_file(Path(name).resolve())
            else:
                importlib.import_module(name)
        except Exception as error:  # whatever a user's file raises
            raise ValueError(f"--plugin {name} cannot be loaded: {type(error).__name__}: {error}") from error


def load_file(path: Path) -> ModuleType:
    """A .py file as a module, once in a process."""
    name = f"ditfast_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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


def _autocast_unavailable(case: Case, device: torch.device) -> str | None:
    return "autocast is for bf16 and fp16" if case.dtype == torch.float32 else None


def _build_reference(work: Workload, transform: Transform | None = None) -> Variant:
    if work.case.training:
        return training_variant(work.own_model(), work.case.mode, transform=transform)
    return inference_variant(work.model, work.case.mode, shared=True, transform=transform)


def _build_fp32(work: Workload, switch: Switch) -> Variant:
    """The reference with fp32 weights and inputs under a context that lowers the precision of its matmuls."""
    model = work.own_model(torch.float32)
    if work.case.training:
        return training_variant(model, work.case.mode, dtype=torch.float32, switch=switch)
    return inference_variant(model, work.case.mode, shared=False, dtype=torch.float32, switch=switch)


def _build_tf32(work: Workload) -> Variant:
    return _build_fp32(work, partial(float32_precision, "high"))


def _build_autocast(work: Workload) -> Variant:
    return _build_fp32(work, partial(torch.autocast, work.device.type, work.case.dtype))


def _build_ditfast(work: Workload, transform: Transform | None = None) -> Variant:
    source = work.own_model() if work.case.training else work.model
    with torch.device("meta"):
        model = ditfast.DiT(work.case.config)
    model.load_state_dict(source.state_dict(), assign=True)
    model.eval()
    if work.case.training:
        return training_variant(model, work.case.mode, transform=transform)
    return inference_variant(model, work.case.mode, shared=True, transform=transform)


def _graphed_unavailable(case: Case, device: torch.device) -> str | None:
    if case.training:
        return "graphs are captured for inference only"
    return _needs_cuda(case, device)


def _diffusers_compile_unavailable(case: Case, device: torch.device) -> str | None:
    return diffusers_dit.unavailable(case, device) or compile_unavailable(device)


register(
    Provider(
        "reference-tf32",
        "the reference, eager, fp32 weights with TF32 matmuls: as officially released",
        _build_tf32,
        _tf32_unavailable,
        precision="tf32",
    )
)
register(
    Provider(
        "reference-autocast",
        "the reference, eager, fp32 weights under torch.autocast in the case's dtype",
        _build_autocast,
        _autocast_unavailable,
    )
)
register(Provider("reference", "the reference, eager, in the case's dtype", _build_reference))
for _name, _mode in (
    ("reference-compile", "default"),
    ("reference-max-autotune", "max-autotune-no-cudagraphs"),
    ("reference-reduce-overhead", "reduce-overhead"),
):
    register(
        Provider(
            _name,
            f"the reference under torch.compile, mode {_mode}",
            partial(_build_reference, transform=partial(compiled, mode=_mode)),
            _compile_unavailable,
            isolate=True,
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
register(
    Provider(
        "diffusers-compile",
        "the same under torch.compile",
        partial(diffusers_dit.build, transform=compiled),
        _diffusers_compile_unavailable,
        constants=diffusers_dit.CONSTANTS,
        isolate=True,
    )
)
# isolated too: a fault in a kernel of ours must not take the rivals down with it
register(Provider("ditfast", "ditfast.DiT", _build_ditfast, isolate=True))
register(
    Provider(
        "ditfast-compile",
        "ditfast.DiT under torch.compile",
        partial(_build_ditfast, transform=compiled),
        _compile_unavailable,
        isolate=True,
    )
)
register(
    Provider(
        "ditfast-graph",
        "ditfast.DiT in a CUDA graph with static buffers",
        partial(_build_ditfast, transform=graphed),
        _graphed_unavailable,
        isolate=True,
    )
)
