"""The fast models: the reference's modules, names and parameters with a fused forward."""

from .dit import DiT

__all__ = ["DiT"]
