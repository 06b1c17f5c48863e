"""The work an operator must do: FLOPs, and the bytes of its inputs and outputs, each read or written once.

Those that move (B, T, D) tensors or weights and compute little are held against the copy bandwidth, the others, whose
matmuls decide, against the matmul rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...testing.operators import Shape
from ..records.rows import Direction, Unit

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
