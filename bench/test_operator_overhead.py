"""Host-side cost of an operator call: shapes so small that Python, checks and dispatch take most of the time.

Each group holds ditfast's public operator beside its formula, in one direction. A wrong operator is not timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditfast
from ditfast import ops
from ditfast.ops import adaln as adaln_library
from ditfast.ops import current_backend, use_backend
from ditfast.ops.conditioning import (
    _conditioning,
    _conditioning_fake,
    _timestep_embedding,
    _timestep_embedding_fake,
)
from ditfast.reference import ops as formulas
from ditfast.testing.operators import OPERATORS, Shape, check, draw_inputs

Timed = Callable[..., Any]

GPU = ["cuda"] if torch.cuda.is_available() else []
# what models run in
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
SHAPES = (Shape(1, 1, 64), Shape(1, 16, 72))
FORWARD, RECORDED, BACKWARD = "forward", "forward, recorded", "forward and backward"
CASES = [
    pytest.param(name, direction, id=f"{name}-{direction}")
    for name, operator in OPERATORS.items()
    for direction in (FORWARD, RECORDED, BACKWARD)
    if operator.gradients or direction == FORWARD
]
#: Operators that do nothing beyond checks and choice but call the formula of their own name.
THIN = (
    "layer_norm_modulate",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "linear_gelu",
    "linear_gated_residual",
    "self_attention",
)


def label(shape: Shape) -> str:
    return f"{shape.batch}x{shape.tokens}x{shape.width}"


def sizes(inputs: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in inputs.items()}


def flat(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("who", ["ditfast", "formula"])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize(("name", "direction"), CASES)
@pytest.mark.parametrize("device", ["cpu", *GPU])
def test_operator_call(timed: Timed, device: str, name: str, direction: str, shape: Shape, who: str) -> None:
    operator, dtype = OPERATORS[name], DTYPES[device]
    inputs = draw_inputs(operator, shape, dtype, device)
    differentiable = () if direction == FORWARD else operator.differentiable(inputs)
    if who == "ditfast":
        failures = {k: v for k, v in check(operator, shape, dtype, device, wanted=differentiable).items() if not v.ok}
        assert not failures, f"{name} is not timed: {failures}"
    function, options = operator.fused if who == "ditfast" else operator.formula, operator.options(shape)
    leaves = {key: value.detach().requires_grad_(key in differentiable) for key, value in inputs.items()}

    def forward() -> Any:
        return function(**leaves, **options)

    leaf_list = [leaves[key] for key in differentiable]
    incoming = [torch.randn_like(output) for output in flat(forward())]

    def backward() -> Any:
        return torch.autograd.grad(flat(forward()), leaf_list, incoming)

    with torch.set_grad_enabled(direction != FORWARD):
        result = timed(
            backward if direction == BACKWARD else forward,
            group=f"{name}, {direction}, {label(shape)}, {device}",
            device=device,
            dtype=dtype,
            shapes=sizes(inputs),
            implementation=who,
        )
    assert all(output.requires_grad is (direction == RECORDED) for output in flat(result))


@pytest.mark.parametrize("name", THIN)
def test_checks_and_choice(timed: Timed, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An operator whose formula is taken out: what is left are the argument checks and the choice behind them."""
    operator, shape = OPERATORS[name], SHAPES[1]
    inputs, options = draw_inputs(operator, shape, torch.float32, "cpu"), operator.options(shape)
    nothing = object()
    monkeypatch.setattr(formulas, name, lambda *args: nothing)

    def call() -> object:
        return operator.fused(**inputs, **options)

    first = next(iter(inputs))
    with pytest.raises(TypeError, match=f"{first} must be fp32, bf16, fp16 or fp64, got torch.int32"):
        operator.fused(**{**inputs, first: inputs[first].int()}, **options)
    result = timed(call, group="checks and choice", device="cpu", dtype=torch.float32, shapes=sizes(inputs))
    assert result is nothing


@pytest.mark.parametrize("who", ["switch", "read"])
def test_use_backend(timed: Timed, who: str) -> None:
    """Entering and leaving ``use_backend`` with one read inside, beside the read alone."""

    def switch() -> str:
        with use_backend("torch"):
            return current_backend()

    call, expected = (switch, "torch") if who == "switch" else (current_backend, "auto")
    assert timed(call, group="use_backend", device="cpu", dtype=None, shapes={}) == expected
    assert current_backend() == "auto"


DISPATCHED: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    # name in torch.library -> (its fake, its implementation, the public operator)
    "adaln_forward": (
        adaln_library._forward_fake,
        adaln_library._forward,
        ops.gated_residual_layer_norm_modulate,
    ),
    "conditioning": (_conditioning_fake, _conditioning, ops.conditioning),
    "timestep_embedding": (_timestep_embedding_fake, _timestep_embedding, ops.timestep_embedding),
}


def dispatch_arguments(name: str, device: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    if name == "timestep_embedding":
        return torch.randint(0, 1000, (1,), generator=generator).to(device), 256, 0.0, torch.float32
    operator = OPERATORS["conditioning" if name == "conditioning" else "gated_residual_layer_norm_modulate"]
    inputs = operator.draw(SHAPES[1], generator).values()
    arguments = tuple(value.to(device) for value in inputs)
    return (*arguments, 1e-6) if name == "adaln_forward" else arguments


@pytest.mark.parametrize("layer", ["alone", "torch.library", "operator"])
@pytest.mark.parametrize("name", DISPATCHED)
@pytest.mark.parametrize("device", ["meta", *GPU])
@torch.no_grad()
def test_dispatch(timed: Timed, device: str, name: str, layer: str) -> None:
    """A kernel's implementation alone, through torch.library, and through the public operator.

    Without a GPU the implementation is the fake on meta tensors: the path of a GPU's call up to the launch.
    """
    fake, implementation, operator = DISPATCHED[name]
    alone = fake if device == "meta" else partial(implementation, key=None)
    layers = {"alone": alone, "torch.library": getattr(torch.ops.ditfast, name).default, "operator": operator}
    arguments = dispatch_arguments(name, device)

    def call() -> Any:
        return layers[layer](*arguments)

    tensors = {str(i): value for i, value in enumerate(arguments) if isinstance(value, Tensor)}
    group = f"dispatch of {name}, {device}"
    with use_backend("triton"):
        result = timed(call, group=group, device=device, dtype=torch.float32, shapes=sizes(tensors))
    # the public operator leaves out what only the backward reads
    for actual, expected in zip(flat(result), flat(alone(*arguments)), strict=False):
        assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
        assert device == "meta" or torch.equal(actual, expected)


@pytest.mark.parametrize("who", ["import ditfast", "bare interpreter"])
def test_import(timed: Timed, who: str) -> None:
    """A fresh interpreter that imports ditfast, beside one that does nothing."""
    environment = {**os.environ, "PYTHONPATH": str(Path(ditfast.__file__).parents[1])}
    script = "import sys, ditfast; sys.exit('torch' in sys.modules)" if who == "import ditfast" else "pass"

    def call() -> int:
        return subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode

    assert timed(call, group="import", device="cpu", dtype=None, shapes={}) == 0
