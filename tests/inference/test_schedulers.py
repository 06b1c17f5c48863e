"""diffusers' schedulers in the engine: a Gaussian comes back from its exact denoiser, or the scheduler is refused."""

import inspect
import math

import pytest
import torch
from torch import nn

from ditfast.inference import Engine

diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: E402

from ditfast.inference.pipeline import _SchedulerSteps  # noqa: E402
from ditfast.inference.schedulers import _REFUSED, TAKEN, check_scheduler, clips  # noqa: E402

# tens of thousands, of diffusers' own numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
STD = 0.5
SHAPE = (16, 4, 16, 16)
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "LTXEulerAncestralRFScheduler")
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


class Exact(nn.Module):
    """The exact prediction for data ~ N(0, STD^2), of the type in the scheduler's config."""

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler, self.config = scheduler, {"prediction_type": "epsilon", **scheduler.config}

    def forward(self, x, t, y):
        kind, name = self.config["prediction_type"], type(self.scheduler).__name__
        t = t.double().view(-1, 1, 1, 1)
        if name in EDM:
            scale = self.config["sigma_data"]
            sigma = (4 * t).exp()
            x = x * (sigma**2 + scale**2).sqrt()
            data = STD**2 / (STD**2 + sigma**2) * x
            output = (data - scale**2 / (sigma**2 + scale**2) * x) * (sigma**2 + scale**2).sqrt() / (sigma * scale)
            return -output if kind == "v_prediction" else output
        if name in FLOWS or kind == "flow_prediction":
            signal, sigma = 1 - t / 1000, t / 1000
        else:  # between two timesteps as the schedulers have it
            bars = self.scheduler.alphas_cumprod.double()
            logs, low = (1 / bars - 1).log() / 2, t.floor().long().clamp(max=998)
            noise = ((low + 1 - t) * logs[low] + (t - low) * logs[low + 1]).exp()
            signal, sigma = 1 / (1 + noise**2).sqrt(), noise / (1 + noise**2).sqrt()
        variance = (signal * STD) ** 2 + sigma**2
        data, noise = signal * STD**2 * x / variance, sigma * x / variance
        if name in FLOWS or kind == "flow_prediction":
            return noise - data
        return {"epsilon": noise, "sample": data, "v_prediction": signal * noise - sigma * data}[kind]


def build(name, **config):
    cls = getattr(diffusers, name)
    common = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
    return cls(**{key: common[key] for key in common if key in inspect.signature(cls).parameters}, **config)


def std(scheduler, steps):
    scheduler.set_timesteps(steps)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    model = Exact(scheduler).eval()
    return float(Engine(model, _SchedulerSteps(scheduler, False), null_class=0)(noise, [0] * len(noise)).std())


def assert_comes_back(name, **config):
    """Extrapolates the step error's first order away; allows three standard deviations of this many draws."""
    order = getattr(diffusers, name).order  # as many times the model is called in a step
    steps = 50 if "DDPM" in name or "Ancestral" in name else 32  # with drawn noise the error falls later
    few, many = (std(build(name, **config), count // order) for count in (steps, 4 * steps))
    assert abs(few - STD) < 0.15 * STD
    assert abs((4 * many - few) / 3 - STD) < 0.015 * STD + 3 * STD / math.sqrt(2 * math.prod(SHAPE)), (few, many)


@pytest.mark.parametrize("name", TAKEN)
def test_a_gaussian_comes_back(name):
    try:
        build(name)
    except ImportError as error:  # scipy, torchsde
        pytest.skip(str(error).strip())
    assert_comes_back(name)


VARIANTS = [
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),  # another init_noise_sigma
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),  # of 4096
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("HeunDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "sample"}),
    ("KDPM2DiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    ("DDPMScheduler", {"prediction_type": "sample"}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("EDMEulerScheduler", {"sigma_data": 1.0, "prediction_type": "v_prediction"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=str)
def test_configs_that_scale_or_predict_otherwise(name, config):
    assert_comes_back(name, **config)


@pytest.mark.parametrize("name", [*FLOWS, *EDM])
def test_a_config_of_betas_is_no_flows(name):
    """from_config keeps it: the model predicts noise, and would be taken for another."""
    scheduler = getattr(diffusers, name).from_config(build("DDIMScheduler").config)
    with pytest.raises(ValueError, match=rf"got {name}: its config is that of a model trained on betas \(beta_end"):
        _SchedulerSteps(scheduler, False)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OF_ANOTHER_KIND = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "DDIMScheduler", r"flow matching \(shift\)"),
    ("FlowMatchEulerDiscreteScheduler", {"base_shift": 0.4}, "EDMEulerScheduler", r"flow matching \(base_shift\)"),
    ("EDMEulerScheduler", {"sigma_data": 1.0}, "DPMSolverMultistepScheduler", r"EDM \(sigma_data\)"),
    ("EDMEulerScheduler", {"sigma_data": 1.0}, "FlowMatchHeunDiscreteScheduler", r"EDM \(sigma_data\)"),
]


@pytest.mark.parametrize(("name", "config", "into", "trained_on"), OF_ANOTHER_KIND, ids=str)
def test_a_config_of_another_kind(name, config, into, trained_on):
    scheduler = getattr(diffusers, into).from_config(build(name, **config).config)
    with pytest.raises(ValueError, match=f"got {into}: its config is that of a model trained on {trained_on}"):
        check_scheduler(scheduler)


def test_a_config_of_the_same_kind():
    flow, edm = build("FlowMatchEulerDiscreteScheduler", shift=3.0), build("EDMEulerScheduler", sigma_data=1.0)
    check_scheduler(diffusers.LTXEulerAncestralRFScheduler.from_config(flow.config))
    check_scheduler(diffusers.UniPCMultistepScheduler.from_config(flow.config, **FLOW))
    check_scheduler(diffusers.EDMDPMSolverMultistepScheduler.from_config(edm.config))
    check_scheduler(diffusers.FlowMatchHeunDiscreteScheduler.from_config({**flow.config, "invert_sigmas": True}))
    check_scheduler(diffusers.DPMSolverMultistepScheduler.from_config(build("DDIMScheduler").config))


SOLVERS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
WRONG = [
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling=True"),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=True it goes from data to noise"),
    *((name, {"prediction_type": "flow_prediction"}, "needs use_flow_sigmas=True") for name in SOLVERS),
    *((name, {"use_flow_sigmas": True}, "needs prediction_type='flow_prediction', got 'epsilon'") for name in SOLVERS),
]


