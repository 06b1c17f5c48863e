"""diffusers' DiT as a provider: its own class and numeric constants, the reference's weights and interface."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ditfast.checkpoint import diffusers as diffusers_format
from ditfast.reference import ops

from .case import Case
from .variants import Transform, Variant, inference_variant, training_variant
from .workload import Workload

# the class's sinusoid has shift 1, and its own default for the second norm's epsilon is 1e-5
CONSTANTS: dict[str, float] = {**diffusers_format.CONSTANTS, "norm2_eps": 1e-5}


def missing() -> str | None:
    """That the package is not installed and how to get it, or None."""
    if find_spec("diffusers") is None:
        return "the package diffusers is not installed (pip install ditfast[diffusers])"
    return None


def unavailable(case: Case, device: torch.device) -> str | None:
    """The provider's ``unavailable``."""
    if (reason := missing()) is not None:
        return reason
    try:
        diffusers_format.config_to_diffusers(case.config)
    except ValueError as error:
        return str(error)
    return None


class DiffusersDiT(nn.Module):
    """diffusers' model under the reference's interface, with the reference's guidance."""

    def __init__(self, model: Any, null_class: int | None) -> None:
        super().__init__()
        self.model, self.null_class = model, null_class
        self.blocks = model.transformer_blocks

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.model.pos_embed.proj.weight.dtype)  # which the reference does by itself
        output: Tensor = self.model(x, timestep=t, class_labels=y, return_dict=False)[0]
        return output

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int = 3) -> Tensor:
        y = torch.cat([y, torch.full_like(y, self.null_class or 0)])
        half = x[: len(x) // 2]
        return ops.guide(self(torch.cat([half, half]), t, y), cfg_scale, guided_channels)


def wrap(work: Workload) -> DiffusersDiT:
    """diffusers' model with the workload's weights, in eval mode."""
    from diffusers import DiTTransformer2DModel  # type: ignore[import-not-found, unused-ignore]

    case = work.case
    values = {**diffusers_format.config_to_diffusers(case.config), "norm_eps": CONSTANTS["norm2_eps"]}
    with torch.device(work.device):
        model = DiTTransformer2DModel.from_config(values)
    # the class's own to() warns about modules to keep in fp32, of which it has none
    model = nn.Module.to(model, case.dtype).eval()
    tensors = diffusers_format.tensors_to_diffusers(work.model.state_dict(), case.config.depth)
    model.load_state_dict(tensors, strict=True)
    return DiffusersDiT(model, case.config.null_class)


def build(work: Workload, transform: Transform | None = None) -> Variant:
    """The provider's ``build``."""
    case, wrapped = work.case, wrap(work)
    if case.training:
        # the embedders' weights are repeated in every block, and so are parts of their gradients
        return training_variant(wrapped, case.mode, transform=transform, comparable=False)
    return inference_variant(wrapped, case.mode, shared=False, transform=transform)
