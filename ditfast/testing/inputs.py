"""Random weights and inputs. A fresh adaLN-Zero DiT outputs zero, so nothing is measured or compared without these."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ditfast.config import DiTConfig


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every trainable parameter anew, scaled so that activations stay of order one. Returns the model.

    The draw is made in fp32 where the parameters are, so that it is the same in every dtype and every process.
    On the meta device there is nothing to draw.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.is_meta:
            continue
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        value = torch.randn(parameter.shape, generator=generators[parameter.device], device=parameter.device)
        if parameter.ndim == 1:
            is_norm_weight = name.endswith("weight")
            value = value * 0.1 + (1.0 if is_norm_weight else 0.0)
        elif "embedding_table" in name:
            value = value * 0.5
        else:
            value = value / math.sqrt(parameter[0].numel())
        parameter.copy_(value)
    return model


def random_batch(
    config: DiTConfig,
    batch: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, C, h, w) in ``dtype``, timesteps (B,) in 0..999, labels (B,) without the null class.

    Drawn on the CPU: the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *config.latent_hw, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    y = torch.randint(0, config.num_classes, (batch,), generator=generator)
    return x.to(device, dtype), t.to(device), y.to(device)
