"""Shared by the adaLN kernels' tests: the operators with their kernels demanded."""

from dataclasses import replace

import torch

from ditfast import ops
from ditfast.bench.operators import OPERATORS

NAMES = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def triton_operator(name):
    """The operator with its kernel demanded."""
    operator = OPERATORS[name]

    def fused(**inputs):
        with ops.use_backend("triton"):
            return operator.fused(**inputs)

    return replace(operator, fused=fused)


def failures(verdicts):
    return {name: verdict for name, verdict in verdicts.items() if not verdict.ok}
