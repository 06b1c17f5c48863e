"""The old and the new forward of a module, side by side on random parameters: the numerics decide.

Parameters are drawn anew in a copy, for a freshly initialised adaLN-Zero block gives its input back whatever its
forward does. The rule is the project's for operators: the oracle is the old forward in fp64, the yardstick the old one
in the module's dtype, and err(new) <= 2 * err(old) + eps / 2 over each output, and over all gradients together.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import use_backend
from ._adapter import Adapter, has_hooks
from ._swap import swap, unswap

_SEED = 0
_INTERNAL = frozenset(vars(nn.Module()))
_SAID = (bool, int, float, str, torch.dtype, torch.device, type, FunctionType, BuiltinFunctionType)


class _Plain:
    """An object whose attributes are all that it is: it is as large as every such object."""


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What two modules share that would pass or fail together: classes, settings and shapes, not values."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        if has_hooks(child):
            parts.append((name, "hooks"))
        parts.append((name, type(child), "forward" in child.__dict__, tuple(sorted(_settings(child).items()))))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    parts += [(name, tuple(x.shape), x.dtype, x.device) for name, x in tensors]
    return tuple(parts)


def _settings(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a module holds beside its parameters, buffers, children and hooks."""
    return {key: _setting(value) for key, value in vars(module).items() if key not in _INTERNAL}


def _setting(value: Any, depth: int = 3) -> tuple[Any, ...]:
    """A value that is hashed by what it says, as far as that can be looked into; else by which object it is."""
    kind = type(value)
    if value is None or isinstance(value, _SAID):
        return kind, value
    parts: Any = None
    if isinstance(value, (tuple, list)):
        parts = enumerate(value)
    elif isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, partial):
        parts = {"func": value.func, "args": value.args, "keywords": value.keywords}.items()
    elif kind.__basicsize__ == _Plain.__basicsize__ and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        parts = vars(value).items()
    if parts is None or not depth:
        return kind, id(value)
    return kind, tuple((key, _setting(item, depth - 1)) for key, item in parts)


def disagreement(module: nn.Module, adapter: Adapter) -> str | None:
    """How the adapter's forward differs from the module's own on its device, or None.

    In inference, in training, under autocast, and in the gradients.
    """
    tensors = [x for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()]
    device, dtype = tensors[0].device, tensors[0].dtype
    generator = torch.Generator().manual_seed(_SEED)
    with torch.inference_mode(False):  # whose tensors have no gradients
        try:
            with torch.device("cpu"):  # the generator's, whatever the default device is
                given = adapter.inputs(module, generator)
            if given is None:
                return None
            old = _randomised(module, generator)
            new = copy.deepcopy(old)
            swap(new, adapter.mixin)
            oracle = copy.deepcopy(old).double()
            hooked = [name for name, child in module.named_modules() if name and has_hooks(child)]
            calls = [_counted(model, hooked) for model in (old, new)]
        except Exception as error:  # whatever a foreign module does when it is copied
            return f"it could not be checked: {_said(error)}"
        modes: list[tuple[str, bool, bool]] = [("in inference", False, False), ("in training", True, False)]
        if dtype == torch.float32 and torch.amp.is_autocast_available(device.type):
            modes.append(("under autocast", False, True))
        for mode, training, autocast in modes:
            for model in (old, new, oracle):
                model.train(training)
            inputs = [_moved(value, device, dtype) for value in given]
            try:
                exact = _run(oracle, [_moved(value, device, torch.float64) for value in given], device)
                before = [_settings(model) for model in (old, new)]
                yardstick = _run(old, inputs, device, autocast)
            except Exception as error:
                if autocast:
                    continue  # nobody runs it so
                return f"its own forward could not be checked: {_said(error)}"
            if any(isinstance(value, Tensor) and value._version for value in inputs):
                return "its own forward writes into its input, the fused one does not"
            try:
                actual = _run(new, inputs, device, autocast)
            except Exception as error:
                return f"the fused forward raised: {_said(error)}"
            if kept := _changes(old, before[0]) - _changes(new, before[1]):
                return f"its own forward writes {min(kept)}, the fused one does not"
            for name in hooked:
                if calls[0][name] != calls[1][name]:
                    return f"{name} has hooks, which the fused forward would skip"
            if actual.shape != yardstick.shape or actual.dtype != yardstick.dtype:
                shapes = f"{tuple(actual.shape)} {actual.dtype} against {tuple(yardstick.shape)} {yardstick.dtype}"
                return f"the fused forward gives {shapes}{' under autocast' if autocast else ''}"
            # a stream that stays in fp32 under autocast is judged as fp32
            eps = torch.finfo(yardstick.dtype if autocast else dtype).eps
            found, bound = _error([actual], [exact]), 2 * _error([yardstick], [exact]) + eps / 2
            if not found <= bound:
                return f"its forward is another function {mode}: {_off(found, bound)}"
        return _disagreement_of_gradients((old, new, oracle), given, device, dtype, exact.shape)


