"""The old and the new forward of a module, side by side: their computations (:mod:`.trace`), and their numbers.

Parameters are drawn anew in a copy, because a freshly initialised adaLN-Zero block returns its input whatever its
forward does. Numbers are judged by the rule for operators (:mod:`ditfast.parity`): the oracle is the old forward in
fp64, the yardstick the old forward in the module's dtype. Each output is judged, and all gradients together.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import parity
from ..ops import use_backend
from ..parity import judge
from ..plain import has_hooks, is_identity
from .adapter import Adapter
from .fakes import INTERNAL, is_plain_object
from .inputs import drawn, enlarged, moved
from .outside import Outside, state_of
from .swap import swap, unswap
from .trace import differences, one_line

_SEED = 0
# (samples, tokens, a factor of the inputs) besides an adapter's own
_ELSEWHERE = ((2, 64, 4), (2, 300, 1))
_PLAIN_TYPES = (bool, int, float, str, torch.dtype, torch.device, type, FunctionType, BuiltinFunctionType)


@dataclass(frozen=True)
class Verdict:
    """Why a module's own forward is not the fused one, or None; and what its trace could not settle, or ""."""

    reason: str | None
    note: str = ""


class _Object(NamedTuple):
    """A setting of which only the object's identity is known."""

    identity: int


def _is_lasting(parts: Any) -> bool:
    """Whether a fingerprint holds for later modules too: an id in it may be another object's by then."""
    return not isinstance(parts, _Object) and (not isinstance(parts, tuple) or all(map(_is_lasting, parts)))


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """The same for modules that would pass or fail together: their classes, settings and shapes, not values."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        if has_hooks(child):
            parts.append((name, "hooks"))
        runs = _Object(0) if "forward" in child.__dict__ else getattr(type(child), "forward", None)
        settings = _settings(child)
        if is_identity(child):  # a dropout's rate: only whether it is 0 counts, else the module's own forward runs
            settings = {key: (float, not x[1]) if x[0] is float else x for key, x in settings.items()}
        parts.append((name, type(child), runs, tuple(sorted(settings.items()))))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    parts += [(name, tuple(x.shape), x.dtype, x.device) for name, x in tensors]
    return tuple(parts)


def _settings(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a module holds beside its parameters, buffers, children and hooks."""
    return {key: _setting(value) for key, value in vars(module).items() if key not in INTERNAL}


def _setting(value: Any, depth: int = 3) -> tuple[Any, ...]:
    """A value as something hashable: its contents as far as they can be looked into; else which object it is."""
    kind = type(value)
    if value is None or isinstance(value, _PLAIN_TYPES):
        return kind, value
    parts: Any = None
    if isinstance(value, (tuple, list)):
        parts = enumerate(value)
    elif isinstance(value, dict):
        parts = [item for item in value.items() if item[0] != "target_name"]  # where peft has put a layer
    elif isinstance(value, partial):
        parts = {"func": value.func, "args": value.args, "keywords": value.keywords}.items()
    elif state := state_of(value):
        return kind, state
    elif is_plain_object(value):
        parts = vars(value).items()
    if parts is None or not depth:
        return kind, _Object(id(value))
    return kind, tuple((key, _setting(item, depth - 1)) for key, item in parts)


def disagreement(module: nn.Module, adapter: Adapter) -> Verdict:
    """How the adapter's forward differs from the module's own on its device: in what it computes, and in numbers.

    What the module's code writes outside of it meanwhile (on classes, in globals, in caches) is put back.
    """
    outside = Outside(module)
    try:
        return _disagreement(module, adapter, outside)
    finally:
        outside.put_back()


def _disagreement(module: nn.Module, adapter: Adapter, outside: Outside) -> Verdict:
    tensors = [x for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()]
    device, dtype = tensors[0].device, tensors[0].dtype
    generator = torch.Generator().manual_seed(_SEED)
    with torch.inference_mode(False), _seeded(device):  # inference mode's tensors have no gradients
        try:
            arguments = drawn(adapter, module, generator)
            if arguments is None:
                return Verdict(None)
            old = _randomised(module, generator)
            new = copy.deepcopy(old)
            swap(new, adapter.mixin)
            oracle = copy.deepcopy(old).double()
            hooked = [name for name, child in module.named_modules() if name and has_hooks(child)]
        except Exception as error:  # whatever a foreign module does when it is copied
            return Verdict(f"it could not be checked: {one_line(error)}")
        models = old, new, oracle
        try:
            with _counted(old, hooked) as old_calls, _counted(new, hooked) as new_calls:
                numbers = _disagreement_of_numbers(models, arguments, device, dtype, (old_calls, new_calls), outside)
            if numbers is None:
                numbers = _disagreement_of_gradients(models, arguments, device, dtype)
        except _Uncheckable as error:
            return Verdict(f"its own forward could not be checked: {error}")
        identity = fingerprint(module)
        known = _is_lasting(identity) and numbers is None
        key = (identity, outside.values(), adapter.mixin, adapter.mixin.forward) if known else None
        reason, notes = differences(old, new, arguments, device, dtype, key, outside.put_back, numbers is None)
        outside.put_back()
        if reason is None and numbers is None:
            numbers, more_notes = _disagreement_elsewhere(models, adapter, module, generator, arguments, device, dtype)
            notes += more_notes
        return Verdict(reason or numbers, "; ".join(notes))


