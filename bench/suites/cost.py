"""The cost of models: providers traced on meta tensors, case by case, as the rows of ``ditfast bench cost``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import ditfast
from ditfast import ops, reference
from ditfast.checkpoint import diffusers as diffusers_format
from ditfast.config import DiTConfig
from ditfast.training import diffusion_loss

from ..cases import diffusers_dit
from ..cases.case import Case, Mode, unknown
from ..cases.workload import inference_call
from ..cost.count import Cost, count
from ..cost.roofline import datasheet_bounds
from ..records.rows import CostRow

MODES: tuple[Mode, ...] = ("forward", "cfg", "train")


def _build_diffusers(config: DiTConfig) -> nn.Module:
    from diffusers import DiTTransformer2DModel  # type: ignore[import-not-found, unused-ignore]

    model = DiTTransformer2DModel.from_config(diffusers_format.config_to_diffusers(config))
    return diffusers_dit.DiffusersDiT(model, config.null_class)


#: name -> how it is built on the meta device.
BUILDERS: Mapping[str, Callable[[DiTConfig], nn.Module]] = {
    "reference": reference.DiT,
    "diffusers": _build_diffusers,
    "ditfast": ditfast.DiT,
}
PROVIDERS = tuple(BUILDERS)


def unavailable(provider: str, case: Case) -> str | None:
    """Why a provider cannot be traced in a case, or None.

    Raises:
        ValueError: no such provider; names the nearest.
    """
    if provider not in BUILDERS:
        raise ValueError(unknown("provider", provider, BUILDERS))
    if provider == "ditfast" and case.training and find_spec("triton") is None:
        return "its backward's launches are those of the kernels, which need the package triton"
    return diffusers_dit.unavailable(case, torch.device("meta")) if provider == "diffusers" else None


def trace(config: DiTConfig, batch: int, dtype: torch.dtype, mode: Mode, provider: str) -> Cost:
    """What one call of a provider's eager model launches, moves and computes on a GPU.

    Args:
        config: the model.
        batch: images; cfg runs 2 * batch samples.
        dtype: of the weights and the latents.
        mode: "forward", "cfg" or "train": the diffusion loss and its backward, without the optimiser.
        provider: one of ``PROVIDERS``; ditfast with its kernels on.

    Raises:
        ValueError: an argument does not fit, naming it; or the provider cannot run the case, with the reason.
    """
    if mode not in MODES:
        raise ValueError(unknown("mode", mode, MODES))
    case = Case(config, batch, dtype, mode)
    reason = unavailable(provider, case)
    if reason is not None:
        raise ValueError(f"{provider} cannot be traced in {case.label}: {reason}")
    with torch.device("meta"):
        # the module's own to(): diffusers' warns about modules to keep in fp32, of which it has none
        model = nn.Module.to(BUILDERS[provider](config), dtype).eval()
    inputs = _inputs(case)
    if not case.training:
        step = inference_call(model, mode)
        with ops.use_backend("triton"):
            return count(lambda: step(inputs))

    def loss(run: Callable[..., Tensor]) -> Tensor:
        x0, t, y, noise = inputs
        return diffusion_loss(run, x0, t, y, noise)

    # the loss makes its tables in its first call in a process: they belong to no step
    loss(lambda x, t, y: x)
    with ops.use_backend("triton"):
        # the loss noises in fp32; not every model casts what it is given
        return count(lambda: loss(lambda x, t, y: model(x.to(dtype), t, y)).backward(), grad=True)


def run(cases: Iterable[Case], providers: Iterable[str] = PROVIDERS) -> Iterator[CostRow]:
    """Every provider on every case, one row after another; a provider that cannot run a case has none.

    Raises:
        ValueError: an unknown provider, or a mode that is not traced.
    """
    providers = list(providers)
    for case in cases:
        for provider in providers:
            if unavailable(provider, case) is None:
                yield _row(case, provider)


def _row(case: Case, provider: str) -> CostRow:
    cost = trace(case.config, case.batch, case.dtype, case.mode, provider)
    return CostRow(
        **case.columns,
        provider=provider,
        launches=cost.total_launches,
        bytes=cost.total_bytes,
        flops=cost.total_flops,
        intensity=cost.intensity,
        roofline_ms=datasheet_bounds(cost, case.dtype_name),
    )


def _inputs(case: Case) -> tuple[Any, ...]:
    """As ``workload.make_inputs``, without values."""
    samples = case.batch * (2 if case.mode == "cfg" else 1)
    with torch.device("meta"):
        x = torch.empty(samples, case.config.in_channels, *case.config.latent_hw, dtype=case.dtype)
        t, y = torch.empty(samples, dtype=torch.int64), torch.empty(case.batch, dtype=torch.int64)
        return (x, t, y, torch.empty_like(x)) if case.training else (x, t, y)
