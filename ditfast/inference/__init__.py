"""Inference: samplers and guidance."""

from .guidance import Guidance
from .samplers import SAMPLERS, Sampler

__all__ = ["SAMPLERS", "Guidance", "Sampler"]
