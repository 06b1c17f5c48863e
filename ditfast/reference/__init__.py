"""The specification: each fused operator as a formula (``ops``), and the paper's model in plain PyTorch (``dit``)."""

from . import ops
from .dit import DiT

__all__ = ["DiT", "ops"]
