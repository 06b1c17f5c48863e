"""Which of diffusers' schedulers step a model of class and time from noise to data: told by numbers.

Those taken give data of a Gaussian its standard deviation back from its exact denoiser, the better the more steps
(``tests/test_inference_schedulers.py``): a denoiser of noise, data or v as their config says, for the EDM schedulers
the F of Karras et al. 2022 (arXiv 2206.00364), for the FlowMatch schedulers a velocity.
"""

from __future__ import annotations

import inspect
from typing import Any

TAKEN = (
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)

_TOKENS = "it samples discrete tokens"
_DISTILLED = "it is for models distilled to few steps, another model's samples come out too narrow"
_INVERSE = "it goes from data to noise"
_REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "CMStochasticIterativeScheduler": _DISTILLED,
    "FlowMapEulerDiscreteScheduler": "its models are told two times",
    "FlowMatchLCMScheduler": _DISTILLED,
    "HeliosDMDScheduler": _DISTILLED,
    "LCMScheduler": _DISTILLED,
    "PiflowScheduler": _DISTILLED,
    "SCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "CosineDPMSolverMultistepScheduler": "its noise ends at sigma 0.3, samples come out too narrow",
    "DDPMWuerstchenScheduler": "it has one timestep more than steps, and its models are told times in 0..1",
    "HeliosScheduler": "it steps through stages of several sizes",
    "IPNDMScheduler": "its models predict v at angles in 0..1, whatever its config says",
    "MiniMaxH3Scheduler": "it has one step less than it is asked for",
    "RFD4ProteinaScheduler": "it is for proteins",
    "UnCLIPScheduler": "its step must be told the previous timestep, samples come out too wide",
}
_STEP = ["model_output", "timestep", "sample"]


def check_scheduler(scheduler: Any) -> None:
    """Raises a ValueError that names a scheduler which would give wrong samples, and why."""
    kind = type(scheduler)
    reason = _reason(scheduler)
    if reason is not None:
        raise ValueError(f"scheduler must be one of {', '.join(TAKEN)}, got {kind.__name__}: {reason}")


def _reason(scheduler: Any) -> str | None:
    """Why a scheduler is not taken, or None; one of no class of diffusers' is asked for its step's form alone."""
    if not all(callable(getattr(scheduler, name, None)) for name in ("set_timesteps", "step")):
        return "it has no set_timesteps and step"
    bases = [base for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers.schedulers.")]
    for base in bases:
        if base.__name__ in TAKEN:
            return _reason_of_step(scheduler) or _reason_of_config(scheduler, base)
        if base.__name__ != "SchedulerMixin":
            return _REFUSED.get(base.__name__, "nobody has seen whether its samples are right")
    return _reason_of_step(scheduler)


def _reason_of_step(scheduler: Any) -> str | None:
    required = [each for each in inspect.signature(scheduler.step).parameters.values() if each.default is each.empty]
    needed = [each.name for each in required if each.kind is each.POSITIONAL_OR_KEYWORD]
    return None if needed == _STEP else f"its step takes ({', '.join(needed)}), not ({', '.join(_STEP)})"


def _reason_of_config(scheduler: Any, base: type) -> str | None:
    if scheduler.config.get("stochastic_sampling"):
        return "with stochastic_sampling=True samples come out too narrow"
    # from_config keeps what another class's config says, but for defaults that were never saved
    betas = {"beta_start", "beta_end", "beta_schedule"} & scheduler.config.keys()
    if betas - inspect.signature(base).parameters.keys():
        return (
            "its config is that of a model trained on betas, which it has no use for: "
            "for a model of its own kind make it without from_config"
        )
    return None
