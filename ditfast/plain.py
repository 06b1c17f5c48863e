"""Whether a module's parts may be read instead of called.

A fused forward reads parameters where the module's own forward would call a layer. That is allowed only while the call
would do nothing else: no subclass (LoRA, sharding), no forward of its own (offloading), no hooks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

_READABLE = (Tensor, nn.Parameter, FakeTensor)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own, before or after its forward or backward."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module is exactly of this class, with its class's forward and without hooks, its own or global.

    Global hooks are not seen while compiling.
    """
    if type(module) is not kind or "forward" in module.__dict__ or has_hooks(module):
        return False
    return torch.compiler.is_compiling() or not _has_any_global_hook()


def is_as_built(model: nn.Module) -> bool:
    """Whether a model's results follow from its parameters, buffers and layers: torch's and ditfast's, unwrapped.

    Others (LoRA's, parametrised or sharded ones) may go by Python values that change without a trace.
    """
    return all(
        type(module).__module__.startswith(("torch.nn.modules.", "ditfast.")) and is_plain(module, type(module))
        for module in model.modules()
    )


def are_readable(*linears: nn.Module) -> bool:
    """Whether Linears may be read as their parameters, which must be tensors that the kernels can read in turn."""
    return parameters_of(*linears) is not None


def parameters_of(*linears: nn.Module) -> list[Tensor | None] | None:
    """Weight and bias of each Linear, or None where one is not readable."""
    compiling = torch.compiler.is_compiling()
    if not compiling and _has_any_global_hook():
        return None
    tensors: list[Tensor | None] = []
    for linear in linears:
        if type(linear) is not nn.Linear or "forward" in linear.__dict__ or has_hooks(linear):
            return None
        own = linear.__dict__["_parameters"]
        for name in ("weight", "bias"):
            # a replica of DataParallel has plain tensors in the place of parameters
            tensor = own[name] if not compiling and name in own else getattr(linear, name)
            if tensor is not None and not (type(tensor) in _READABLE and tensor.layout is torch.strided):
                return None
            tensors.append(tensor)
    return tensors


def is_plain_modulation(modulation: nn.Module | None) -> bool:
    """Whether an adaLN_modulation is what it was built as, so that its Linear may be read apart from its SiLU."""
    if modulation is None or not is_plain(modulation, nn.Sequential):
        return False
    silu, *others = modulation._modules.values()
    return len(others) == 1 and is_plain(cast(nn.Module, silu), nn.SiLU) and not cast(nn.SiLU, silu).inplace


def norm_reason(name: str, norm: Any) -> str | None:
    """Why a norm is not a LayerNorm without parameters over the last axis and without hooks, or None."""
    if type(norm) is not nn.LayerNorm or "forward" in norm.__dict__:
        return f"{name} is {type(norm).__name__}, not torch's LayerNorm"
    if norm.elementwise_affine:
        return f"{name} has parameters, the modulated norm has none"
    if len(norm.normalized_shape) != 1:
        return f"{name} must run over one axis, got {tuple(norm.normalized_shape)}"
    return f"{name} has hooks, which the fused forward would skip" if has_hooks(norm) else None


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether the modulated norm may replace it at present."""
    return is_plain(norm, nn.LayerNorm) and norm_reason("norm", norm) is None


def is_identity(module: nn.Module, training: bool = False) -> bool:
    """Whether a module without hooks passes its input on unchanged: an identity, a dropout (when not training)."""
    if has_hooks(module) or "forward" in module.__dict__:
        return False
    if type(module) is nn.Identity:
        return True
    if type(module) is nn.Dropout:
        return not training or module.p == 0
    probability = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "drop_prob", None)
    if isinstance(probability, (int, float)) and not list(module.parameters()) and not list(module.children()):
        return not training or probability == 0
    return False


def other_children(module: nn.Module, *roles: str) -> dict[str, nn.Module]:
    """The children besides those in ``roles``."""
    return {name: child for name, child in module._modules.items() if name not in roles and child is not None}


def others_are_identities(module: nn.Module, *roles: str) -> bool:
    """Whether all children besides those in ``roles`` may be left out at present."""
    for name, child in module._modules.items():
        if name in roles or child is None:
            continue
        if not (is_identity(child, child.training) and is_plain(child, type(child))):
            return False
    return True


def unknown_part(module: nn.Module, *roles: str) -> str | None:
    """Which parameter, buffer or child a forward written for ``roles`` would leave out, as a reason, or None."""
    names = [name for kind in (module._parameters, module._buffers) for name, x in kind.items() if x is not None]
    if names:
        return f"it has {names[0]}, which the fused forward does not know"
    for name, child in other_children(module, *roles).items():
        if has_hooks(child):
            return f"{name} has hooks, which the fused forward would skip"
        if not is_identity(child):
            return f"it has {name} ({type(child).__name__}), which the fused forward does not know"
    return None
