"""The options of a sampling run, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..environment import package_version
from .decode import SCALING, autoencoder_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Request:
    """The options of ``ditfast sample``; a field is named as its option is."""

    checkpoint: Path
    num: int | None = None
    classes: str | None = None
    class_names: Sequence[str] = ()
    class_file: Path | None = None
    sampler: str = "ddpm"
    steps: int = 250
    cfg_scale: float = 4.0
    guided_channels: int | Literal["all"] = 3
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    guidance_power: float | None = None
    seed: int = 0
    batch_size: int = 32
    vae: Path | None = None
    vae_dtype: str = "fp32"
    latent_scaling: float = SCALING
    decode_mib: float = 4096
    latents: bool = False
    out: Path | None = None
    npz: Path | None = None
    weights: str = "auto"
    num_heads: int | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    table_mib: float = 2048
    graphs: bool = True

    def check(self) -> None:
        """Checks the options themselves, before anything is loaded.

        Raises:
            ValueError: naming the option.
        """
        if self.out is None and self.npz is None:
            raise ValueError("give --out DIR for PNGs and a grid, or --npz FILE for one file of all images")
        if self.npz is not None and self.npz.suffix != ".npz":
            raise ValueError(f"--npz must be a file name that ends in .npz, got {self.npz}")
        if self.vae is None and not self.latents:
            raise ValueError("give --vae PATH, an autoencoder's folder, for images, or --latents to do without one")
        if self.vae is not None and self.latents:
            raise ValueError("--latents is without an autoencoder: leave out --vae, or --latents")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"--seed must be in 0..2^64 - 1, got {self.seed}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        if not 0 < self.latent_scaling < math.inf:
            raise ValueError(f"--latent-scaling must be a finite number above 0, got {self.latent_scaling}")
        if not self.checkpoint.exists():
            raise ValueError(f"--checkpoint: no such file or folder: {self.checkpoint}")
        if self.vae is not None:
            autoencoder_files(self.vae)
            if self.npz is None and not package_version("pillow"):
                raise ValueError("PNGs need the package pillow (pip install pillow); --npz FILE needs none")


def parse_dtype(name: str, option: str) -> torch.dtype:
    """A dtype by its short name; ``option`` is for the message."""
    if name not in DTYPES:
        raise ValueError(f"{option} must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
