"""Inference: samplers."""

from .samplers import SAMPLERS, Sampler

__all__ = ["SAMPLERS", "Sampler"]
