"""The concatenated adaLN weights of ditfast.DiT are never stale, however the parameters change."""

import pytest
import torch
from model_helpers import TINY, assert_parity, inference, pair
from torch import nn

from ditfast import reference
from ditfast.bench.inputs import random_batch, randomize_
from ditfast.bench.parity import relative_error


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_cache_follows_the_optimiser(optimiser, foreach):
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    before = inference(fast, inputs)
    gradients = [torch.randn_like(p) for p in fast.parameters() if p.requires_grad]
    for model in (fast, slow):
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimiser(parameters, lr=1e-2, foreach=foreach).step()
    assert not torch.equal(inference(fast, inputs), before)
    assert_parity(fast, slow, inputs)


def test_cache_follows_the_fused_optimiser():
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    inference(fast, inputs)
    for parameter in fast.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(fast.parameters(), lr=1e-2, fused=True).step()
    slow.load_state_dict(fast.state_dict())
    assert_parity(fast, slow, inputs)


def load_in_place(fast, other):
    fast.load_state_dict(other.state_dict())


def load_by_assignment(fast, other):
    fast.load_state_dict(other.state_dict(), assign=True)


def swap_data(fast, other):
    for mine, theirs in zip(fast.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()


def swap_data_twice(fast, other):
    # the second swap may get the first one's freed addresses
    swap_data(fast, randomize_(reference.DiT(TINY), 7))
    swap_data(fast, other)


def average(fast, other):
    with torch.no_grad():
        for mine, theirs in zip(fast.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 1.0)


def replace_parameters(fast, other):
    for mine, theirs in zip(fast.modules(), other.modules(), strict=True):
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(mine, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def convert_and_back(fast, other):
    fast.double()
    load_in_place(fast, other)
    fast.float()


def write_through_data(fast, other):
    # invisible to torch, as some optimisers do it; a training step comes before
    fast(*random_batch(TINY, 2)).sum().backward()
    for mine, theirs in zip(fast.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def write_through_data_and_reset(fast, other):
    for mine, theirs in zip(fast.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    fast.reset_cache()


def write_through_data_and_eval(fast, other):
    for mine, theirs in zip(fast.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    fast.eval()


@pytest.mark.parametrize(
    "change",
    [
        load_in_place,
        load_by_assignment,
        swap_data,
        swap_data_twice,
        average,
        replace_parameters,
        convert_and_back,
        write_through_data,
        write_through_data_and_reset,
        write_through_data_and_eval,
    ],
)
def test_cache_is_never_stale(change):
    fast, _ = pair()
    other = randomize_(reference.DiT(TINY), seed=1).eval()
    inputs = random_batch(TINY, 2)
    for _ in range(2):
        inference(fast, inputs)  # the cache is in place
    change(fast, other)
    assert_parity(fast, other, inputs)


def test_cache_across_autocast_and_plain_calls():
    fast, slow = pair()
    inputs = random_batch(TINY, 2)
    with torch.autocast("cpu", torch.bfloat16):
        low = inference(fast, inputs)
        assert relative_error(low, fast(*inputs)) < torch.finfo(torch.bfloat16).eps
    assert_parity(fast, slow, inputs)
    assert low.dtype == torch.bfloat16