def _disagreement_of_gradients(
    models: tuple[nn.Module, nn.Module, nn.Module],
    given: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
    shape: torch.Size,
) -> str | None:
    """How the gradients differ, the formulas' for those of the fused forward: what is cut off or scaled shows there."""
    old, new, oracle = models
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(_SEED), device="cpu").to(device)
    for model in models:
        model.train()
    calls = _counted(old, [name for name, _ in old.named_children()])
    try:
        exact, _ = _gradients(oracle, [_moved(value, device, torch.float64) for value in given], direction)
        yardstick, before = _gradients(old, [_moved(value, device, dtype) for value in given], direction, calls)
    except Exception:
        return None  # nobody trains it
    if again := [name for name in calls if calls[name] > before[name]]:
        return f"its own forward computes {again[0]} again in the backward (checkpointing), the fused one does not"
    try:
        with use_backend("torch"):
            actual, _ = _gradients(new, [_moved(value, device, dtype) for value in given], direction)
    except Exception as error:
        return f"the fused forward's backward raised: {_said(error)}"
    found, bound = _error(actual, exact), 2 * _error(yardstick, exact) + torch.finfo(dtype).eps / 2
    return None if found <= bound else f"its gradients are another function's: {_off(found, bound)}"


def _gradients(
    model: nn.Module, inputs: list[Any], direction: Tensor, calls: Counter[str] | None = None
) -> tuple[list[Tensor], Counter[str]]:
    """Those of the output along a direction, for inputs and parameters; the calls so far when the backward began."""
    values = [value for item in inputs for value in (item.values() if isinstance(item, dict) else [item])]
    learning = [x for x in (*values, *model.parameters()) if isinstance(x, Tensor) and x.is_floating_point()]
    for x in learning:
        x.requires_grad_(True)
    out = _run(model, inputs, direction.device, learns=True)
    before = Counter(calls)
    if out.requires_grad:
        out.backward(direction.to(out.dtype))
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in learning], before


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copies of tensors on the device, floating-point ones in the dtype; in a dict (keyword arguments) too."""
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device, dtype if value.is_floating_point() else value.dtype, copy=True)


def _run(
    model: nn.Module, inputs: list[Any], device: torch.device, autocast: bool = False, learns: bool = False
) -> Tensor:
    *positional, keywords = inputs if isinstance(inputs[-1], dict) else [*inputs, {}]
    with _seeded(device), torch.set_grad_enabled(learns), torch.autocast(device.type, enabled=autocast):
        out = model(*positional, **keywords)
    if not isinstance(out, Tensor):
        raise TypeError(f"it gives {type(out).__name__}, not a tensor")
    return out


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers each time; torch.manual_seed would leave the other GPUs seeded alike."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(_SEED)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_SEED)
        yield


def _changes(module: nn.Module, before: dict[str, tuple[Any, ...]]) -> set[str]:
    """What a module holds now that it did not hold before."""
    return {key for key, value in _settings(module).items() if before.get(key) != value}


def _error(values: Sequence[Tensor], oracles: Sequence[Tensor]) -> float:
    """||values - oracles|| / ||oracles|| over all of them; infinite where any is not finite."""
    pairs = [(value.double(), oracle.double()) for value, oracle in zip(values, oracles, strict=True)]
    norm = sum(float(oracle.square().sum()) for _, oracle in pairs) ** 0.5
    error = sum(float((value - oracle).square().sum()) for value, oracle in pairs) ** 0.5
    return error / max(norm, torch.finfo(torch.double).tiny) if math.isfinite(error) else math.inf


def _off(found: float, bound: float) -> str:
    return f"the fused one is off by {found:.1e}, allowed {bound:.1e}"


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
            values = torch.randn(parameter.shape, generator=generator, device="cpu") * scale
            parameter.copy_(values.to(parameter))
    return model


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
