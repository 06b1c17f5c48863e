"""Training steps of an accelerated model beside the untouched one, both judged by fp64."""

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

import ditfast
from ditfast.parity import judge, relative_error
from tests.adapters.foreign_models import SMALL, Model, inputs, randomised

KERNELS = {"dim": 96, "depth": 1}  # in the interpreter; gradients of enough elements to be judged one by one
ALL = 7  # of a model with two blocks: each with attention and MLP, and the final layer


def pair(before=None, after=None, **model):
    """(accelerated, untouched) with the same weights; changes made to both, before accelerate or after it.

    The check runs only if the model was changed first: test_accelerate.py checks the unchanged model.
    """
    slow = randomised(Model(**model))
    if before:
        before(slow)
    fast = copy.deepcopy(slow)
    ditfast.accelerate(fast, check=before is not None)
    for each in (fast, slow) if after else ():
        after(each)
    return fast, slow


def trained(model, arguments=None, steps=2, call=None, autocast=None, accumulate=1, x_learns=False):
    """The results of training steps: outputs, every gradient, the trained parameters.

    Args:
        call: a replacement for the model's forward: (model, x, t, y) -> output.
        autocast: a dtype of the CPU's autocast, under which a GradScaler scales the loss.
        accumulate: micro-batches a step.
        x_learns: whether the gradient of the input is asked for too.
    """
    x, t, y = arguments or inputs()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    x = x.to(dtype).requires_grad_(x_learns)
    target = torch.randn(len(x), 8, *x.shape[2:], generator=torch.Generator().manual_seed(5)).to(x.device, dtype)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD(learning.values(), lr=0.05, momentum=0.9) if learning else None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=autocast is not None)
    results = {}
    for step in range(steps):
        for part in range(accumulate):
            rows = slice(part, None, accumulate)
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                out = (call or nn.Module.__call__)(model, x[rows], t[rows], y[rows])
                loss = F.mse_loss(out.to(dtype), target[rows]) / accumulate
            scaler.scale(loss).backward()
            results[f"output {step}.{part}"] = out.detach()
        if optimiser is None:
            break
        scaler.unscale_(optimiser)
        results |= {f"gradient {step} of {name}": p.grad.clone() for name, p in learning.items() if p.grad is not None}
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
    if x_learns:
        results["gradient of x"] = x.grad
    return results | {f"trained {name}": p.detach().clone() for name, p in learning.items()}


def assert_same(actual, expected):
    """Whether two fp32 results differ by rounding only, if fp64 cannot judge (random masks) or is not needed.

    Not to the bit: a CPU's GEMM may add up in another order from one run to the next.
    """
    assert relative_error(actual, expected) <= 1e-5, relative_error(actual, expected)


def joined(values):
    """All gradients of a step as one tensor, and all trained parameters.

    Rounding of a few elements is chance and differs between CPUs; a wrong gradient is far past the bound here too.
    """
    groups = {}
    for name, value in values.items():
        kind = "trained" if name.startswith("trained") else name.partition(" of ")[0]
        groups.setdefault(kind, []).append(value.flatten())
    return {name: torch.cat(group) for name, group in groups.items()}


def assert_judged(fast, slow, exact, dtype=torch.float32, join=False):
    """Judges two models' results against fp64 by the rule for models: equal names, every value within its bound.

    join: whether gradients are judged together.
    """
    assert fast.keys() == slow.keys() == exact.keys()
    if join:
        fast, slow, exact = map(joined, (fast, slow, exact))
    verdicts = {name: judge("model", fast[name], slow[name], exact[name], dtype) for name in exact}
    assert not (failed := {name: verdict for name, verdict in verdicts.items() if not verdict.ok}), failed


def assert_trained_alike(fast, slow, arguments=None, autocast=None, backend="auto", join=False, **options):
    """Trains both, and the untouched one in fp64 without autocast: (results of the fast one, results of the oracle).

    backend: of the fast model's operators, in the backward too, where checkpoints compute again.
    join: as in :func:`assert_judged`.
    """
    exact = trained(copy.deepcopy(slow).double(), arguments, **options)
    with ditfast.ops.use_backend(backend):
        actual = trained(fast, arguments, autocast=autocast, **options)
    untouched = trained(slow, arguments, autocast=autocast, **options)
    assert_judged(actual, untouched, exact, autocast or torch.float32, join)
    return actual, exact


def assert_trained_alike_by_kernels(fast, slow, **options):
    """One step with the kernels demanded: the nodes of training run in the interpreter."""
    return assert_trained_alike(fast, slow, inputs(4, size=SMALL), steps=1, backend="triton", **options)
