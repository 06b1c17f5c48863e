"""What is measured: a case is one model at one batch, dtype and mode; the defaults of a device."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ditfast.config import MODELS, DiTConfig

Mode = Literal["forward", "cfg", "train"]
MODES: tuple[Mode, ...] = get_args(Mode)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_ALIASES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


@dataclass(frozen=True)
class Case:
    """One model at one batch, dtype and mode. ``batch`` counts images: cfg runs 2 * batch samples."""

    config: DiTConfig
    batch: int
    dtype: torch.dtype
    mode: Mode = "forward"

    def __post_init__(self) -> None:
        if isinstance(self.batch, bool) or not isinstance(self.batch, int):
            raise TypeError(f"batch must be an int, got {self.batch!r}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.mode == "cfg" and self.config.null_class is None:
            raise ValueError("mode cfg needs a null class: class_dropout_prob must be above 0, got 0")

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def label(self) -> str:
        return f"{self.config.name} batch {self.batch}"


@dataclass(frozen=True)
class Defaults:
    """What ``ditfast bench`` measures where the user names nothing."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    dtype: torch.dtype
    providers: tuple[str, ...]
    seconds: float


# small models at honest sizes; compiling is most of the time, and two cases keep it under two minutes on two slow cores
_CPU = Defaults(
    models=("DiT-S/8", "DiT-S/4"),
    batches=(8,),
    dtype=torch.float32,
    providers=("reference", "reference-compile", "ditfast"),
    seconds=1.0,
)
_GPU = Defaults(
    models=tuple(MODELS),
    batches=(1, 32, 256),
    dtype=torch.bfloat16,
    providers=(
        "reference-tf32",
        "reference",
        "reference-compile",
        "reference-max-autotune",
        "reference-reduce-overhead",
        "diffusers",
        "ditfast",
        "ditfast-compile",
        "ditfast-graph",
    ),
    seconds=1.0,
)


def defaults(device: torch.device) -> Defaults:
    return _GPU if device.type == "cuda" else _CPU


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a name such as "bf16".

    Raises:
        ValueError: unknown name.
    """
    key = name.lower().removeprefix("torch.")
    key = _DTYPE_ALIASES.get(key, key)
    if key not in DTYPES:
        raise ValueError(unknown("dtype", name, DTYPES))
    return DTYPES[key]


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)


def parse_image_size(text: str) -> tuple[int, int]:
    """Pixels (height, width) of "256" or "256x512".

    Raises:
        ValueError: anything else.
    """
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"image size must look like 256 or 256x512 (height x width), got {text!r}")
    return int(parts[0]), int(parts[-1])


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is none of ``known``, with the nearest of them."""
    names = list(known)
    lower = {known.lower(): known for known in names}
    nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)
    hint = f"; did you mean {lower[nearest[0]]!r}?" if nearest else ""
    return f"{what} must be one of {', '.join(names)}, got {name!r}{hint}"


def make_cases(
    configs: Collection[DiTConfig], batches: Collection[int], dtype: torch.dtype, mode: Mode
) -> list[Case]:
    """Every model at every batch, small batches first, without repetitions."""
    return [Case(config, batch, dtype, mode) for config in dict.fromkeys(configs) for batch in sorted(set(batches))]
