"""Shared by the kernels' tests: the operators with their kernels demanded, poisoned memory, watched calls."""

from dataclasses import replace

import torch

from ditfast import ops
from ditfast.testing.operators import OPERATORS

NAMES = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def triton_operator(name):
    """The operator with its kernel demanded."""
    operator = OPERATORS[name]

    def fused(**inputs):
        with ops.use_backend("triton"):
            return operator.fused(**inputs)

    return replace(operator, fused=fused)


def failures(verdicts):
    return {name: verdict for name, verdict in verdicts.items() if not verdict.ok}


def alone_and_together(operator, inputs, row, options=None, shared=()):
    """Pairs of a sample's outputs and gradients, alone and in its batch; inputs that are ``shared`` have none."""
    options = (options or {}) | {name: inputs[name] for name in shared}
    batched = [name for name in inputs if name not in shared]
    incoming = []

    def results(rows):
        leaves = {name: inputs[name][rows].detach().requires_grad_() for name in batched}
        out = operator.fused(**leaves, **options)
        out = out if isinstance(out, tuple) else (out,)
        incoming.extend(torch.randn_like(value) for value in out[len(incoming) :])
        return [*out, *torch.autograd.grad(out, list(leaves.values()), [value[rows] for value in incoming])]

    together = results(slice(None))
    return [(alone, full[row : row + 1]) for alone, full in zip(results(slice(row, row + 1)), together, strict=True)]


def watch(monkeypatch, *plans, note=lambda plan, arguments: type(plan).__name__):
    """What ``note`` says of every call of plans of these classes, as they come."""
    seen = []
    for plan in plans:

        def spy(self, *arguments, call=plan.__call__):
            seen.append(note(self, arguments))
            return call(self, *arguments)

        monkeypatch.setattr(plan, "__call__", spy)
    return seen


def poison(monkeypatch):
    """The launchers' fresh memory holds NaN, so that an unwritten element shows."""

    def poisoned(create):
        def make(*args, **kwargs):
            out = create(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return make

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    assert torch.empty_like(torch.zeros(2)).isnan().all() and torch.zeros(3).new_empty(2).isnan().all()