@pytest.mark.parametrize(("name", "config", "reason"), WRONG, ids=str)
def test_a_config_whose_samples_are_wrong(name, config, reason):
    with pytest.raises(ValueError, match=f"got {name}: .*{reason}"):
        check_scheduler(build(name, **config))


@pytest.mark.parametrize("name", SOLVERS)
def test_flows_by_the_solvers_are_taken(name):
    check_scheduler(build(name, **FLOW))


def test_schedulers_that_clip():
    for name, config in [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"thresholding": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ]:
        cls = getattr(diffusers, name)
        check_scheduler(cls(**config))
        assert clips(cls(**config))
    assert not clips(build("DDIMScheduler"))
    assert not clips(diffusers.CogVideoXDDIMScheduler(clip_sample=True))  # it makes no use of it
    config = diffusers.DDIMScheduler(clip_sample=True).config
    assert not clips(diffusers.DPMSolverMultistepScheduler.from_config(config))  # nor that
    assert not clips(object())


def test_steps_are_asked_for_the_call_they_get():
    class Passes(diffusers.DDIMScheduler):
        def step(self, *args, **options):
            return super().step(*args, **options)

    class Named:
        def set_timesteps(self, steps):
            raise AssertionError

        def step(self, model_output, t, sample):
            raise AssertionError

    class Keyword(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, *, strength):
            raise AssertionError

    check_scheduler(Passes())
    check_scheduler(Named())
    with pytest.raises(ValueError, match="got Keyword: its step cannot be called as .*'strength'"):
        check_scheduler(Keyword())


def test_a_scheduler_of_ones_own():
    class Mine(diffusers.DDIMScheduler):
        def __init__(self, **config):
            super().__init__(**config)

    class Strange(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, mask):
            raise AssertionError

    class Narrow(diffusers.TCDScheduler):
        pass

    _SchedulerSteps(Mine(), False)
    with pytest.raises(ValueError, match=r"got Strange: its step cannot be called as .*'mask'"):
        _SchedulerSteps(Strange(), False)
    with pytest.raises(ValueError, match="got Narrow: it is for models distilled"):
        _SchedulerSteps(Narrow(), False)
    with pytest.raises(TypeError, match="sampler must have timesteps, start, model_input and step, got DDIMScheduler"):
        Engine(nn.Identity(), diffusers.DDIMScheduler())


def test_every_other_is_refused_before_the_model_is_called():
    names = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    for name in sorted({*names, *_REFUSED} - set(TAKEN)):
        cls = getattr(diffusers, name, None)
        if cls is None or not issubclass(cls, SchedulerMixin):
            continue  # another version of diffusers, or a missing package
        with pytest.raises(ValueError, match=f"scheduler must be one of .*DDIMScheduler.*, got {name}: "):
            _SchedulerSteps(cls.__new__(cls), False)
