"""Classifier-free guidance on one batch of 2N: which channels, at which steps, how strongly, and its rescaling.

Sources: Ho & Salimans 2022 (arXiv 2207.12598); the interval of Kynkaanniemi et al. 2024 (arXiv 2404.07724); the
rescaling of Lin et al. 2024 (arXiv 2305.08891), equations 15 and 16; the power-cosine schedule of MDT (arXiv
2303.14389), which DiffiT (arXiv 2312.02139) takes over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """unconditional + scale * (conditional - unconditional), the scale being a function of the step.

    Args:
        scale: the strength; 1 is no guidance, 0 the unconditional prediction.
        channels: how many leading channels are guided: 3 as in the official release (or fewer where the latent has
            fewer), or "all" of the prediction, as in diffusers. The variance is never guided.
        interval: (low, high), both included, in the units of the t that the model is given (0..1000, or SiT's 0..1):
            outside of it the scale is 1.
        rescale: the share phi in [0, 1] of the prediction rescaled to the conditional one's standard deviation,
            which is taken for each image over the guided channels.
        power: the exponent p of the power-cosine schedule (4 in MDT): the scale rises from 1 at pure noise to
            ``scale`` at clean data as 1 + (scale - 1) * (1 - cos(pi * progress ** p)) / 2. None: constant.
        span: the model's t at pure noise and at clean data, as in ``Sampler.span``.

    Raises:
        ValueError: a field out of its range, naming it.
    """

    scale: float = 4.0
    channels: int | Literal["all"] = 3
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    power: float | None = None
    span: tuple[float, float] = (1000.0, 0.0)

    def __post_init__(self) -> None:
        if not _number(self.scale) or self.scale < 0:
            raise ValueError(f"scale must be a finite number >= 0, got {self.scale!r}")
        is_int = isinstance(self.channels, int) and not isinstance(self.channels, bool)
        if self.channels != "all" and not (is_int and self.channels >= 1):
            raise ValueError(f'channels must be "all" or an integer >= 1, got {self.channels!r}')
        if not _number(self.rescale) or not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be a number in [0, 1], got {self.rescale!r}")
        if self.power is not None and (not _number(self.power) or self.power <= 0):
            raise ValueError(f"power must be None or a finite number > 0, got {self.power!r}")
        if not _pair(self.span) or self.span[0] == self.span[1]:
            raise ValueError(f"span must be two different numbers (t at noise, t at data), got {self.span!r}")
        if self.interval is None:
            return
        if not _pair(self.interval) or not min(self.span) <= self.interval[0] <= self.interval[1] <= max(self.span):
            bounds = f"{min(self.span):g} <= low <= high <= {max(self.span):g}"
            raise ValueError(f"interval must be None or (low, high) with {bounds}, got {self.interval!r}")

    def scale_at(self, t: float) -> float:
        """The scale of the step at which the model is given ``t``, a Python number.

        Raises:
            ValueError: t is not within the span.
        """
        t = float(t)
        if not min(self.span) <= t <= max(self.span):
            raise ValueError(f"t must be within the span {self.span}, got {t:g}")
        slack = 1e-6 * abs(self.span[1] - self.span[0])  # a flow's t is fp32: 0.6 arrives as 0.60000002
        if self.interval is not None and not self.interval[0] - slack <= t <= self.interval[1] + slack:
            return 1.0
        if self.power is None:
            return float(self.scale)
        progress = (t - self.span[0]) / (self.span[1] - self.span[0])
        return 1.0 + (self.scale - 1.0) * (1.0 - math.cos(math.pi * progress**self.power)) / 2.0

    def __call__(self, output: Tensor, t: float, in_channels: int = 4) -> Tensor:
        """:meth:`apply` with the scale of the step at ``t``."""
        return self.apply(output, self.scale_at(t), in_channels)

    def apply(self, output: Tensor, scale: float | Tensor, in_channels: int = 4) -> Tensor:
        """The guided prediction of each image. A tensor scale is neither branched on nor read on the host.

        Args:
            output: the model's, (2N, C or 2C, h, w), conditional half first; any floating dtype.
            scale: a number, or a tensor of one element on output's device.
            in_channels: C, the channels of the prediction; what follows them is the conditional half's own.

        Returns:
            (N, C or 2C, h, w), in fp32, or fp64 where output is: guidance multiplies rounding errors too.

        Raises:
            ValueError: the shapes do not fit, or more channels are to be guided than there are.
        """
        if output.ndim != 4 or output.shape[0] % 2:
            raise ValueError(f"output must be a batch of 2N predictions (2N, C, h, w), got {tuple(output.shape)}")
        if output.shape[1] not in (in_channels, 2 * in_channels):
            expected = f"in_channels={in_channels} or {2 * in_channels} channels"
            raise ValueError(f"output must have {expected}, got {output.shape[1]}")
        if isinstance(scale, Tensor):
            if scale.numel() != 1:
                raise ValueError(f"scale must be a number or a tensor of one element, got {tuple(scale.shape)}")
            scale = scale.reshape(())
        conditional, unconditional = output.to(torch.promote_types(output.dtype, torch.float32)).chunk(2)
        if not isinstance(scale, Tensor) and scale == 1:
            return conditional
        count = self.guided_channels(in_channels)
        selected, pull = conditional[:, :count], unconditional[:, :count]
        guided = pull + scale * (selected - pull)
        if self.rescale:
            # a zero prediction has no deviation to divide by: it stays zero
            deviation = _deviation(guided).clamp_min(torch.finfo(guided.dtype).tiny)
            guided = guided * (self.rescale * (_deviation(selected) / deviation) + (1 - self.rescale))
        return torch.cat([guided, conditional[:, count:]], dim=1)

    def guided_channels(self, in_channels: int) -> int:
        """How many of a latent's channels are guided.

        Raises:
            ValueError: more than there are.
        """
        if self.channels == "all":
            return in_channels
        if self.channels == 3:  # the official number, as in DiT.forward_with_cfg
            return min(3, in_channels)
        if self.channels > in_channels:
            raise ValueError(f'channels must be "all" or in 1..{in_channels} for this latent, got {self.channels}')
        return self.channels


def _deviation(x: Tensor) -> Tensor:
    """The standard deviation of each image, (N, C, h, w) -> (N, 1, 1, 1)."""
    return x.std(dim=(1, 2, 3), keepdim=True, correction=0)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_number, value))
