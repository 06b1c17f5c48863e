"""Training: the diffusion loss."""

from .loss import GaussianDiffusion, diffusion_loss

__all__ = ["GaussianDiffusion", "diffusion_loss"]
