"""Every operator with random inputs, and the numerics rule applied to its outputs and gradients.

Shared by the tests, ``ditfast verify`` and the operator benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditfast import ops
from ditfast.ops.modulations import split
from ditfast.reference import ops as formulas

from ..parity import Verdict, judge
from .units import Direction, Unit

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """B batch, T tokens, D width, F = ratio * D hidden width.

    ``mean`` is added to the stream: a large one provokes cancellation in a norm. ``layers`` counts the adaLN Linears,
    those of the blocks and of the final layer.
    """

    batch: int
    tokens: int
    width: int
    num_heads: int = 2
    mean: float = 0.0
    ratio: int = 2
    layers: int = 3


@dataclass(frozen=True)
class Operator:
    """One operator: the function in question, its formula, and how to draw its inputs in fp32.

    Operators of a ``family`` share kernels: ``ditfast verify`` gives each family processes of its own.
    """

    name: str
    family: str
    fused: Callable[..., Any]
    formula: Callable[..., Any]
    draw: Callable[[Shape, torch.Generator], Inputs]
    mixed: tuple[str, ...] = ()  # the stream's arguments, which may be fp32 while the rest is bf16 or fp16
    options: Callable[[Shape], Mapping[str, Any]] = lambda shape: {}
    kernel: bool = False  # whether it has a Triton kernel
    gradients: bool = True

    def differentiable(self, inputs: Inputs) -> tuple[str, ...]:
        """The inputs that have a gradient."""
        return tuple(name for name, value in inputs.items() if self.gradients and value.is_floating_point())


def _normal(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device)


def _integers(below: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, below, (count,), generator=generator, device=generator.device)


def _tokens(shape: Shape, generator: torch.Generator, mean: float = 0.0) -> Tensor:
    return _normal((shape.batch, shape.tokens, shape.width), generator) + mean


def _vectors(shape: Shape, generator: torch.Generator, names: str) -> Inputs:
    """Chunks of one (B, 6D) tensor, as the models have them."""
    chunks = _normal((shape.batch, 6 * shape.width), generator).chunk(6, dim=1)
    return dict(zip(names.split(), chunks, strict=False))


def _linear(out_features: int, in_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = _normal((out_features, in_features), generator) * in_features**-0.5
    return weight, _normal((out_features,), generator) * 0.1


def _draw_norm(shape: Shape, generator: torch.Generator) -> Inputs:
    return {"x": _tokens(shape, generator, shape.mean), **_vectors(shape, generator, "shift scale")}


def _draw_residual(shape: Shape, generator: torch.Generator) -> Inputs:
    residual, branch = _tokens(shape, generator, shape.mean), _tokens(shape, generator)
    return {"residual": residual, "branch": branch, **_vectors(shape, generator, "gate")}


def _draw_fused(shape: Shape, generator: torch.Generator) -> Inputs:
    residual, branch = _tokens(shape, generator, shape.mean), _tokens(shape, generator)
    return {"residual": residual, "branch": branch, **_vectors(shape, generator, "gate shift scale")}


def _draw_linear_gelu(shape: Shape, generator: torch.Generator) -> Inputs:
    weight, bias = _linear(shape.ratio * shape.width, shape.width, generator)
    return {"x": _tokens(shape, generator), "weight": weight, "bias": bias}


def _draw_linear_residual(shape: Shape, generator: torch.Generator) -> Inputs:
    weight, bias = _linear(shape.width, shape.ratio * shape.width, generator)
    x = _normal((shape.batch, shape.tokens, shape.ratio * shape.width), generator)
    gate = _vectors(shape, generator, "gate")
    return {"x": x, "weight": weight, "bias": bias, **gate, "residual": _tokens(shape, generator, shape.mean)}


def _draw_mlp(shape: Shape, generator: torch.Generator) -> Inputs:
    w1, b1 = _linear(shape.ratio * shape.width, shape.width, generator)
    w2, b2 = _linear(shape.width, shape.ratio * shape.width, generator)
    return {"x": _tokens(shape, generator), "w1": w1, "b1": b1, "w2": w2, "b2": b2}


def _draw_modulations(shape: Shape, generator: torch.Generator) -> Inputs:
    inputs = {"c": _normal((shape.batch, shape.width), generator)}
    for index in range(shape.layers):
        parts = 6 if index + 1 < shape.layers else 2
        weight, bias = _linear(parts * shape.width, shape.width, generator)
        inputs |= {f"weight{index}": weight, f"bias{index}": bias}
    return inputs


def _draw_attention(shape: Shape, generator: torch.Generator) -> Inputs:
    return {"qkv": _normal((shape.batch, shape.tokens, 3 * shape.width), generator)}


def _draw_biased_attention(shape: Shape, generator: torch.Generator) -> Inputs:
    bias = _normal((shape.num_heads, shape.tokens, shape.tokens), generator)
    return {**_draw_attention(shape, generator), "bias": bias}


def _draw_conditioning(shape: Shape, generator: torch.Generator) -> Inputs:
    t_emb = _normal((shape.batch, shape.width), generator)
    table = _normal((11, shape.width), generator)
    return {"t_emb": t_emb, "y": _integers(11, shape.batch, generator), "table": table}


def _draw_timesteps(shape: Shape, generator: torch.Generator) -> Inputs:
    # the empty tensor carries the dtype of the result
    return {"t": _integers(1000, shape.batch, generator), "like": torch.empty(0)}


def _conditioning_formula(t_emb: Tensor, y: Tensor, table: Tensor) -> Tensor:
    return torch.nn.functional.silu(t_emb + table[y])


def _timesteps(t: Tensor, like: Tensor) -> Tensor:
    return ops.timestep_embedding(t, 256, dtype=like.dtype)


def _timesteps_formula(t: Tensor, like: Tensor) -> Tensor:
    return formulas.timestep_embedding(t, 256, dtype=like.dtype).to(like.dtype)


def parameters(named: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer (weights, biases)."""
    return [value for name, value in named.items() if name.startswith("weight")], [
        value for name, value in named.items() if name.startswith("bias")
    ]


