"""Calls that step over torch's operators: the same numbers on both paths, and what keeps the operator in between."""

import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ditfast import ops
from ditfast.kernels import launch
from ditfast.ops import backend
from ditfast.parity import judge
from ditfast.reference import ops as formulas
from ditfast.testing.operators import OPERATORS, Shape, draw_inputs, run

pytestmark = pytest.mark.kernels
SHAPE = Shape(2, 5, 72, num_heads=1)


class Watching(TorchDispatchMode):
    """Notes this project's operators, as anybody's mode may."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ditfast":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def stepped_over(monkeypatch):
    """The operators that were stepped over, as they come."""
    names = []

    def noting(implementation, name):
        def call(*arguments, key):
            if key is not None:
                names.append(name)
            return implementation(*arguments, key=key)

        return call

    for name, implementation in backend._IMPLEMENTATIONS.items():
        monkeypatch.setitem(backend._IMPLEMENTATIONS, name, noting(implementation, name))
    return names


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_both_paths_take_the_same_numbers(name, gradients, stepped_over):
    operator = OPERATORS[name]
    inputs = draw_inputs(operator, SHAPE, torch.float32, "cpu")
    wanted = operator.differentiable(inputs) if gradients else ()
    with ops.use_backend("triton"):
        if gradients and not wanted:
            return
        direct = [run(operator.fused, inputs, operator.options(SHAPE), wanted) for _ in range(2)]  # made, and kept
        with Watching() as mode:
            stepped = len(stepped_over)
            watched = run(operator.fused, inputs, operator.options(SHAPE), wanted)
        assert mode.seen and len(stepped_over) == stepped
    for results in direct:
        assert set(results) == set(watched)
        assert all(torch.equal(results[key], watched[key]) for key in watched), name


def norm(x, shift, scale):
    return ops.layer_norm_modulate(x, shift, scale)


def assert_norm(out, x, shift, scale):
    exact = formulas.layer_norm_modulate(x.double(), shift.double(), scale.double())
    verdict = judge("operator", out, formulas.layer_norm_modulate(x, shift, scale), exact, torch.float32)
    assert verdict.ok, verdict


def arguments():
    return torch.randn(2, 5, 72), torch.randn(2, 72), torch.randn(2, 72)


def test_a_checked_call_is_not_checked_again(monkeypatch):
    x, shift, scale = arguments()
    with ops.use_backend("triton"):
        norm(x, shift, scale)
        monkeypatch.setattr(backend, "takes_triton", None)
        monkeypatch.setattr("ditfast.ops.check.tensor", None)
        norm(*arguments())
        monkeypatch.undo()
        for wrong, error in (
            ((x, shift[:1], scale), ValueError),
            ((x, shift.double(), scale), TypeError),
            ((x.to("meta"), shift, scale), ValueError),
            ((x, shift, scale.to("meta")), ValueError),
            ((x, shift, list(scale)), TypeError),
            ((list(x), shift, scale), TypeError),
        ):
            for recording in (False, True):
                with pytest.raises(error), torch.set_grad_enabled(recording):
                    norm(*wrong)
        assert ops.layer_norm_modulate(x, shift, scale, np.float32(1e-6)).equal(norm(x, shift, scale))
        with pytest.raises(ValueError, match="eps must be above 0"):
            ops.layer_norm_modulate(x, shift, scale, -1.0)
    assert norm(x, shift, scale).equal(formulas.layer_norm_modulate(x, shift, scale))  # "auto", on a CPU


def test_what_keeps_the_operator():
    """Whatever has no memory of its own, or is read otherwise than it lies."""
    x, shift, scale = arguments()
    with ops.use_backend("triton"):
        assert backend.direct_layouts(x, shift, scale) is not None
        leaked = []
        torch.vmap(lambda row: leaked.append(row) or row)(x)
        zeros = torch._efficientzerotensor(x.shape)
        negative = torch.complex(torch.zeros(2, 5, 72), x).conj().imag
        assert negative.is_neg()
        assert backend.direct_layouts(torch._neg_view(x), shift, scale) is None
        for other in (leaked[0], zeros, negative, x.transpose(1, 2), x.to("meta"), x.as_subclass(Named)):
            assert backend.direct_layouts(other, shift, scale) is None
        with torch.no_grad():  # which have no gradient
            for wrapped in (negative, torch._neg_view(x)):
                assert_norm(norm(wrapped, shift, scale), wrapped.resolve_neg(), shift, scale)


class Named(torch.Tensor):
    pass


@pytest.mark.parametrize("name", ["gated_residual", "linear_gated_residual", "layer_norm_modulate", "gelu_mlp"])
def test_a_mode_around_one_half_of_a_checkpoint(name):
    """The recomputation saves as many tensors as the forward."""
    operator = OPERATORS[name]
    inputs = draw_inputs(operator, SHAPE, torch.float32, "cpu")
    frozen = ("gate",) if name == "linear_gated_residual" else ()
    leaves = {key: value.clone().requires_grad_(key not in frozen) for key, value in inputs.items()}
    with ops.use_backend("triton"):
        for around in ((True, False), (False, True)):
            with Watching() if around[0] else nullcontext():
                out = checkpoint(lambda: operator.fused(**leaves, **operator.options(SHAPE)), use_reentrant=False)
            with Watching() if around[1] else nullcontext():
                out.sum().backward()
    assert all(value.grad is not None for key, value in leaves.items() if key not in frozen)


def test_where_tensors_are_made_is_no_reason():
    x, shift, scale = arguments()
    with ops.use_backend("triton"), torch.device("cpu"):
        assert backend.direct_layouts(x, shift, scale) is not None
        with torch.overrides.BaseTorchFunctionMode():
            assert backend.direct_layouts(x, shift, scale) is None
        with Watching():
            assert backend.direct_layouts(x, shift, scale) is None
        with torch.autograd.forward_ad.dual_level():
            assert backend.direct_layouts(x, shift, scale) is None
        assert torch.func.grad(lambda x: x.sum() * (backend.direct_layouts(x) is None))(x).sum() == x.numel()
    with ops.use_backend("torch"):
        assert backend.direct_layouts(x, shift, scale) is None
    assert backend.direct_layouts(x, shift, scale) is None  # "auto", on a CPU


def test_plans_are_bounded_and_hold_no_tensor(monkeypatch):
    monkeypatch.setattr(launch, "_MOST_PLANS", 3)
    launch.forget()
    with ops.use_backend("triton"):
        for tokens in range(1, 8):
            x, vector = torch.randn(1, tokens, 72), torch.randn(1, 72)
            assert_norm(norm(x, vector, vector), x, vector, vector)
            assert len(launch._plans) <= 3
        held = torch.randn(1, 9, 72)
        norm(held, torch.zeros(1, 72), torch.zeros(1, 72))
    reference = weakref.ref(held)
    del held
    gc.collect()
    assert reference() is None
