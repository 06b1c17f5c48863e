"""Launching kernels without a GPU: Triton's own JIT and launchers over a stub of the driver's library."""

from .driver import GPUS, Compilation, Rehearsal, rehearse, unavailable
from .torch_kernels import nothing_computed

__all__ = ["GPUS", "Compilation", "Rehearsal", "nothing_computed", "rehearse", "unavailable"]
