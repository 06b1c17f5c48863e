"""The solvers: each family of samplers around diffusers' schedulers, with tables in fp64."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

TRAIN_STEPS = 1000


class Solver(Protocol):
    """One family: x and output have the working dtype; ``reset`` drops the state that steps leave behind."""

    timesteps: Tensor  # what the model is given, (evaluations,)
    init_noise_sigma: float

    def reset(self) -> None: ...
    def model_input(self, x: Tensor, i: int) -> Tensor: ...
    def step(self, x: Tensor, output: Tensor, i: int, generators: list[torch.Generator] | None) -> Tensor: ...


def respace(steps: int) -> list[int]:
    """The kept timesteps, ascending: 0..999 in strides of 999 / (steps - 1), each rounded.

    Source: ``space_timesteps(1000, [steps])`` of improved-diffusion, which the official release samples with.
    """
    respaced, position = [], 0.0
    for _ in range(steps):
        respaced.append(round(position))
        position += (TRAIN_STEPS - 1) / (steps - 1)  # a sum, as there: a product rounds ties to other timesteps
    return respaced


def alphas_bar() -> Tensor:
    """The official schedule's cumulative products of 1 - beta, (1000,), fp64."""
    betas = torch.linspace(1e-4, 2e-2, TRAIN_STEPS, dtype=torch.float64, device="cpu")
    return (1 - betas).cumprod(0)


class Ancestral:
    """DDPM and DDIM on the respaced process: one of ``steps`` timesteps, which has the kept timesteps' alphas_bar.

    As in improved-diffusion. diffusers' own spacings are no way to it: DDIM's step takes the previous timestep for
    1000 // steps lower, whatever the spacing.
    """

    def __init__(self, name: str, steps: int, eta: float) -> None:
        diffusers = load_diffusers()
        timesteps = respace(steps)
        self.timesteps = torch.tensor(timesteps[::-1])
        self._eta, self._last = eta, steps - 1
        common: dict[str, Any] = {"num_train_timesteps": steps, "clip_sample": False}
        if name == "ddim":
            self._schedulers = [diffusers.DDIMScheduler(**common)]
            self._schedulers[0].set_timesteps(steps)
        else:
            # by the output's channels over x's: C are the noise alone, 2C bring a variance
            variances = ("fixed_large", "learned_range")
            self._schedulers = [diffusers.DDPMScheduler(variance_type=kind, **common) for kind in variances]
        for scheduler in self._schedulers:
            # all that a step reads; diffusers rounds its own to fp32
            scheduler.alphas_cumprod = alphas_bar()[timesteps]
        self.init_noise_sigma = float(self._schedulers[0].init_noise_sigma)

    def reset(self) -> None:
        pass  # no step depends on another

    def model_input(self, x: Tensor, i: int) -> Tensor:
        return cast(Tensor, self._schedulers[0].scale_model_input(x, self._last - i))

    def step(self, x: Tensor, output: Tensor, i: int, generators: list[torch.Generator] | None) -> Tensor:
        channels = x.shape[1]
        if len(self._schedulers) == 1:
            noise, options = output[:, :channels], {"eta": self._eta}
            scheduler = self._schedulers[0]
        else:
            noise, options = output, {}
            scheduler = self._schedulers[output.shape[1] // channels - 1]
        # a Python number as the timestep keeps the look-ups on the host
        result = scheduler.step(noise, self._last - i, x, generator=generators, return_dict=False, **options)
        return cast(Tensor, result[0])


class Multistep:
    """DPM-Solver++(2M) on predictions of the data.

    diffusers' step casts the sample to fp32. The sample enters it as (sigma_next / sigma) * x, so the step is
    taken from 0, and x's part is added here in x's dtype.
    """

    def __init__(self, steps: int) -> None:
        self._scheduler = load_diffusers().DPMSolverMultistepScheduler(
            num_train_timesteps=TRAIN_STEPS, solver_order=2, prediction_type="sample", final_sigmas_type="zero"
        )
        self._scheduler.set_timesteps(steps)
        self.timesteps = self._scheduler.timesteps.clone()
        self.init_noise_sigma = float(self._scheduler.init_noise_sigma)
        bars = torch.cat([alphas_bar()[self.timesteps], torch.ones(1, dtype=torch.float64)])
        self._ratios = ((1 - bars) / bars).sqrt()
        self._alphas, self._sigmas = bars.sqrt().tolist(), (1 - bars).sqrt().tolist()

    def reset(self) -> None:
        self._scheduler.set_timesteps(len(self.timesteps))
        self._scheduler.sigmas = self._ratios
        self._scheduler.set_begin_index(0)

    def model_input(self, x: Tensor, i: int) -> Tensor:
        return cast(Tensor, self._scheduler.scale_model_input(x))

    def step(self, x: Tensor, output: Tensor, i: int, generators: list[torch.Generator] | None) -> Tensor:
        data = (x - self._sigmas[i] * output[:, : x.shape[1]]) / self._alphas[i]
        change = self._scheduler.step(data, 0, torch.zeros((), device="cpu"), return_dict=False)[0]
        return cast(Tensor, self._sigmas[i + 1] / self._sigmas[i] * x + change)


class Flow:
    """Euler's and Heun's methods; diffusers' sigma runs from 1 (noise) to 0 (data) with velocity noise - data.

    diffusers' steps cast the sample to fp32, and Heun's takes the velocity from differences of samples. A velocity
    moves any sample alike, so the step is taken from 0, and x is added here in its own dtype.
    """

    init_noise_sigma = 1.0

    def __init__(self, name: str, steps: int, noise_at: int) -> None:
        diffusers = load_diffusers()
        self._steps, self._heun = steps, name == "heun"
        kind = diffusers.FlowMatchHeunDiscreteScheduler if self._heun else diffusers.FlowMatchEulerDiscreteScheduler
        self._scheduler = kind(num_train_timesteps=TRAIN_STEPS)
        sigmas = torch.arange(steps, -1, -1, dtype=torch.float64, device="cpu") / steps
        if self._heun:
            sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        evaluated = sigmas if self._heun else sigmas[:-1]
        self.timesteps = (evaluated if noise_at else 1 - evaluated).float()
        self._sign = 1 if noise_at else -1
        # Heun's divides by the last sigma what it has multiplied by it: a power of 2 that no other sigma notices
        self._sigmas = sigmas.clamp_min(2.0**-64) if self._heun else sigmas
        self._from: Tensor | None = None  # x at the start of Heun's step

    def reset(self) -> None:
        self._scheduler.set_timesteps(self._steps)
        self._scheduler.sigmas = self._sigmas
        self._scheduler.set_begin_index(0)
        self._from = None

    def model_input(self, x: Tensor, i: int) -> Tensor:
        return x

    def step(self, x: Tensor, output: Tensor, i: int, generators: list[torch.Generator] | None) -> Tensor:
        velocity = self._sign * output[:, : x.shape[1]]
        change = self._scheduler.step(velocity, 0.0, torch.zeros((), device="cpu"), return_dict=False)[0]
        start = x if self._from is None else self._from
        self._from = x if self._heun and self._from is None else None
        return cast(Tensor, start + change)


def load_diffusers() -> Any:
    """The package, imported when a sampler is made.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        message = "samplers need the package diffusers, which is not installed: pip install ditfast[diffusers]"
        raise ModuleNotFoundError(message, name="diffusers") from error
    return diffusers
