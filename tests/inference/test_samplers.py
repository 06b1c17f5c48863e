"""The samplers against the papers' formulas in fp64, exact solutions, and diffusers' own steps."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the package diffusers")
import diffusers  # noqa: E402

from ditfast.inference import SAMPLERS, Sampler  # noqa: E402
from ditfast.inference.solvers import respace  # noqa: E402
from ditfast.parity import judge, relative_error  # noqa: E402

DIFFUSION, FLOW = SAMPLERS[:3], SAMPLERS[3:]
BATCH, SHAPE = 3, (4, 4, 5)


def alphas_bar():
    product, bars = 1.0, []
    for i in range(1000):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * i / 999)
        bars.append(product)
    return bars


BARS = alphas_bar()


def toy(x, t):
    """A nonlinear elementwise model: noise (or velocity) and a variance in [-1, 1], 2C channels."""
    t = float(t) / 300
    return torch.cat([torch.tanh(0.8 * x + math.cos(t)), torch.sin(x + t)], dim=1)


def run(sampler, noise, model=toy, generators=None):
    """x after each evaluation."""
    x, path = sampler.start(noise), []
    for i, t in enumerate(sampler.timesteps):
        x = sampler.step(x, model(sampler.model_input(x, i), t), i, generators)
        path.append(x)
    return path


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(sources, dtype):
    return torch.stack([torch.randn(SHAPE, generator=source, dtype=dtype) for source in sources])


def ancestral(noise, steps, model, sources, dtype):
    """Ho et al. 2020, equations 6 and 7, and Nichol & Dhariwal 2021, equation 15, on the respaced process."""
    timesteps = [round(i * 999 / (steps - 1)) for i in range(steps)]
    x, path = noise.to(dtype), []
    for k in reversed(range(steps)):
        bar, before = BARS[timesteps[k]], BARS[timesteps[k - 1]] if k else 1.0
        beta = 1 - bar / before
        output = model(x, timesteps[k]).to(dtype)
        data = (x - math.sqrt(1 - bar) * output[:, :4]) / math.sqrt(bar)
        x = math.sqrt(before) * beta / (1 - bar) * data + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * x
        if k:
            upper, lower = math.log(beta), math.log(beta * (1 - before) / (1 - bar))
            fraction = (output[:, 4:] + 1) / 2 if output.shape[1] == 8 else 1  # C channels: the upper bound
            log_variance = fraction * upper + (1 - fraction) * lower
            x = x + (torch.exp(torch.as_tensor(log_variance / 2, dtype=dtype)) * draw(sources, noise.dtype)).to(dtype)
        path.append(x)
    return path


@pytest.mark.parametrize("steps", [10, 50, 250])
@pytest.mark.parametrize("model", [toy, lambda x, t: toy(x, t)[:, :4]], ids=["learned range", "fixed large"])
def test_ddpm_is_the_official_ancestral_sampler(steps, model):
    noise = torch.randn(BATCH, *SHAPE, dtype=torch.float64)
    ours = run(Sampler("ddpm", steps), noise, model, generators(1, 2, 3))
    official = ancestral(noise, steps, model, generators(1, 2, 3), torch.float64)
    assert len(ours) == steps
    for x, expected in zip(ours, official, strict=True):
        assert relative_error(x, expected) < 1e-11


@pytest.mark.quick
def test_ddpm_in_fp32_by_the_rule():
    noise = torch.randn(BATCH, *SHAPE)
    ours = run(Sampler("ddpm", 50), noise, generators=generators(1, 2, 3))
    yardstick, oracle = (
        ancestral(noise, 50, toy, generators(1, 2, 3), dtype) for dtype in (torch.float32, torch.float64)
    )
    for triple in zip(ours, yardstick, oracle, strict=True):
        assert triple[0].dtype == torch.float32
        assert judge("operator", *triple, torch.float32).ok


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_models_dtype_does_not_set_the_solvers(name):
    noise = torch.randn(BATCH, *SHAPE)
    low = run(Sampler(name, 6), noise, lambda x, t: toy(x, t).bfloat16(), generators(1, 2, 3))
    wide = run(Sampler(name, 6), noise, lambda x, t: toy(x, t).bfloat16().float(), generators(1, 2, 3))
    assert low[-1].dtype == torch.float32 and torch.equal(low[-1], wide[-1])


def test_respacing():
    assert respace(10) == list(range(0, 1000, 111)) and respace(1000) == list(range(1000))
    assert respace(250)[:8] == [0, 4, 8, 12, 16, 20, 24, 28] and respace(250)[-3:] == [991, 995, 999]
    # improved-diffusion adds the stride up: 10 * 49.95 stays below the tie at 499.5
    assert respace(21)[9:12] == [450, 499, 549]
    for steps in range(2, 1001):
        timesteps = respace(steps)
        assert len(set(timesteps)) == steps and timesteps[0] == 0 and timesteps[-1] == 999
        assert all(abs(t - i * 999 / (steps - 1)) < 0.5 + 1e-9 for i, t in enumerate(timesteps))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [7, 30])
def test_ddim_is_equation_12(steps, eta):
    noise = torch.randn(BATCH, *SHAPE, dtype=torch.float64)
    sources, x = generators(1, 2, 3), noise
    path = run(Sampler("ddim", steps, eta=eta), noise, generators=generators(1, 2, 3))
    timesteps = respace(steps)
    for k, ours in zip(reversed(range(steps)), path, strict=True):
        bar, before = BARS[timesteps[k]], BARS[timesteps[k - 1]] if k else 1.0
        sigma = eta * math.sqrt((1 - before) / (1 - bar) * (1 - bar / before))  # equation 16
        epsilon = toy(x, timesteps[k])[:, :4]
        data = (x - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
        x = math.sqrt(before) * data + math.sqrt(1 - before - sigma**2) * epsilon
        x = x + sigma * draw(sources, torch.float64) if eta else x
        assert relative_error(ours, x) < 1e-11


@pytest.mark.parametrize("steps", [1, 2, 10, 40])
def test_dpm_solver_is_algorithm_2(steps):
    noise = torch.randn(BATCH, *SHAPE, dtype=torch.float64)
    sampler = Sampler("dpm++", steps)
    times = sampler.timesteps.tolist()
    assert times == [round((steps - i) * 999 / steps) for i in range(steps)]
    bars = [*(BARS[t] for t in times), 1.0]
    x, previous = noise, None
    for i, ours in enumerate(run(sampler, noise)):
        alpha, sigma = math.sqrt(bars[i]), math.sqrt(1 - bars[i])
        alpha_next, sigma_next = math.sqrt(bars[i + 1]), math.sqrt(1 - bars[i + 1])
        data = (x - sigma * toy(x, times[i])[:, :4]) / alpha
        combined, decay = data, 0.0  # the last step, to no noise, is of first order
        if i + 1 < steps:
            h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
            decay = math.exp(-h)
            if i:
                before = math.log(math.sqrt(bars[i - 1]) / math.sqrt(1 - bars[i - 1]))
                r = (math.log(alpha / sigma) - before) / h
                combined = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * previous
        x, previous = sigma_next / sigma * x - alpha_next * (decay - 1) * combined, data
        assert relative_error(ours, x) < 1e-11


def test_dpm_solver_converges_in_second_order():
    """Data N(0.5, 0.6 ** 2): along the exact flow, (x - mean) / deviation stays what it was."""
    noise = torch.randn(BATCH, *SHAPE, dtype=torch.float64)

    def moments(t):
        return math.sqrt(BARS[t]) * 0.5, math.sqrt(BARS[t] * 0.36 + 1 - BARS[t])

    def epsilon(x, t):
        mean, deviation = moments(int(t))
        return math.sqrt(1 - BARS[int(t)]) / deviation**2 * (x - mean)

    (mean, deviation), errors = moments(999), []
    for steps in (37, 111, 333):  # all pass through t = 27
        sampler = Sampler("dpm++", steps)
        path = run(sampler, noise, epsilon)
        x = path[sampler.timesteps.tolist().index(27) - 1]
        expected = moments(27)[0] + moments(27)[1] * (noise - mean) / deviation
        errors.append((x - expected).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(9, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(9, rel=0.15)
    assert (path[-1] - (0.5 + 0.6 * (noise - mean) / deviation)).abs().max() < 1e-2


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_flows_converge_to_the_data(name, order, noise_at):
    """x_t = t * data + (1 - t) * noise, data N(0.5, 0.6 ** 2), velocity E[data - noise | x_t]: x_1 = 0.5 + 0.6 x_0."""
    noise = torch.randn(BATCH, *SHAPE, dtype=torch.float64)

    def velocity(x, t):
        t = abs(noise_at - t.double())  # SiT's code, or the SiT paper: time turned round
        variance = t**2 * 0.36 + (1 - t) ** 2
        pull = (x - t * 0.5) / variance
        v = (0.5 + t * 0.36 * pull) - (1 - t) * pull
        return torch.cat([v if noise_at == 0 else -v, x], dim=1)  # SiT has a second half, which is not read

    errors = []
    for steps in (40, 80):
        sampler = Sampler(name, steps, noise_at=noise_at)
        assert sampler.span == (noise_at, 1 - noise_at) and sampler.timesteps[0] == noise_at
        errors.append((run(sampler, noise, velocity)[-1] - (0.5 + 0.6 * noise)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert errors[1] < 0.1**order


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_steps_of_flows(steps):
    noise = torch.randn(BATCH, *SHAPE, dtype=torch.float64)
    grid = [i / steps for i in range(steps + 1)]
    euler, heun = Sampler("euler", steps), Sampler("heun", steps)
    assert torch.equal(euler.timesteps, torch.tensor(grid[:-1]))
    assert torch.equal(heun.timesteps, torch.tensor([t for pair in zip(grid, grid[1:], strict=False) for t in pair]))
    x, y = noise, noise
    path, pairs = run(euler, noise), run(heun, noise)
    for i in range(steps):
        t_now, t_next = euler.timesteps[i], heun.timesteps[2 * i + 1]
        x = x + toy(x, t_now)[:, :4] / steps
        first = toy(y, t_now)[:, :4]
        predicted = y + first / steps
        y = y + (first + toy(predicted, t_next)[:, :4]) / (2 * steps)
        for ours, expected in ((path[i], x), (pairs[2 * i], predicted), (pairs[2 * i + 1], y)):
            assert relative_error(ours, expected) < 1e-14


@pytest.mark.quick
@pytest.mark.parametrize("name", ["dpm++", "euler"])
def test_the_steps_are_those_of_diffusers(name):
    """Its own loop, whose samples and tables are fp32, within fp32 of ours."""
    if name == "dpm++":
        scheduler = diffusers.DPMSolverMultistepScheduler()
        scheduler.set_timesteps(10)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    noise = torch.randn(BATCH, *SHAPE)
    sampler, x = Sampler(name, 10, noise_at=0 if name == "dpm++" else 1), noise
    actual = run(sampler, noise)[-1]
    for timestep, t in zip(scheduler.timesteps, sampler.timesteps, strict=True):
        x = scheduler.step(toy(x, t)[:, :4], timestep, x).prev_sample
    assert relative_error(actual, x) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_image_does_not_depend_on_its_batch(name, dtype):
    noise = torch.randn(BATCH, *SHAPE).to(dtype)
    sampler = Sampler(name, 6, eta=0.5 if name == "ddim" else 0.0)
    together = run(sampler, noise, generators=generators(1, 2, 3))[-1]
    assert together.dtype == torch.promote_types(dtype, torch.float32)
    alone = [run(sampler, noise[i : i + 1], generators=generators(i + 1))[-1] for i in range(BATCH)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", SAMPLERS)
def test_restarts_and_needs_the_steps_in_order(name):
    sampler, noise = Sampler(name, 4), torch.randn(BATCH, *SHAPE)
    first = run(sampler, noise, generators=generators(1, 2, 3))
    with pytest.raises(ValueError, match="no batch is under way"):
        sampler.step(noise, noise, 0)
    x = sampler.start(noise + 1)
    x = sampler.step(x, toy(x, 0), 0)
    with pytest.raises(ValueError, match="i must be 1, the next of"):
        sampler.step(x, x, 0)
    with pytest.raises(ValueError, match="i must be 1, the next of"):
        sampler.model_input(x, 2)
    # an abandoned batch leaves nothing behind
    repeated = run(sampler, noise, generators=generators(1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, repeated, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_reads_its_tensors_on_the_host(name):
    """A meta tensor has no values: reading one raises. An empty batch passes, too."""
    sampler = Sampler(name, 5, eta=0.5 if name == "ddim" else 0.0)
    for noise in (torch.empty(BATCH, *SHAPE, device="meta"), torch.empty(0, *SHAPE)):
        drawn_by = None if noise.is_meta else []
        assert run(sampler, noise, lambda x, t: torch.cat([x, x], 1), drawn_by)[-1].shape == noise.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_the_gpu(name):
    noise = torch.randn(BATCH, *SHAPE, device="cuda")
    sampler = Sampler(name, 5, device="cuda", eta=0.5 if name == "ddim" else 0.0)
    sources = [torch.Generator("cuda").manual_seed(seed) for seed in range(BATCH)]
    model = lambda x, t: torch.cat([torch.tanh(x + t), torch.sin(x)], 1)  # noqa: E731
    run(sampler, noise, model, sources)
    try:
        torch.cuda.set_sync_debug_mode("error")
        x = run(sampler, noise, model, sources)[-1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.is_cuda and x.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ddpm++", 10), {}, r"name must be one of ddpm, ddim, dpm\+\+, euler, heun, got 'ddpm\+\+'"),
        (("ddpm", 1), {}, r"steps must be an integer in 2\.\.1000 for 'ddpm', got 1"),
        (("ddpm", 1001), {}, "steps must be an integer in 2..1000 for 'ddpm', got 1001"),
        (("ddim", 0), {}, "steps must be an integer in 2..1000 for 'ddim', got 0"),
        (("dpm++", 1000), {}, r"steps must be an integer in 1..999 for 'dpm\+\+', got 1000"),
        (("heun", 0), {}, "steps must be an integer >= 1 for 'heun', got 0"),
        (("euler", 2.5), {}, "steps must be an integer >= 1 for 'euler', got 2.5"),
        (("ddpm", True), {}, "steps must be an integer"),
        (("ddpm", 10), {"in_channels": 0}, "in_channels must be an integer >= 1, got 0"),
        (("ddpm", 10), {"eta": 0.5}, "eta must be in .0, 1., and 0 for any sampler but 'ddim', got 0.5 for 'ddpm'"),
        (("ddim", 10), {"eta": math.nan}, "eta must be in"),
        (("ddim", 10), {"noise_at": 1}, "noise_at must be 0, or 1 for 'euler' and 'heun', got 1 for 'ddim'"),
        (("heun", 10), {"noise_at": 2}, "noise_at must be 0, or 1"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(*arguments, **options)


def test_bad_tensors():
    sampler, noise = Sampler("ddpm", 4), torch.randn(BATCH, *SHAPE)
    with pytest.raises(ValueError, match="no batch is under way; start"):
        sampler.step(noise, noise, 0)
    for invalid in (noise[:, :3], noise[0], noise.long()):
        with pytest.raises(ValueError, match="noise must be a floating-point batch"):
            sampler.start(invalid)
    sampler.start(noise)
    with pytest.raises(ValueError, match=r"x must have the shape given to start, \(3, 4, 4, 5\), got \(2, 4, 4, 5\)"):
        sampler.step(noise[:2], noise[:2], 0)
    for invalid in (noise[:, :3], torch.cat([noise, noise]), noise[..., :4]):
        with pytest.raises(ValueError, match=r"output must have shape \(3, 4 or 8, 4, 5\), got"):
            sampler.step(noise, invalid, 0)
    with pytest.raises(ValueError, match="generators must be a sequence, one for each of 3 images, got 2"):
        sampler.step(noise, noise, 0, generators(1, 2))
    with pytest.raises(ValueError, match="one for each of 3 images, got a single one"):
        sampler.step(noise, noise, 0, torch.Generator())
    assert sampler.step(noise, noise, 0).shape == noise.shape  # no refused call took the step


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"is not installed: pip install ditfast\[diffusers\]"):
        Sampler("ddpm", 10)


@pytest.mark.subprocess
def test_importing_the_room_leaves_diffusers_alone():
    script = "import sys, ditfast.inference; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