class _Uncheckable(Exception):
    """A module's own forward does not run."""


def _disagreement_of_numbers(
    models: tuple[nn.Module, nn.Module, nn.Module],
    arguments: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
    calls: tuple[Counter[str], Counter[str]],
    outside: Outside,
) -> str | None:
    """How the outputs differ in the module's dtype, and what else its own forward does: writing, drawing, calling."""
    old, new, oracle = models
    modes: list[tuple[str, bool, bool]] = [("in inference", False, False), ("in training", True, False)]
    if dtype == torch.float32 and torch.amp.is_autocast_available(device.type):
        modes.append(("under autocast", False, True))
    for mode, training, autocast in modes:
        for model in models:
            model.train(training)
        inputs = [moved(value, device, dtype) for value in arguments]
        try:
            exact, _ = _run(oracle, [moved(value, device, torch.float64) for value in arguments], device)
            outside.put_back()
            before = [_settings(model) for model in (old, new)]
            yardstick, old_draws = _run(old, inputs, device, autocast)
            written_outside = outside.changes()
            outside.put_back()
        except Exception as error:
            if autocast:
                continue  # nobody runs it so
            raise _Uncheckable(one_line(error)) from error
        if any(isinstance(value, Tensor) and value._version for value in inputs):
            return "its own forward writes into its input, the fused one does not"
        try:
            actual, new_draws = _run(new, inputs, device, autocast)
        except Exception as error:
            return f"the fused forward raised: {one_line(error)}"
        if drawn_from := [owner for owner in old_draws if old_draws[owner] != new_draws[owner]]:
            return f"its own forward draws from {drawn_from[0]} random numbers {mode}, the fused one does not"
        written_by_old = _changes(old, before[0]) | written_outside
        if written := written_by_old - (_changes(new, before[1]) | outside.changes()):
            return f"its own forward writes {min(written)}, the fused one does not"
        if skipped := (calls[0] - calls[1]) + (calls[1] - calls[0]):
            return f"{min(skipped)} has hooks, which the fused forward would skip"
        if actual.shape != yardstick.shape or actual.dtype != yardstick.dtype:
            shapes = f"{tuple(actual.shape)} {actual.dtype} against {tuple(yardstick.shape)} {yardstick.dtype}"
            return f"the fused forward gives {shapes}{' under autocast' if autocast else ''}"
        # a stream that stays in fp32 under autocast is judged as fp32
        judged = judge("operator", actual, yardstick, exact, yardstick.dtype if autocast else dtype)
        if not judged.ok:
            return f"its forward is another function {mode}: {_off(judged)}"
    return None