def _modulations(c: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
    """In its parts, as the models have them."""
    weights, biases = parameters(named)
    return split(ops.modulations(c, weights, biases), weights)


def _modulations_formula(c: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
    """As models compute it, without putting the parts side by side."""
    return tuple(map(partial(torch.nn.functional.linear, c), *parameters(named)))


def _heads(shape: Shape) -> Mapping[str, Any]:
    return {"num_heads": shape.num_heads}


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator(
            "layer_norm_modulate",
            "adaln",
            ops.layer_norm_modulate,
            formulas.layer_norm_modulate,
            _draw_norm,
            mixed=("x",),
            kernel=True,
        ),
        Operator(
            "gated_residual",
            "adaln",
            ops.gated_residual,
            formulas.gated_residual,
            _draw_residual,
            mixed=("residual",),
            kernel=True,
        ),
        Operator(
            "gated_residual_layer_norm_modulate",
            "adaln",
            ops.gated_residual_layer_norm_modulate,
            formulas.gated_residual_layer_norm_modulate,
            _draw_fused,
            mixed=("residual",),
            kernel=True,
        ),
        Operator("linear_gelu", "gemm", ops.linear_gelu, formulas.linear_gelu, _draw_linear_gelu, kernel=True),
        Operator(
            "linear_gated_residual",
            "gemm",
            ops.linear_gated_residual,
            formulas.linear_gated_residual,
            _draw_linear_residual,
            mixed=("residual",),
            kernel=True,
        ),
        Operator("gelu_mlp", "gemm", ops.gelu_mlp, formulas.gelu_mlp, _draw_mlp, kernel=True),
        Operator("modulations", "gemm", _modulations, _modulations_formula, _draw_modulations, kernel=True),
        Operator(
            "self_attention",
            "attention",
            ops.self_attention,
            formulas.self_attention,
            _draw_attention,
            options=_heads,
            kernel=True,
        ),
        Operator(
            "self_attention+bias",
            "attention",
            ops.self_attention,
            formulas.self_attention,
            _draw_biased_attention,
            options=_heads,
            kernel=True,
        ),
        # its kernel is for inference: where a gradient is wanted the formula would be compared with itself
        Operator(
            "conditioning",
            "embedding",
            ops.conditioning,
            _conditioning_formula,
            _draw_conditioning,
            kernel=True,
            gradients=False,
        ),
        Operator(
            "timestep_embedding",
            "embedding",
            _timesteps,
            _timesteps_formula,
            _draw_timesteps,
            kernel=True,
            gradients=False,
        ),
    )
}


