"""The fused operators: validated, differentiable, out of place; their formulas are ``ditfast.reference.ops``.

All arguments may be DTensors of one mesh in place of tensors; ``ditfast/ops/sharding.py`` has the layouts.
"""

from .adaln import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate
from .attention import attention_backend, attention_backends, self_attention
from .backend import available_backends, current_backend, interpreter_unavailable, use_backend
from .conditioning import conditioning, timestep_embedding
from .linear import gelu_mlp, linear_gated_residual, linear_gelu
from .modulations import modulations

__all__ = [
    "attention_backend",
    "attention_backends",
    "available_backends",
    "conditioning",
    "current_backend",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gelu_mlp",
    "interpreter_unavailable",
    "layer_norm_modulate",
    "linear_gated_residual",
    "linear_gelu",
    "modulations",
    "self_attention",
    "timestep_embedding",
    "use_backend",
]
