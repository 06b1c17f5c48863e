"""Floating-point operations and weight bytes of a model, counted without a device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ... import reference
from ...config import DiTConfig
from ..cases.case import Mode, is_training


@lru_cache(maxsize=64)
def flops_per_image(config: DiTConfig, mode: Mode) -> int:
    """FLOPs of the reference for one image, 2 for a multiply-accumulate; counted on the meta device.

    cfg runs two samples an image; training counts the forward and the backward, neither the optimiser nor what
    activation checkpointing computes twice.
    The count is the reference's for every provider, so that work a provider saves shows as speed.
    """
    with torch.device("meta"):
        model = reference.DiT(config).eval()
        x = torch.empty(1, config.in_channels, *config.latent_hw)
        index = torch.zeros(1, dtype=torch.int64)
    training = is_training(mode)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        output = model(x, index, index)
        if training:
            output.sum().backward()
    return int(counter.get_total_flops()) * (2 if mode == "cfg" else 1)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights a call has to read: all but the label table, of which it reads a few rows."""
    return sum(p.nbytes for name, p in model.named_parameters() if "embedding_table" not in name)