def draw_inputs(
    operator: Operator, shape: Shape, dtype: torch.dtype, device: torch.device | str, mixed: bool = False, seed: int = 0
) -> Inputs:
    """The operator's inputs in ``dtype`` on ``device``; with ``mixed``, its residual stream in fp32."""
    where = torch.device(device)  # meta tensors have no values to draw
    inputs = operator.draw(shape, torch.Generator("cpu" if where.type == "meta" else where).manual_seed(seed))
    return {
        name: value.to(device, torch.float32 if mixed and name in operator.mixed else dtype)
        if value.is_floating_point()
        else value.to(device)
        for name, value in inputs.items()
    }


def run(
    function: Callable[..., Any],
    inputs: Inputs,
    options: Mapping[str, Any],
    wanted: tuple[str, ...],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs, and the gradients of the ``wanted`` inputs for random, non-contiguous incoming gradients.

    Args:
        dtype: casts every input first (fp64 for the oracle); None keeps each one's own.
    """
    leaves = {
        name: (value.to(dtype) if dtype is not None and value.is_floating_point() else value)
        .detach()
        .requires_grad_(name in wanted)
        for name, value in inputs.items()
    }
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output{index}": output.detach() for index, output in enumerate(outputs)}
    if wanted:
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        # representable in every run, so that the oracle and the candidate see the same values
        dtypes = [value.dtype for value in inputs.values() if value.is_floating_point()]
        narrowest = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
        incoming = [
            _normal(tuple(output.mT.shape), generator).mT.to(narrowest).to(output) for output in outputs
        ]
        # an output may not depend on the wanted inputs: the residual does not on shift and scale
        pairs = [(output, value) for output, value in zip(outputs, incoming, strict=True) if output.requires_grad]
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            [leaves[name] for name in wanted],
            [value for _, value in pairs],
            materialize_grads=True,
        )
        results |= {f"d_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return results


def check(
    operator: Operator,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    mixed: bool = False,
    wanted: tuple[str, ...] | None = None,
    seed: int = 0,
    elements: int = 1,
) -> dict[str, Verdict]:
    """Judges an operator's outputs and gradients by the numerics rule.

    Args:
        dtype: the working dtype; with ``mixed``, the residual stream is fp32.
        wanted: the inputs whose gradients are checked; None means all.
        elements: the fewest of a tensor that is judged; smaller tensors are pooled over several draws.

    Returns:
        verdicts by name: ``output0``, ..., ``d_<input>``.
    """
    options = operator.options(shape)
    pooled: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    missing = True
    while missing:
        inputs = draw_inputs(operator, shape, dtype, device, mixed, seed)
        names = operator.differentiable(inputs) if wanted is None else wanted
        oracle = run(operator.formula, inputs, options, names, torch.float64)
        yardstick = run(operator.formula, inputs, options, names)
        actual = run(operator.fused, inputs, options, names)
        for name, value in actual.items():
            if value.dtype != yardstick[name].dtype:
                raise TypeError(f"{operator.name}: {name} must be {yardstick[name].dtype}, got {value.dtype}")
            pooled.setdefault(name, []).append((value, yardstick[name], oracle[name]))
        missing = any(0 < len(draws) * draws[0][0].numel() < elements for draws in pooled.values())
        seed += 1
    verdicts = {}
    for name, draws in pooled.items():
        actual_all, yardstick_all, oracle_all = (torch.stack(values) for values in zip(*draws, strict=True))
        verdicts[name] = judge("operator", actual_all, yardstick_all, oracle_all, dtype)
    return verdicts


# tensors of (B, T, D), and vectors of (B, D), read and written: forward, backward with every gradient
_ADALN = {
    "layer_norm_modulate": ((2, 2), (3, 3)),
    "gated_residual": ((3, 1), (3, 2)),
    "gated_residual_layer_norm_modulate": ((4, 3), (6, 5)),
}
# of each element of (B, T, D): a norm is about 8 operations, gate and modulation 2 each; twice that backward
_ADALN_FLOPS = {"layer_norm_modulate": 10, "gated_residual": 2, "gated_residual_layer_norm_modulate": 12}


@dataclass(frozen=True)
class Work:
    """What one call must do at least, and in which unit its rate is stated."""

    flops: int
    bytes: int
    unit: Unit

    def rate(self, ms: float) -> float:
        """GB/s or TFLOP/s of a call that takes ``ms``."""
        return self.bytes / ms / 1e6 if self.unit == "GB/s" else self.flops / ms / 1e9


def work(operator: str, direction: Direction, shape: Shape, itemsize: int) -> Work:
    """The least work of an operator.

    Args:
        operator: its name in OPERATORS.
        direction: "backward" computes every gradient from what the forward kept, the inputs at least.
        shape: B, T, D and the hidden width.
        itemsize: bytes of an element.

    Raises:
        KeyError: an operator without an entry.
    """
    backward = direction == "backward"
    batch, tokens, width = shape.batch, shape.tokens, shape.width
    rows, hidden = batch * tokens, shape.ratio * shape.width
    if operator in _ADALN:
        tensors, vectors = _ADALN[operator][backward]
        elements = rows * width * tensors + batch * width * vectors
        flops = _ADALN_FLOPS[operator] * rows * width * (2 if backward else 1)
        return Work(flops, elements * itemsize, "GB/s")
    if operator == "modulations":
        columns = (6 * (shape.layers - 1) + 2) * width
        flops, parameters = 2 * batch * width * columns, (width + 1) * columns
        elements = batch * (width + columns) + parameters
        # backward: c, the weights and the incoming gradient are read, a gradient of each parameter and of c is written
        backwards = batch * (2 * width + columns) + 2 * parameters - columns
        return Work(flops * (2 if backward else 1), (backwards if backward else elements) * itemsize, "GB/s")
    gemm = 2 * rows * width * hidden
    narrow, wide, weight = rows * width, rows * hidden, width * hidden
    bias = shape.num_heads * tokens**2 if operator == "self_attention+bias" else 0
    attention = 4 * batch * tokens**2 * width
    # (FLOPs, elements) forward, backward: two matmuls for one, five for attention's two; what is read again are the
    # inputs and the incoming gradient, what is written a gradient for each input
    table = {
        "linear_gelu": ((gemm, narrow + weight + wide), (2 * gemm, 2 * narrow + 2 * weight + wide)),
        "linear_gated_residual": ((gemm, wide + weight + 2 * narrow), (2 * gemm, 2 * wide + 2 * weight + narrow)),
        "gelu_mlp": ((2 * gemm, 2 * narrow + 2 * weight), (4 * gemm, 3 * narrow + 4 * weight)),
        "self_attention": ((attention, 4 * narrow + bias), (attention * 5 // 2, 8 * narrow + 2 * bias)),
    }
    flops, elements = table[operator.removesuffix("+bias")][backward]
    return Work(flops, elements * itemsize, "TFLOP/s")
