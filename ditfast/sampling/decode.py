"""Latents to pixels: diffusers' AutoencoderKL from a local folder, in slices within a memory budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SCALING = 0.18215  # what DiT's latents were multiplied by; the autoencoder's config says the same
_COPIES = 4  # of the largest activation: a residual block at full size holds three, a convolution's own memory beside
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def autoencoder_files(folder: Path) -> list[Path]:
    """Config and weights of an autoencoder's folder, or of ``vae/`` in a pipeline's.

    Raises:
        ValueError: there is none.
    """
    for place in (folder, folder / "vae"):
        weights = next((place / name for name in _WEIGHTS if (place / name).is_file()), None)
        if weights is not None and (place / "config.json").is_file():
            return [place / "config.json", weights]
    raise ValueError(
        f"--vae must be the folder of a diffusers AutoencoderKL, with config.json and {_WEIGHTS[0]}, got {folder}"
    )


class Decoder:
    """An autoencoder that turns latents into uint8 images.

    Args:
        folder: of :func:`autoencoder_files`; nothing is downloaded.
        channels: of the checkpoint's latents.
        scaling: what the checkpoint's latents were multiplied by in training.
        device, dtype: where it computes, and in what.
        budget_mib: of memory for the activations, which decides how many images are decoded at once.

    Raises:
        ValueError: no autoencoder, without diffusers, or one whose channels or scaling are not the checkpoint's.
    """

    def __init__(
        self,
        folder: Path,
        channels: int,
        *,
        scaling: float = SCALING,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        budget_mib: float = 4096,
    ) -> None:
        config_file, weights = autoencoder_files(folder)
        config = _read_config(config_file)
        _check_fit(config, channels, scaling, folder)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ValueError(
                f"--vae needs the package diffusers (pip install diffusers): {error}; --latents needs none"
            ) from None
        try:
            vae: Any = AutoencoderKL.from_pretrained(
                config_file.parent,
                local_files_only=True,
                low_cpu_mem_usage=False,  # else a warning without the package accelerate
                use_safetensors=weights.suffix == ".safetensors",
                torch_dtype=dtype,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"--vae cannot be loaded from {folder}: {error}") from error
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.dtype = dtype
        self.scaling, self.shift = scaling, float(config.get("shift_factor") or 0.0)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.budget_mib = budget_mib
        if not budget_mib > 0:
            raise ValueError(f"--decode-mib must be above 0, got {budget_mib}")

    def slice_size(self, latent_hw: tuple[int, int]) -> int:
        """Images decoded at once: as many as the budget holds, at least one."""
        pixels = latent_hw[0] * latent_hw[1] * self.factor**2
        # at full size a residual block reads the channels of the level below
        widest = max(self.vae.config.block_out_channels[:2])
        each = _COPIES * pixels * widest * torch.finfo(self.dtype).bits // 8
        return max(1, int(self.budget_mib * 2**20 // each))

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> npt.NDArray[np.uint8]:
        """(N, C, h, w) -> (N, H, W, 3), by the official release's rule: 127.5 x + 128, clamped and cut to uint8.

        Raises:
            ValueError: an image that is not finite, naming its place in the batch.
        """
        images = []
        size = self.slice_size((latents.shape[2], latents.shape[3]))
        for begin in range(0, len(latents), size):
            part = (latents[begin : begin + size].float() / self.scaling + self.shift).to(self.dtype)
            pixels = self.vae.decode(part).sample.float()
            finite = pixels.isfinite().flatten(1).all(1)
            if not finite.all():
                image = begin + int((~finite).nonzero()[0])
                raise ValueError(
                    f"the autoencoder's image is not finite for image {image} of the batch; try --vae-dtype fp32"
                )
            cut = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
            images.append(cut.permute(0, 2, 3, 1).cpu().numpy())
        return np.ascontiguousarray(np.concatenate(images))


def _check_fit(config: dict[str, Any], channels: int, scaling: float, folder: Path) -> None:
    vae_channels = config.get("latent_channels", 4)
    if vae_channels != channels:
        raise ValueError(
            f"--vae must decode the checkpoint's {channels} latent channels, got an autoencoder of "
            f"{vae_channels}: {folder}"
        )
    vae_scaling = config.get("scaling_factor", SCALING)
    if vae_scaling is None or abs(vae_scaling - scaling) > 1e-6 * abs(scaling):
        raise ValueError(
            f"--vae must scale as the checkpoint's latents are, {scaling:g}, "
            f"got scaling_factor {vae_scaling}: {folder}; "
            "a checkpoint of that scaling needs --latent-scaling"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        name = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"--vae must be a diffusers AutoencoderKL, got {name}: {path.parent}")
    return config
