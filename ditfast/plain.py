"""Whether a module's parts may be read instead of called.

A fused forward reads parameters where the module's own forward would call a layer. That is allowed only while the call
would do nothing else: no subclass (LoRA, sharding), no forward of its own (offloading), no hooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

_READABLE = (Tensor, nn.Parameter, FakeTensor)


def child(module: nn.Module, name: str) -> Any:
    """A child, ten times sooner than as an attribute; that of a wrapped module where this one wraps it."""
    found = module._modules.get(name)
    return getattr(module, name) if found is None else found


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own, before or after its forward or backward."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def has_global_hooks() -> bool:
    """Whether hooks are called around every module. Not seen while compiling."""
    return _has_any_global_hook() and not torch.compiler.is_compiling()


def is_unchanged(module: nn.Module, kind: type[nn.Module]) -> bool:
    """:func:`is_plain` for whoever has asked for global hooks: a model asks this a few hundred times in each call."""
    if type(module) is not kind:
        return False
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module is exactly of this class, with its class's forward and without hooks, its own or global.

    Global hooks are not seen while compiling.
    """
    return is_unchanged(module, kind) and not has_global_hooks()


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


def parameters_of(*linears: nn.Module | None) -> list[Tensor | None] | None:
    """Weight and bias of each Linear, or None where one is not readable."""
    if has_global_hooks():
        return None
    strided = torch.strided
    tensors: list[Tensor | None] = []
    for linear in linears:
        if linear is None or not is_unchanged(linear, nn.Linear):
            return None
        weight, bias = _weight_and_bias(linear)
        if type(weight) not in _READABLE or weight.layout is not strided:
            return None
        if bias is not None and (type(bias) not in _READABLE or bias.layout is not strided):
            return None
        tensors += (weight, bias)
    return tensors


def _weight_and_bias(linear: Any) -> tuple[Any, Any]:
    own = linear.__dict__
    parameters = own["_parameters"]
    registered = "weight" in parameters and "bias" in parameters and "weight" not in own and "bias" not in own
    if registered and not torch.compiler.is_compiling():
        return parameters["weight"], parameters["bias"]  # as attributes they take ten times as long
    return linear.weight, linear.bias  # a replica of DataParallel has plain tensors in the place of parameters


def are_plain_modulations(modulations: Iterable[nn.Module]) -> bool:
    """Whether each adaLN_modulation is what it was built as, so that its Linear may be read apart from its SiLU."""
    return not has_global_hooks() and all(map(_is_unchanged_modulation, modulations))


def _is_unchanged_modulation(modulation: nn.Module) -> bool:
    if not is_unchanged(modulation, nn.Sequential):
        return False
    silu: Any = next(iter(modulation._modules.values()), None)
    return len(modulation._modules) == 2 and is_unchanged(silu, nn.SiLU) and not silu.inplace  # which writes c


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
    if not is_plain(norm, nn.LayerNorm):
        return False
    return not norm.elementwise_affine and len(norm.normalized_shape) == 1  # type: ignore[arg-type]


def is_identity(module: nn.Module, training: bool = False) -> bool:
    """Whether a module without hooks passes its input on unchanged: an identity, a dropout (when not training)."""
    kind = type(module)
    if not is_unchanged(module, kind):
        return False
    if kind is nn.Identity:
        return True
    if kind is nn.Dropout:
        return not training or module.p == 0  # type: ignore[return-value]
    probability = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "drop_prob", None)
    if isinstance(probability, (int, float)) and not list(module.parameters()) and not list(module.children()):
        return not training or probability == 0
    return False


def other_children(module: nn.Module, *roles: str) -> dict[str, nn.Module]:
    """The children besides those in ``roles``."""
    return {name: child for name, child in module._modules.items() if name not in roles and child is not None}


def others_are_identities(module: nn.Module, *roles: str) -> bool:
    """Whether all children besides those in ``roles`` may be left out at present."""
    others = False
    for name, child in module._modules.items():
        if child is not None and name not in roles:
            others = True
            if not is_identity(child, child.training):
                return False
    return not (others and has_global_hooks())


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
