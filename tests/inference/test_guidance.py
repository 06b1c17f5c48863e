"""Guidance against its formulas in fp64, and against DiT.forward_with_cfg."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ditfast import reference
from ditfast.inference import Guidance
from ditfast.parity import relative_error
from ditfast.testing.inputs import random_batch, randomize_
from tests.model.conftest import TINY


@pytest.mark.quick
@pytest.mark.parametrize("change", [{}, {"learn_sigma": False}, {"in_channels": 2}], ids=str)
def test_plain_guidance_is_forward_with_cfg(change):
    config = dataclasses.replace(TINY, **change)
    model, count = randomize_(reference.DiT(config)).eval(), config.in_channels
    x, t, y = random_batch(config, 6)
    y[3:], x[3:] = config.null_class, x[:3]
    with torch.no_grad():
        output = model(x, t, y)
        for channels in (3, "all", 1, 2):
            expected, guidance = model.forward_with_cfg(x, t, y, 2.5, channels)[:3], Guidance(2.5, channels)
            assert torch.equal(guidance(output, 400, count), expected)
            assert torch.equal(guidance.apply(output, torch.tensor(2.5), count), expected)
            assert not torch.equal(expected, output[:3])


def test_guidance_is_computed_in_fp32_or_fp64():
    output = torch.randn(4, 8, 3, 5)
    for dtype, working in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        low = output.to(dtype)
        for scale in (1.7, torch.tensor(1.7), torch.tensor([1.7], dtype=torch.float64)):
            ours = Guidance(rescale=0.3).apply(low, scale)
            assert ours.dtype == working
            assert relative_error(ours, Guidance(rescale=0.3).apply(low.double(), 1.7)) < 1e-6


@pytest.mark.parametrize("channels", [3, "all"])
@pytest.mark.parametrize("phi", [0.25, 0.7, 1.0])
def test_rescaling_is_equations_15_and_16(channels, phi):
    output = torch.randn(6, 8, 5, 7, dtype=torch.float64) * torch.arange(1, 7).view(6, 1, 1, 1) + 0.3
    ours, count = Guidance(4.0, channels, rescale=phi)(output, 500), 3 if channels == 3 else 4
    for image in range(3):
        positive, negative = output[image, :count], output[image + 3, :count]
        x = negative + 4.0 * (positive - negative)
        rescaled = x * (positive.std() / x.std())  # 15
        assert relative_error(ours[image, :count], phi * rescaled + (1 - phi) * x) < 1e-14  # 16
        assert torch.equal(ours[image, count:], output[image, count:])
    # what a freshly initialised adaLN-Zero model predicts
    assert torch.equal(Guidance(rescale=phi)(torch.zeros(2, 8, 2, 2), 1), torch.zeros(1, 8, 2, 2))


def test_the_power_cosine_schedule():
    """MDT's: 1 + (scale - 1) * (1 - cos(pi * (1 - t / 1000) ** power)) / 2."""
    guidance = Guidance(3.8, power=4.0)
    for t in (0, 1, 250, 500, 999):
        expected = 1 + 2.8 * (1 - math.cos(math.pi * (1 - t / 1000) ** 4)) / 2
        assert guidance.scale_at(t) == pytest.approx(expected, rel=1e-15)
    assert guidance.scale_at(0) == 3.8 and guidance.scale_at(1000) == 1
    assert guidance.scale_at(500) == pytest.approx(1.0269006, rel=1e-6)
    values = [guidance.scale_at(t) for t in range(0, 1001, 50)]
    assert values == sorted(values, reverse=True)
    # flows: the same progress, whichever end is noise
    for span in ((0.0, 1.0), (1.0, 0.0)):
        flow = dataclasses.replace(guidance, span=span)
        assert flow.scale_at(abs(span[0] - 0.75)) == pytest.approx(guidance.scale_at(250), rel=1e-15)


