"""diffusers' DiTPipeline around an accelerated transformer: tiny random weights, seconds on a CPU.

Run: python examples/diffusers_pipeline.py
With the released weights: pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256", torch_dtype=torch.float16)
"""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import logging

import ditfast

STEPS, CLASSES, SEED = 4, [207, 360], 0


def random_transformer() -> Any:
    """A small DiT; every parameter is drawn anew, for a fresh one gives zeros whatever its blocks do."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=36, num_layers=4, sample_size=8, out_channels=8
    )
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def random_autoencoder() -> Any:
    torch.manual_seed(SEED)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def noise(shape: tuple[int, ...], dtype: torch.dtype, **_: Any) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(dtype)


def images(pipe: Any) -> torch.Tensor:
    """(2, 16, 16, 3) in 0..1."""
    # the same noise in every precision: the pipeline draws it in the model's
    with patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", noise):
        return torch.from_numpy(pipe(CLASSES, num_inference_steps=STEPS, output_type="np").images)


def main() -> None:
    logging.set_verbosity_error()
    pipe = DiTPipeline(random_transformer(), random_autoencoder(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    before = images(pipe)
    # what diffusers itself gives in fp64 tells how far its own rounding is off
    exact = images(copy.deepcopy(pipe).to(torch.float64))

    print(ditfast.accelerate(pipe.transformer))
    after = images(pipe)

    rounding, difference = ((value - exact).norm() / exact.norm() for value in (before, after))
    print(f"images {tuple(after.shape)}, relative error before {rounding:.1e}, after {difference:.1e}")
    if not difference <= 1.25 * rounding + torch.finfo(torch.float32).eps / 4:
        raise SystemExit("the accelerated pipeline gives other images")
    print("agreement: images ok")


if __name__ == "__main__":
    main()
