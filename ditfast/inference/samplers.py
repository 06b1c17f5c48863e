"""Samplers: diffusers' schedulers behind one adapter that knows respacing, learned variances and SiT's time.

| name | solver | the model is given | steps |
|---|---|---|---|
| ddpm | ancestral: Ho et al. 2020 (arXiv 2006.11239), equations 6 and 7 | int64 | 2..1000 |
| ddim | Song et al. 2021 (arXiv 2010.02502), equations 12 and 16 | int64 | 2..1000 |
| dpm++ | DPM-Solver++(2M): Lu et al. 2022 (arXiv 2211.01095), algorithm 2 | int64 | 1..999 |
| euler, heun | flow matching as in SiT: Ma et al. 2024 (arXiv 2401.08740) | fp32 in [0, 1] | 1 or more |

The first three solve the official release's diffusion: 1000 linear betas from 1e-4 to 2e-2, the model predicts the
noise, the predicted data is not clipped. ddpm and ddim are respaced as officially, from 999 to 0; dpm++ takes
diffusers' "linspace" from 999 and ends with a step of first order to no noise at all. ddpm's variance is
interpolated where the model's output has 2C channels (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15), and the
respaced beta where it has C: "fixed large", as officially without ``learn_sigma``. The others read the first C alone.

The last two follow SiT's straight path as its code has it: x_t = t * data + (1 - t) * noise with t from 0 (noise) to 1
(data), velocity data - noise. The SiT paper and REPA turn the time round: x_t = (1 - t) * data + t * noise, velocity
noise - data; that is ``noise_at=1``. The steps are uniform. heun evaluates both ends of every step, the last included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .solvers import Ancestral, Flow, Multistep, Solver

SAMPLERS = ("ddpm", "ddim", "dpm++", "euler", "heun")
_FEWEST_AND_MOST = {"ddpm": (2, 1000), "ddim": (2, 1000), "dpm++": (1, 999)}


class Sampler:
    """One way from noise to data in a given number of steps; restarts for every batch, which it takes one at a time.

        x = sampler.start(noise)
        for i, t in enumerate(sampler.timesteps):
            x = sampler.step(x, model(sampler.model_input(x, i), t.expand(len(x)), y), i, generators)

    The solver computes in fp32, or fp64 where x is fp64, whatever the dtype of the model's output, and on x's device.
    Its coefficients are fp64 scalars on the host, so that no step waits for a GPU, with one exception: noise drawn by
    CPU generators (ddpm, ddim with eta) is copied over in each step. Noise is drawn in x's dtype: in fp64 it is other
    noise than in fp32.

    Args:
        name: one of ``SAMPLERS``.
        steps: solver steps; what each schedule can give is in the table above.
        in_channels: C, the latent's channels.
        device: where ``timesteps`` lies.
        eta: ddim's noise in [0, 1]: 0 is deterministic, 1 ancestral with the small variance.
        noise_at: the flow's t at pure noise, 0 or 1; only for euler and heun.

    Attributes:
        timesteps: what the model is given at each evaluation, (evaluations,): int64, or fp32 for flows. heun
            has two evaluations a step, the others one.
        span: the model's t at pure noise and at clean data, for :class:`ditfast.inference.Guidance`.

    Raises:
        ValueError: an argument out of its range, naming it.
        ModuleNotFoundError: diffusers is not installed.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        *,
        in_channels: int = 4,
        device: torch.device | str = "cpu",
        eta: float = 0.0,
        noise_at: int = 0,
    ) -> None:
        if name not in SAMPLERS:
            raise ValueError(f"name must be one of {', '.join(SAMPLERS)}, got {name!r}")
        fewest, most = _FEWEST_AND_MOST.get(name, (1, None))
        is_int = isinstance(steps, int) and not isinstance(steps, bool)
        if not is_int or steps < fewest or (most is not None and steps > most):
            bounds = f"in {fewest}..{most}" if most is not None else f">= {fewest}"
            raise ValueError(f"steps must be an integer {bounds} for {name!r}, got {steps!r}")
        if isinstance(in_channels, bool) or not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f"in_channels must be an integer >= 1, got {in_channels!r}")
        if not 0 <= eta <= 1 or (eta and name != "ddim"):
            raise ValueError(f"eta must be in [0, 1], and 0 for any sampler but 'ddim', got {eta!r} for {name!r}")
        flow = name in ("euler", "heun")
        if noise_at not in ((0, 1) if flow else (0,)):
            raise ValueError(f"noise_at must be 0, or 1 for 'euler' and 'heun', got {noise_at!r} for {name!r}")
        self.name, self.steps, self.in_channels = name, steps, in_channels
        self._solver: Solver
        if flow:
            self._solver = Flow(name, steps, noise_at)
        else:
            self._solver = Multistep(steps) if name == "dpm++" else Ancestral(name, steps, eta)
        self.span = (float(noise_at), float(1 - noise_at)) if flow else (1000.0, 0.0)
        self.timesteps = self._solver.timesteps.to(device)
        self._next: int | None = None  # the evaluation that step() waits for
        self._shape = torch.Size()

    def start(self, noise: Tensor) -> Tensor:
        """Forgets an earlier batch; standard normal noise (B, C, h, w) -> x of the first evaluation, fp32 or fp64.

        Raises:
            ValueError: noise is no such floating-point batch.
        """
        if noise.ndim != 4 or noise.shape[1] != self.in_channels or not noise.is_floating_point():
            expected = f"a floating-point batch (B, {self.in_channels}, h, w)"
            raise ValueError(f"noise must be {expected}, got {noise.dtype} of shape {tuple(noise.shape)}")
        self._solver.reset()
        self._next, self._shape = 0, noise.shape
        return noise.to(torch.promote_types(noise.dtype, torch.float32)) * self._solver.init_noise_sigma

    def model_input(self, x: Tensor, i: int) -> Tensor:
        """What the model is given at evaluation i in place of x, (B, C, h, w) -> the same."""
        self._check_turn(i)
        return self._solver.model_input(x, i)

    def step(self, x: Tensor, output: Tensor, i: int, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """x of evaluation i + 1, or the data after the last.

        Args:
            x: what :meth:`start` or the last step returned, (B, C, h, w).
            output: the model's, after guidance, (B, C or 2C, h, w), any floating dtype, on x's device.
            i: the evaluation, 0, 1, 2, ... in this order.
            generators: one for each image, which then draws the same noise in any batch; None draws from torch's
                global generator. A sampler that draws nothing leaves them alone.

        Returns:
            (B, C, h, w), fp32 or fp64. The official sampler draws no noise at the last step, nor does this.

        Raises:
            ValueError: not this evaluation's turn, or shapes or the number of generators that do not fit.
        """
        self._check_turn(i)
        if x.shape != self._shape:
            raise ValueError(f"x must have the shape given to start, {tuple(self._shape)}, got {tuple(x.shape)}")
        batch, channels, *size = x.shape
        if output.shape not in [(batch, n, *size) for n in (channels, 2 * channels)]:
            expected = f"({batch}, {channels} or {2 * channels}, {', '.join(map(str, size))})"
            raise ValueError(f"output must have shape {expected}, got {tuple(output.shape)}")
        if isinstance(generators, torch.Generator) or (generators is not None and len(generators) != batch):
            count = "a single one" if isinstance(generators, torch.Generator) else len(generators)
            raise ValueError(f"generators must be a sequence, one for each of {batch} images, got {count}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        draws: list[Any] | None = list(generators) if generators else None
        x = self._solver.step(x.to(dtype), output.to(dtype), i, draws)
        self._next = i + 1 if i + 1 < len(self.timesteps) else None
        return x

    def _check_turn(self, i: int) -> None:
        if self._next is None:
            raise ValueError(f"i={i} has no turn: no batch is under way; start(noise) begins one")
        if i != self._next:
            raise ValueError(f"i must be {self._next}, the next of {len(self.timesteps)} evaluations, got {i}")
