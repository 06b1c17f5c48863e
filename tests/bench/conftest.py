"""Shared by the tests of what is counted: meta tensors, and a count as a list."""

import torch


def meta(*shape, dtype=torch.float32, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def listing(cost):
    return [(launch.name, launch.flops, launch.bytes) for launch in cost.records]