def test_the_interval():
    guidance = Guidance(4.0, interval=(200, 700))
    expected = {0: 1.0, 199: 1.0, 200: 4.0, 500: 4.0, 700: 4.0, 701: 1.0, 999: 1.0}
    assert {t: guidance.scale_at(t) for t in expected} == expected
    output = torch.randn(4, 8, 3, 3)
    assert torch.equal(guidance(output, 900), output[:2]) and not torch.equal(guidance(output, 500), output[:2])
    powered = dataclasses.replace(guidance, power=4.0)
    assert powered.scale_at(100) == 1 < powered.scale_at(200) == Guidance(4.0, power=4.0).scale_at(200)
    # a flow's t is fp32 and may round past the bound it stands for
    flow = Guidance(4.0, interval=(0.3, 0.6), span=(0.0, 1.0))
    times = torch.tensor([0.2, 0.3, 0.6, 0.7, 1.0])
    assert times[2].item() > 0.6
    assert [flow.scale_at(t) for t in times.tolist()] == [1, 4, 4, 1, 1]
    assert times[3].item() < 0.7
    late = dataclasses.replace(flow, interval=(0.7, 1.0))
    assert [late.scale_at(t) for t in times.tolist()] == [1, 1, 1, 4, 4]


def test_one_half_alone():
    output = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    assert torch.equal(Guidance(1.0)(output, 500), output[:1])  # exactly, without the other half's rounding
    assert torch.equal(Guidance(0.0, "all")(output, 500)[:, :4], output[1:, :4])


def test_a_tensor_scale_is_not_read_on_the_host():
    """A meta tensor has no values: reading one raises."""
    for scale in (torch.empty((), device="meta"), torch.empty(1, device="meta")):
        output = torch.empty(4, 8, 3, 3, device="meta")
        assert Guidance(rescale=0.5).apply(output, scale).shape == (2, 8, 3, 3)


@pytest.mark.gpu
def test_in_a_captured_graph():
    output, scale = torch.randn(4, 8, 3, 3, device="cuda"), torch.ones((), device="cuda")
    guidance = Guidance(rescale=0.5)
    guidance.apply(output, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = guidance.apply(output, scale)
    for value in (1.0, 1.5, 4.0):
        scale.fill_(value)
        graph.replay()
        assert torch.equal(captured, guidance.apply(output, scale))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": -1.0}, "scale must be a finite number >= 0, got -1.0"),
        ({"scale": math.nan}, "scale must be a finite number"),
        ({"scale": "4"}, "scale must be a finite number >= 0, got '4'"),
        ({"channels": 0}, 'channels must be "all" or an integer >= 1, got 0'),
        ({"channels": True}, "channels must be"),
        ({"channels": "four"}, "channels must be .* got 'four'"),
        ({"rescale": 1.5}, r"rescale must be a number in \[0, 1\], got 1.5"),
        ({"power": 0}, "power must be None or a finite number > 0, got 0"),
        ({"span": (1.0, 1.0)}, "span must be two different numbers"),
        ({"interval": (700, 200)}, "interval must be None or .low, high. with 0 <= low <= high <= 1000"),
        ({"interval": (0, 1001)}, "interval must be .* got .0, 1001."),
        ({"interval": (0.2, 20), "span": (0.0, 1.0)}, "with 0 <= low <= high <= 1, got"),
        ({"interval": 0.5}, "interval must be"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**fields)


def test_bad_tensors():
    guidance, output = Guidance(), torch.randn(4, 8, 3, 3)
    for bad in (output[:3], output[0]):
        with pytest.raises(ValueError, match="output must be a batch of 2N predictions"):
            guidance(bad, 1)
    with pytest.raises(ValueError, match="output must have in_channels=3 or 6 channels, got 8"):
        guidance(output, 1, in_channels=3)
    with pytest.raises(ValueError, match='channels must be "all" or in 1..4 for this latent, got 5'):
        Guidance(channels=5)(output, 1)
    with pytest.raises(ValueError, match="scale must be a number or a tensor of one element, got"):
        guidance.apply(output, torch.ones(2))
    for t in (-1, 1001, math.nan):
        with pytest.raises(ValueError, match="t must be within the span"):
            guidance.scale_at(t)
