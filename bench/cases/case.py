"""What is measured: a case is one model at one batch, dtype and mode; the defaults of a device."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ditfast.config import MODELS, VAE_FACTOR, DiTConfig

Mode = Literal["forward", "cfg", "train", "train-checkpoint"]
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
    def training(self) -> bool:
        return is_training(self.mode)

    @property
    def columns(self) -> dict[str, Any]:
        """What every row says of its case, by the rows' field names."""
        return {
            "model": self.config.name,
            "conditioning": self.config.conditioning,
            "latent_size": self.config.latent_hw,
            "batch": self.batch,
            "dtype": self.dtype_name,
            "mode": self.mode,
        }

    @property
    def label(self) -> str:
        height, width = self.config.latent_hw
        size = "" if (height, width) == (32, 32) else f" {height * VAE_FACTOR}x{width * VAE_FACTOR} px"
        return f"{self.config.name}{size} batch {self.batch}, {self.mode}, {self.dtype_name}"


@dataclass(frozen=True)
class Defaults:
    """What a suite measures where the user names nothing; ``large_size`` in pixels is for the models in /2 besides."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    dtype: torch.dtype
    providers: tuple[str, ...]
    seconds: float = 1.0
    modes: tuple[Mode, ...] = ("forward",)
    large_size: str | None = None


_CPU_PROVIDERS = ("reference", "reference-compile", "ditfast")
_GPU_PROVIDERS = (
    "reference-tf32",
    "reference-autocast",
    "reference",
    "reference-compile",
    "reference-max-autotune",
    "reference-reduce-overhead",
    "diffusers",
    "diffusers-compile",
    "ditfast",
    "ditfast-compile",
    "ditfast-graph",
)
# small models at honest sizes; compiling is most of the time, and two cases keep it under two minutes on two slow cores
_CPU_QUICK = Defaults(("DiT-S/8", "DiT-S/4"), (8,), torch.float32, _CPU_PROVIDERS)
_CPU_FULL = Defaults(
    ("DiT-S/8", "DiT-S/4", "DiT-S/2"),
    (1, 8),
    torch.float32,
    (*_CPU_PROVIDERS, "ditfast-compile"),
    modes=("forward", "cfg", "train"),
)
_GPU_QUICK = Defaults(("DiT-XL/2",), (1, 256), torch.bfloat16, _GPU_PROVIDERS)
_GPU_FULL = Defaults(
    tuple(MODELS), (1, 8, 32, 128, 256), torch.bfloat16, _GPU_PROVIDERS, modes=MODES, large_size="512"
)


def defaults(device: torch.device, full: bool = False) -> Defaults:
    """Of ``ditfast bench``, or with ``full`` of ``ditfast bench models``."""
    if device.type == "cuda":
        return _GPU_FULL if full else _GPU_QUICK
    return _CPU_FULL if full else _CPU_QUICK


def is_training(mode: str) -> bool:
    """Whether a mode is a training step."""
    return mode.startswith("train")


def parse_mode(name: str) -> Mode:
    """The mode of that name.

    Raises:
        ValueError: unknown name.
    """
    for mode in MODES:
        if mode == name:
            return mode
    raise ValueError(unknown("mode", name, MODES))


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


def unknown(subject: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is none of ``known``, with the nearest of them."""
    names = list(known)
    lower = {known.lower(): known for known in names}
    nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)
    hint = f"; did you mean {lower[nearest[0]]!r}?" if nearest else ""
    return f"{subject} must be one of {', '.join(names)}, got {name!r}{hint}"


def make_cases(
    configs: Collection[DiTConfig],
    batches: Collection[int],
    dtypes: Collection[torch.dtype],
    modes: Collection[Mode],
) -> list[Case]:
    """Every model in every mode and dtype at every batch, small batches first, without repetitions."""
    return [
        Case(config, batch, dtype, mode)
        for config in dict.fromkeys(configs)
        for mode in dict.fromkeys(modes)
        for dtype in dict.fromkeys(dtypes)
        for batch in sorted(set(batches))
    ]