def _disagreement_elsewhere(
    models: tuple[nn.Module, nn.Module, nn.Module],
    adapter: Adapter,
    module: nn.Module,
    generator: torch.Generator,
    arguments: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[str | None, list[str]]:
    """(how the formulas differ in fp32 (or fp64) for even batches, more tokens and large inputs; where none ran)."""
    dtype = torch.promote_types(dtype, torch.float32)
    notes = []
    for model in models[:2]:
        model.to(dtype)
    for model in models:
        model.eval()
    for samples, tokens, scale in _ELSEWHERE:
        where = f"in {str(dtype).removeprefix('torch.')} for {samples} samples, {tokens} tokens, inputs times {scale}"
        try:
            larger = enlarged(adapter, module, generator, arguments, samples, tokens, scale)
            exact, yardstick = (
                _run(model, [moved(value, device, kind) for value in larger], device)[0]
                for model, kind in ((models[2], torch.float64), (models[0], dtype))
            )
        except Exception as error:
            notes.append(f"its own forward does not run {where}: {one_line(error)}")
            continue
        try:
            with use_backend("torch"):
                actual, _ = _run(models[1], [moved(value, device, dtype) for value in larger], device)
        except Exception as error:
            return f"the fused forward raised {where}: {one_line(error)}", notes
        # large inputs magnify rounding, which then is a matter of chance
        judged = judge("operator", actual, yardstick, exact, dtype, slack=1 if scale == 1 else 5)
        if not judged.ok:
            return f"its forward is another function {where}: {_off(judged)}", notes
    return None, notes


def _disagreement_of_gradients(
    models: tuple[nn.Module, nn.Module, nn.Module],
    arguments: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """How the gradients of the formulas differ: what is cut off or scaled shows there."""
    old, new, oracle = models
    for model in models:
        model.train()
    try:
        exact, _ = _gradients(oracle, [moved(value, device, torch.float64) for value in arguments], device)
        with _counted(old, [name for name, _ in old.named_children()]) as calls:
            yardstick, before = _gradients(old, [moved(value, device, dtype) for value in arguments], device, calls)
    except Exception:
        return None  # nobody trains it
    if repeated := [name for name in calls if calls[name] > before[name]]:
        return f"its own forward computes {repeated[0]} again in the backward (checkpointing), the fused one does not"
    try:
        with use_backend("torch"):
            actual, _ = _gradients(new, [moved(value, device, dtype) for value in arguments], device)
    except Exception as error:
        return f"the fused forward's backward raised: {one_line(error)}"
    judged = judge("operator", actual, yardstick, exact, dtype)
    return None if judged.ok else f"its gradients are another function's: {_off(judged)}"


def _gradients(
    model: nn.Module, inputs: list[Any], device: torch.device, calls: Counter[str] | None = None
) -> tuple[list[Tensor], Counter[str]]:
    """(gradients along a direction of the output, for inputs and parameters; the calls before the backward)."""
    values = [value for item in inputs for value in (item.values() if isinstance(item, dict) else [item])]
    learning = [x for x in (*values, *model.parameters()) if isinstance(x, Tensor) and x.is_floating_point()]
    for x in learning:
        x.requires_grad_(True)
    out, _ = _run(model, inputs, device, learns=True)
    before = Counter(calls)
    if out.requires_grad:
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(_SEED), device="cpu")
        out.backward(direction.to(out))
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in learning], before


def _run(
    model: nn.Module, inputs: list[Any], device: torch.device, autocast: bool = False, learns: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """(its output, the state of each generator of random numbers after it, by its owner)."""
    *positional, keywords = inputs if isinstance(inputs[-1], dict) else [*inputs, {}]
    with _seeded(device) as states, torch.set_grad_enabled(learns), torch.autocast(device.type, enabled=autocast):
        out = model(*positional, **keywords)
        after = states()
    if not isinstance(out, Tensor) or isinstance(out, FakeTensor):
        raise TypeError(f"it gives {type(out).__name__}, not a tensor")
    return out, after


@contextmanager
def _seeded(device: torch.device) -> Iterator[Callable[[], dict[str, Any]]]:
    """Seeds all generators within the block, then restores their states; yields a function that returns these.

    torch.manual_seed would leave the other GPUs seeded alike.
    """
    on_gpu = device.type == "cuda"
    numpy: Any = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy and numpy.random.get_state()

    def states() -> dict[str, Any]:
        current = {"torch's": torch.get_rng_state().tolist(), "Python's": random.getstate()}
        if on_gpu:
            current["the GPU's"] = torch.cuda.get_rng_state(device).tolist()
        if numpy:
            current["NumPy's"] = state_of(numpy.random.mtrand._rand)
        return current

    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        try:
            torch.default_generator.manual_seed(_SEED)
            if on_gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(_SEED)
            random.seed(_SEED)
            if numpy:
                numpy.random.seed(_SEED)
            yield states
        finally:
            random.setstate(of_python)
            if numpy:
                numpy.random.set_state(of_numpy)


def _changes(module: nn.Module, before: dict[str, tuple[Any, ...]]) -> set[str]:
    """What a module holds now that it did not hold before."""
    return {key for key, value in _settings(module).items() if before.get(key) != value}


def _off(judged: parity.Verdict) -> str:
    return f"the fused one is off by {judged.error:.1e}, allowed {judged.bound:.1e}"


@contextmanager
def _counted(model: nn.Module, names: list[str]) -> Iterator[Counter[str]]:
    """Counts how often modules are called within the block."""
    calls: Counter[str] = Counter()
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name in names
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _randomised(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with other parameters: matrices that keep the scale of what they multiply, all gates open.

    Hooks are left out: they may hold anything and must not be called with made-up tensors. Only those before an inner
    module's forward stay, which may make its parameters. Accelerated parts get their own forwards back.
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
