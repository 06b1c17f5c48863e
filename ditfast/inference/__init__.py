"""Inference: samplers, guidance, the engine that runs them on a schedule table and CUDA graphs; metrics of samples."""

from ..evaluation.evaluate import Evaluation, evaluate
from .engine import Engine
from .guidance import Guidance
from .samplers import SAMPLERS, Sampler
from .table import ScheduleTable

__all__ = ["SAMPLERS", "Engine", "Evaluation", "Guidance", "Sampler", "ScheduleTable", "evaluate"]
