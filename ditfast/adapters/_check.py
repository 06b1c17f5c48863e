"""The old and the new forward of a module, side by side on random parameters: the numerics decide.

Parameters are drawn anew in a copy, for a freshly initialised adaLN-Zero block gives its input back whatever its
forward does. The rule is the project's for operators: the oracle is the old forward in fp64, the yardstick the old one
in the module's dtype, and err(new) <= 2 * err(old) + eps / 2 over each tensor.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ._adapter import Adapter, has_hooks
from ._swap import swap, unswap

_SEED = 0
_INTERNAL = frozenset(vars(nn.Module()))
_SAID = (bool, int, float, str, torch.dtype, type, FunctionType, BuiltinFunctionType)


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What two modules share that would pass or fail together: classes, settings and shapes, not values."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        if has_hooks(child):
            parts.append((name, "hooks"))
        settings = [(key, _setting(value)) for key, value in sorted(vars(child).items()) if key not in _INTERNAL]
        parts.append((name, type(child), "forward" in child.__dict__, tuple(settings)))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    parts += [(name, tuple(x.shape), x.dtype, x.device) for name, x in tensors]
    return tuple(parts)


def _setting(value: Any) -> Any:
    """A value that is hashed by what it says, a function that is itself; of all else the type."""
    if value is None or isinstance(value, _SAID):
        return value
    return repr(value) if isinstance(value, (tuple, list, dict, partial)) else type(value)


def disagreement(module: nn.Module, adapter: Adapter) -> str | None:
    """How the adapter's forward differs from the module's own on its device, in eval and training mode, or None."""
    tensors = [x for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()]
    device, dtype = tensors[0].device, tensors[0].dtype
    generator = torch.Generator().manual_seed(_SEED)
    try:
        given = adapter.inputs(module, generator)
        if given is None:
            return None
        inputs = [_moved(value, device, dtype) for value in given]
        old = _randomised(module, generator)
        new = copy.deepcopy(old)
        swap(new, adapter.mixin)
        oracle = copy.deepcopy(old).double()
        hooked = [name for name, child in module.named_modules() if name and has_hooks(child)]
        calls = [_counted(model, hooked) for model in (old, new)]
    except Exception as error:  # whatever a foreign module does when it is copied
        return f"it could not be checked: {_said(error)}"
    for training in (False, True):
        for model in (old, new, oracle):
            model.train(training)
        try:
            exact = _run(oracle, [_moved(value, device, torch.float64) for value in inputs], device)
            yardstick = _run(old, inputs, device)
        except Exception as error:
            return f"its own forward could not be checked: {_said(error)}"
        try:
            actual = _run(new, inputs, device)
        except Exception as error:
            return f"the fused forward raised: {_said(error)}"
        for name in hooked:
            if calls[0][name] != calls[1][name]:
                return f"{name} has hooks, which the fused forward would skip"
        if actual.shape != yardstick.shape or actual.dtype != yardstick.dtype:
            shapes = f"{tuple(actual.shape)} {actual.dtype} against {tuple(yardstick.shape)} {yardstick.dtype}"
            return f"the fused forward gives {shapes}"
        found, bound = _error(actual, exact), 2 * _error(yardstick, exact) + torch.finfo(dtype).eps / 2
        if not found <= bound:
            mode = "in training" if training else "in inference"
            return f"its forward is another function {mode}: the fused one is off by {found:.1e}, allowed {bound:.1e}"
    return None


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors on the device, floating-point ones in the dtype; in a dict (keyword arguments) too."""
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _run(model: nn.Module, inputs: list[Any], device: torch.device) -> Tensor:
    *positional, keywords = inputs if isinstance(inputs[-1], dict) else [*inputs, {}]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(_SEED)
        with torch.autocast(device.type, enabled=False):
            out = model(*positional, **keywords)
    if not isinstance(out, Tensor):
        raise TypeError(f"it gives {type(out).__name__}, not a tensor")
    return out


def _error(value: Tensor, oracle: Tensor) -> float:
    """||value - oracle|| / ||oracle||; infinite where either is not finite."""
    norm = torch.linalg.vector_norm(oracle.double())
    error = torch.linalg.vector_norm(value.double() - oracle.double()) / norm.clamp_min(torch.finfo(torch.double).tiny)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def _counted(model: nn.Module, names: list[str]) -> Counter[str]:
    """How often modules will have been called."""
    calls: Counter[str] = Counter()
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def _randomised(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with other parameters: matrices that keep the scale of what they multiply, all gates open.

    Without the hooks, which may hold anything and are not to be called with made-up tensors, but for those before an
    inner module's forward, which may make its parameters; its parts run their own forwards.
    """
    hooks = [
        value
        for child in module.modules()
        for key, value in child.__dict__.items()
        if key.endswith("_hooks") and isinstance(value, dict) and (key != "_forward_pre_hooks" or child is module)
    ]
    model = copy.deepcopy(module, {id(value): OrderedDict() for value in hooks})
    for child in model.modules():
        unswap(child)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            scale = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.5
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(values.to(parameter))
    return model


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
