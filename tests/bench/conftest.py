"""Shared by the tests of the harness: cheap garbage collections, and what is counted on meta tensors."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def cheap_collections(request, monkeypatch):
    """Sets aside the objects from before the test: each case makes a dozen full collections, which walk them all."""
    gc.collect()
    gc.freeze()
    if request.module.__name__.rpartition(".")[2] != "test_timing":  # which tests that timing does so itself
        monkeypatch.setattr(gc, "freeze", lambda: None)
        monkeypatch.setattr(gc, "unfreeze", lambda: None)


@pytest.fixture(autouse=True, scope="module")
def unfrozen_afterwards():
    """Hands those objects back to the collector."""
    yield
    gc.unfreeze()
    gc.collect()


def meta(*shape, dtype=torch.float32, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def listing(cost):
    return [(launch.name, launch.flops, launch.bytes) for launch in cost.records]
