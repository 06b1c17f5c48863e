"""The specification: each fused operator as a formula (:mod:`.ops`), the paper's model in plain PyTorch (:mod:`.dit`)."""

from . import ops
from .dit import DiT

__all__ = ["DiT", "ops"]
