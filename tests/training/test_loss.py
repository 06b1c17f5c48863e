"""The diffusion loss against scalar formulas in double precision."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ditfast.training import GaussianDiffusion, diffusion_loss
from ditfast.training.loss import _cached_diffusion

pytestmark = pytest.mark.quick


def constants():
    betas = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]
    bars = [1 - betas[0]]
    for beta in betas[1:]:
        bars.append(bars[-1] * (1 - beta))
    return betas, bars


def phi(value):
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize("value", [-1.0, 0.3, 1.0])
def test_loss_of_one_element(t, value):
    betas, bars = constants()
    beta, bar = betas[t], bars[t]
    previous = bars[t - 1] if t else 1.0
    noise, epsilon, v = 0.7, 0.4, 0.2
    xt = math.sqrt(bar) * value + math.sqrt(1 - bar) * noise

    def model(x, timesteps, labels):
        assert x.item() == pytest.approx(xt, rel=1e-12)
        return torch.tensor([epsilon, v], dtype=torch.float64).view(1, 2, 1, 1)

    step = max(t, 1)
    low = math.log(betas[step] * (1 - bars[step - 1]) / (1 - bars[step]))
    log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * low
    x0 = (xt - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
    a, b = beta * math.sqrt(previous) / (1 - bar), (1 - previous) * math.sqrt(1 - beta) / (1 - bar)
    mean, true_mean = a * x0 + b * xt, a * value + b * xt
    if t:
        distance = (mean - true_mean) ** 2 / math.exp(log_variance)
        bound = 0.5 * (log_variance - low - 1 + math.exp(low - log_variance) + distance)
    else:
        std = math.exp(log_variance / 2)
        upper, lower = phi((value - mean + 1 / 255) / std), phi((value - mean - 1 / 255) / std)
        mass = upper if value < -0.999 else 1 - lower if value > 0.999 else upper - lower
        bound = -math.log(max(mass, 1e-12))
    expected = (noise - epsilon) ** 2 + bound / math.log(2)
    tensor = torch.full((1, 1, 1, 1), value, dtype=torch.float64)
    loss = diffusion_loss(model, tensor, torch.tensor([t]), torch.tensor([0]), torch.full_like(tensor, noise))
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_bound_trains_the_variance_only():
    output = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    x0, noise = torch.randn(2, 2, 4, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 300])
    diffusion_loss(lambda *_: output, x0, t, t, noise).backward()
    assert torch.equal(output.grad[:, :4], (output.detach()[:, :4] - noise) * 2 / 128)
    assert output.grad[:, 4:].abs().min() > 0


def test_without_a_learned_variance_and_bad_arguments():
    x0, noise = torch.randn(2, 2, 4, 4, 4)
    t = torch.tensor([0, 300])
    assert diffusion_loss(lambda *_: noise, x0, t, t, noise).item() == 0
    with pytest.raises(ValueError, match="model must return 4 or 8 channels, got 3"):
        diffusion_loss(lambda *_: noise[:, :3], x0, t, t, noise)
    with pytest.raises(ValueError, match="noise must have x0's shape"):
        diffusion_loss(lambda *_: noise, x0, t, t, noise[:1])


def test_half_precision_models_give_an_fp32_loss():
    x0, noise = torch.randn(2, 2, 4, 4, 4).bfloat16()
    t = torch.tensor([0, 300])
    assert diffusion_loss(lambda x, *_: x.bfloat16(), x0, t, t, noise).dtype == torch.float32


def test_constants():
    betas, bars = constants()
    diffusion = GaussianDiffusion()
    assert diffusion.sqrt_alphas_bar[[0, 999]].square().tolist() == pytest.approx([bars[0], bars[999]], rel=1e-10)
    assert diffusion.min_log_variance[0] == diffusion.min_log_variance[1]


def test_tensors_of_a_transform_are_not_cached():
    _cached_diffusion.cache_clear()
    x, t, noise = torch.randn(2, 4, 4, 4), torch.tensor([1, 500]), torch.randn(2, 4, 4, 4)

    def loss(x, t=t, noise=noise):
        return diffusion_loss(lambda x, t, y: torch.cat([x.sin(), x.cos()], dim=1), x, t, t, noise)

    expected = loss(x.double()).float()
    _cached_diffusion.cache_clear()
    with FakeTensorMode() as mode:
        loss(*map(mode.from_tensor, (x, t, noise)))
    torch.func.grad(loss)(x)
    torch.func.jvp(loss, (x,), (x,))
    torch.vmap(loss)(x[None], t[None], noise[None])
    assert _cached_diffusion.cache_info().currsize == 0
    with torch.inference_mode():
        loss(x)
    learned = x.clone().requires_grad_()
    loss(learned).backward()
    torch.testing.assert_close(loss(x), expected)
