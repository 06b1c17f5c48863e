"""Inference: samplers, guidance, the engine that runs them on a schedule table and CUDA graphs."""

from .engine import Engine
from .guidance import Guidance
from .samplers import SAMPLERS, Sampler
from .table import ScheduleTable

__all__ = ["SAMPLERS", "Engine", "Guidance", "Sampler", "ScheduleTable"]
