"""ditfast makes any DiT fast without changing what it computes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops, reference
    from .adapters import register_adapter
    from .adapters.accelerate import accelerate, accelerated, restore
    from .checkpoint.files import load_checkpoint, save_checkpoint
    from .config import MODELS, DiTConfig
    from .inference.graphed import graphed
    from .inference.pipeline import DiTPipeline
    from .model.dit import DiT

__version__ = "0.1.0.dev0"

__all__ = [
    "MODELS",
    "DiT",
    "DiTConfig",
    "DiTPipeline",
    "__version__",
    "accelerate",
    "accelerated",
    "graphed",
    "load_checkpoint",
    "ops",
    "reference",
    "register_adapter",
    "restore",
    "save_checkpoint",
]

# name -> module that defines it; "" where the name is the module
_LAZY = {
    "DiT": "model.dit",
    "DiTConfig": "config",
    "DiTPipeline": "inference.pipeline",
    "MODELS": "config",
    "accelerate": "adapters.accelerate",
    "accelerated": "adapters.accelerate",
    "graphed": "inference.graphed",
    "load_checkpoint": "checkpoint.files",
    "save_checkpoint": "checkpoint.files",
    "ops": "",
    "reference": "",
    "register_adapter": "adapters",
    "restore": "adapters.accelerate",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, so nothing here does until it is asked for
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LAZY[name]
    value = import_module(f".{module or name}", __name__)
    if module:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
