"""The diffusion loss DiT trains with: noise prediction, and a learned variance through the variational bound.

Sources: Ho et al. 2020 (arXiv 2006.11239), equations 4, 7, 12, 13; Nichol & Dhariwal 2021 (arXiv 2102.09672),
equations 15 and 16. As in the official release: 1000 steps, linear betas from 1e-4 to 2e-2, and the mean
detached inside the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..reference.transforms import makes_plain_tensors


class GaussianDiffusion:
    """The per-timestep constants of the forward process, fp64 tensors of shape (steps,)."""

    def __init__(self, steps: int = 1000, device: torch.device | str = "cpu") -> None:
        betas = torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64, device=device)
        alphas_bar = (1 - betas).cumprod(0)
        alphas_bar_prev = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
        variance = betas * (1 - alphas_bar_prev) / (1 - alphas_bar)
        self.steps = steps
        self.sqrt_alphas_bar = alphas_bar.sqrt()
        self.sqrt_one_minus_alphas_bar = (1 - alphas_bar).sqrt()
        self.mean_x0 = betas * alphas_bar_prev.sqrt() / (1 - alphas_bar)
        self.mean_xt = (1 - alphas_bar_prev) * (1 - betas).sqrt() / (1 - alphas_bar)
        self.max_log_variance = betas.log()
        # the posterior's variance is 0 at step 0: take step 1's there
        self.min_log_variance = torch.cat([variance[1:2], variance[1:]]).log()


@lru_cache(maxsize=8)
def _cached_diffusion(device: torch.device) -> GaussianDiffusion:
    with torch.inference_mode(False):
        constants = GaussianDiffusion(device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams may be the next to read them
    return constants


def _diffusion(device: torch.device) -> GaussianDiffusion:
    return _cached_diffusion(device) if makes_plain_tensors(device) else GaussianDiffusion(device=device)


def diffusion_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, y: Tensor, noise: Tensor
) -> Tensor:
    """MSE of the predicted noise, plus the variational bound where the model predicts a variance.

    Args:
        model: ``model(x_t, t, y)`` -> (B, C, h, w), or (B, 2C, h, w) with a learned-range variance.
        x0: clean latents (B, C, h, w).
        t: timesteps (B,), int64 in [0, 1000).
        y: labels (B,).
        noise: standard normal, of x0's shape.

    Returns:
        The mean over the batch: a scalar, at least fp32.

    Raises:
        ValueError: the model's output has neither C nor 2C channels, or noise not x0's shape.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have x0's shape {tuple(x0.shape)}, got {tuple(noise.shape)}")
    dtype = torch.promote_types(x0.dtype, torch.float32)
    diffusion = _diffusion(x0.device)

    def at(values: Tensor) -> Tensor:
        return values[t].to(dtype).view(-1, 1, 1, 1)

    x0, noise = x0.to(dtype), noise.to(dtype)
    xt = at(diffusion.sqrt_alphas_bar) * x0 + at(diffusion.sqrt_one_minus_alphas_bar) * noise
    output = model(xt, t, y).to(dtype)
    channels = x0.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(f"model must return {channels} or {2 * channels} channels, got {output.shape[1]}")
    epsilon = output[:, :channels]
    loss = (noise - epsilon).square().flatten(1).mean(1)
    if output.shape[1] == channels:
        return loss.mean()

    # the bound trains the variance only: the mean is detached
    x0_predicted = (xt - at(diffusion.sqrt_one_minus_alphas_bar) * epsilon.detach()) / at(diffusion.sqrt_alphas_bar)
    mean = at(diffusion.mean_x0) * x0_predicted + at(diffusion.mean_xt) * xt
    fraction = (output[:, channels:] + 1) / 2
    low, high = at(diffusion.min_log_variance), at(diffusion.max_log_variance)
    log_variance = fraction * high + (1 - fraction) * low
    true_mean = at(diffusion.mean_x0) * x0 + at(diffusion.mean_xt) * xt
    kl = _normal_kl(true_mean, low, mean, log_variance)
    bound = torch.where(t.view(-1, 1, 1, 1) == 0, -_discretised_log_likelihood(x0, mean, log_variance), kl)
    return (loss + bound.flatten(1).mean(1) / math.log(2.0)).mean()


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)), elementwise, in nats."""
    difference = log_variance2 - log_variance1
    return 0.5 * (difference - 1 + (-difference).exp() + (mean1 - mean2).square() * (-log_variance2).exp())


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of a normal's mass over the bin of width 2/255 around x in [-1, 1] (Ho et al., equation 13)."""
    inverse_std = (-0.5 * log_variance).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse_std)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp_min(1e-12).log()
