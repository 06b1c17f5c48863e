"""The diffusers schedulers that the engine accepts, and why it refuses the others.

An accepted scheduler recovers the standard deviation of Gaussian data from its exact denoiser, more closely with more
steps (``tests/inference/test_schedulers.py``). The denoiser predicts noise, data or v as the config says, for the EDM
schedulers the F of Karras et al. 2022 (arXiv 2206.00364), for the FlowMatch schedulers a velocity.
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
# config keys that only schedulers for this kind of model have
_KEYS = {
    "betas": {"beta_start", "beta_end", "beta_schedule", "trained_betas"},
    "flow matching": {"shift", "base_shift", "max_shift", "invert_sigmas", "stochastic_sampling"},
    "EDM": {"sigma_data"},
}
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "LTXEulerAncestralRFScheduler")


def check_scheduler(scheduler: Any) -> None:
    """Raises a ValueError that names a scheduler which would give wrong samples, and why."""
    kind = type(scheduler)
    reason = _reason(scheduler)
    if reason is not None:
        raise ValueError(f"scheduler must be one of {', '.join(TAKEN)}, got {kind.__name__}: {reason}")


def clips(scheduler: Any) -> bool:
    """Whether it clips the data it predicts, to +-1 by default."""
    base = _base(scheduler)
    if base is None or base.__name__ == "CogVideoXDDIMScheduler":  # that has clip_sample, and makes no use of it
        return False
    config = _own_config(scheduler)
    return bool(config.get("clip_sample") or config.get("thresholding"))


def _base(scheduler: Any) -> type | None:
    """The class of diffusers' that it is of."""
    bases = [base for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers.schedulers.")]
    return next((base for base in bases if base.__name__ != "SchedulerMixin"), None)


def _own_config(scheduler: Any) -> dict[str, Any]:
    """Its config without what from_config keeps of another class's: all but defaults that were never saved."""
    made_by = [vars(base)["__init__"] for base in type(scheduler).__mro__ if "__init__" in vars(base)]
    accepted = {key for each in made_by for key in inspect.signature(each).parameters}
    return {key: value for key, value in scheduler.config.items() if key in accepted}


def _reason(scheduler: Any) -> str | None:
    """Why a scheduler is not taken, or None; of a class that is not diffusers' only the step's form is checked."""
    if not all(callable(getattr(scheduler, name, None)) for name in ("set_timesteps", "step")):
        return "it has no set_timesteps and step"
    base = _base(scheduler)
    if base is None:
        return _reason_of_step(scheduler)
    if base.__name__ in TAKEN:
        return _reason_of_step(scheduler) or _reason_of_config(scheduler, base)
    return _REFUSED.get(base.__name__, "nobody has seen whether its samples are right")


def _reason_of_step(scheduler: Any) -> str | None:
    try:
        inspect.signature(scheduler.step).bind("output", "timestep", "sample")  # as it is called
    except TypeError as error:
        return f"its step cannot be called as step(output, timestep, sample): {error}"
    return None


def _reason_of_config(scheduler: Any, base: type) -> str | None:
    config = _own_config(scheduler)
    if config.get("stochastic_sampling"):
        return "with stochastic_sampling=True samples come out too narrow"
    if config.get("invert_sigmas"):
        return "with invert_sigmas=True it goes from data to noise"
    if config.get("interpolation_type") == "log_linear":
        return "with interpolation_type='log_linear' samples come out too narrow"
    prediction, flow = config.get("prediction_type"), bool(config.get("use_flow_sigmas"))
    if prediction == "flow_prediction" and not flow:
        return "prediction_type='flow_prediction' needs use_flow_sigmas=True, its noise is that of betas"
    if flow and prediction != "flow_prediction":
        return f"use_flow_sigmas=True needs prediction_type='flow_prediction', got {prediction!r}"
    return _reason_of_another_kind(scheduler, base, config, flow)


def _reason_of_another_kind(scheduler: Any, base: type, own_config: dict[str, Any], flow: bool) -> str | None:
    kind = "flow matching" if flow or base.__name__ in _FLOWS else "EDM" if "sigma_data" in own_config else "betas"
    unused = scheduler.config.keys() - own_config.keys()
    for other, keys in _KEYS.items():
        if other != kind and unused & keys:
            return (
                f"its config is that of a model trained on {other} ({', '.join(sorted(unused & keys))}), which it has "
                "no use for: for a model of its own kind make it without from_config"
            )
    return None
