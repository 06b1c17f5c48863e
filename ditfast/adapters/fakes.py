"""A module with fake tensors, whose forward is run to see what it computes."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

from ..ops import use_backend
from ..plain import is_identity
from .inputs import varying_axes
from .operations import Operations, autocast_watched, sizes_watched

_HINTS = (3, 9)
# samples and tokens in traces without symbols: primes, to be recognised, and above most thresholds
_NUMBERS = (53, 4099)
INTERNAL = frozenset(vars(nn.Module()))


class _Plain:
    """An object with no state besides its attributes: its size tells others of that kind."""


def is_plain_object(value: Any) -> bool:
    """Whether a value has no state besides its attributes."""
    kind = type(value)
    alone = kind.__basicsize__ == _Plain.__basicsize__ and hasattr(value, "__dict__")
    return (alone and not isinstance(value, nn.Module)) or kind is SimpleNamespace


class Setting(NamedTuple):
    """How a forward is called."""

    dtype: torch.dtype
    training: bool = False
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        words = [" in training"] if self.training else []
        words += [f" under autocast to {_short(self.autocast)}"] if self.autocast else [f" in {_short(self.dtype)}"]
        return "".join(words)


class Trace(NamedTuple):
    operations: Operations
    sizes: Counter[str]
    error: Exception | None

    @property
    def computed(self) -> tuple[Any, ...]:
        return self.operations.counts, self.operations.numbers

    @property
    def facts(self) -> tuple[Any, ...]:
        """All that two traces are compared by."""
        return *self.computed, self.hidden, str(self.error)

    @property
    def hidden(self) -> Counter[str]:
        return self.operations.hidden + self.sizes


class Traced:
    """A module with fake tensors, whose forward is run to see what it computes."""

    def __init__(
        self, model: nn.Module, arguments: Sequence[Any], device: torch.device, reset: Callable[[], None]
    ) -> None:
        self.source, self.arguments, self.device, self.reset = model, tuple(arguments), device, reset
        self.mode, self.symbols = symbols()
        with FakeCopyMode(self.mode):
            self.model = copy.deepcopy(model)
            for child in self.model.modules():
                _copy_class_attributes(child)
        self.parameters: list[tuple[dict[str, Any], str, Tensor]] = [
            (into, name, tensor)
            for child in self.model.modules()
            for into in (child._parameters, child._buffers)
            for name, tensor in into.items()
            if tensor is not None and tensor.is_floating_point()
        ]
        self.tensors = _tensors_of(self.model)
        self.numbers = _numbers_of(self.model)

    def anew(self) -> Traced:
        """A new one, with symbols that nothing has been proved of."""
        symbols.cache_clear()
        return Traced(self.source, self.arguments, self.device, self.reset)

    def casts(self) -> bool:
        """Whether its parameters can be given another dtype."""
        return all(type(tensor) in (FakeTensor, nn.Parameter) for _, _, tensor in self.parameters)

    @contextmanager
    def changed(self, names: Sequence[str], other: Callable[[float], float]) -> Iterator[None]:
        """Gives these numbers other values within the block."""
        numbers = [self.numbers[name] for name in names if name in self.numbers]
        for owner, key, value, _ in numbers:
            owner[key] = other(value)
        try:
            yield
        finally:
            for owner, key, value, on_instance in numbers:
                if on_instance:
                    owner[key] = value
                else:
                    del owner[key]

    def run(self, setting: Setting, symbolic: bool = False, learns: bool = True) -> Trace:
        self.reset()
        operations = Operations(_NUMBERS, self.tensors)
        learns = learns and setting.training and not symbolic and setting.autocast is None
        self.model.train(setting.training)
        if self.casts():
            for into, name, tensor in self.parameters:
                cast = tensor.detach().to(setting.dtype)
                into[name] = nn.Parameter(cast, setting.training) if isinstance(tensor, nn.Parameter) else cast
                if id(tensor) in self.tensors:
                    self.tensors[id(cast)] = cast, self.tensors[id(tensor)][1]
        error: Exception | None = None
        watched: Any = _with_symbols(self.mode.shape_env) if symbolic else nullcontext(Counter())
        with self.mode, watched as sizes, _applied(setting, self.device):
            *positional, keywords = self._arguments(setting, self.symbols if symbolic else _NUMBERS)
            try:
                with operations, autocast_watched(operations):
                    out = self.model(*positional, **keywords)
                if learns and isinstance(out, Tensor) and out.requires_grad:
                    operations.backward = True
                    with operations, suppress(Exception):  # nobody trains it
                        out.backward(torch.ones_like(out))
            except Exception as caught:
                error = caught
        return Trace(operations, sizes, error)

    def _arguments(self, setting: Setting, lengths: Sequence[Any]) -> list[Any]:
        def fake(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: fake(item) for key, item in value.items()}
            if not isinstance(value, Tensor):
                return value
            shape: list[Any] = list(value.shape)
            for axis, (varies, length) in enumerate(zip(varying_axes(value, self.arguments), lengths, strict=True)):
                if varies:
                    shape[axis] = length
            if not value.is_floating_point():
                return torch.zeros(shape, dtype=value.dtype, device=self.device)
            return torch.empty(shape, dtype=setting.dtype, device=self.device, requires_grad=setting.training)

        arguments = [fake(value) for value in self.arguments]
        return arguments if isinstance(arguments[-1], dict) else [*arguments, {}]


@contextmanager
def _applied(setting: Setting, device: torch.device) -> Iterator[None]:
    """Calls within the block are in this setting; autocast's cache is off, it would keep fake weights."""
    autocast = torch.autocast(
        device.type, dtype=setting.autocast, enabled=setting.autocast is not None, cache_enabled=False
    )
    with use_backend("torch"), torch.set_grad_enabled(setting.training), autocast:
        yield


@contextmanager
def _with_symbols(env: Any) -> Iterator[Counter[str]]:
    """Within the block torch's compositions run in Python: some of those in C++ read symbolic sizes as numbers."""
    with enable_python_dispatcher(), sizes_watched(env) as sizes:
        yield sizes


@functools.cache
def symbols() -> tuple[Any, tuple[Any, Any]]:
    """A fake mode, and the numbers of samples and tokens as symbols of it: torch keeps what it has proved of them."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 2)
    sample = mode.from_tensor(torch.empty(_HINTS, device="meta"), symbolic_context=context)
    return mode, tuple(sample.shape)  # type: ignore[return-value]


def _tensors_of(model: nn.Module) -> dict[int, tuple[Tensor, str]]:
    """The tensors that a module holds beside its parameters, by id, and what they are."""
    tensors = {}
    for path, child in model.named_modules():
        for name, value in child._buffers.items():
            if value is not None:
                tensors[id(value)] = value, f"the buffer {_dotted(path, name)}"
        for owner, key, name in _walk(vars(child), path, 2):
            if isinstance(owner[key], Tensor):
                tensors[id(owner[key])] = owner[key], f"{name}, a tensor that is no parameter"
    return tensors


def _copy_class_attributes(module: nn.Module) -> None:
    """Gives a module its own copies of the dicts, lists and objects that its classes hold."""
    for kind in reversed(type(module).__mro__):
        for key, value in vars(kind).items() if not kind.__module__.startswith("torch.") else ():
            if not key.startswith("__") and (isinstance(value, (dict, list)) or is_plain_object(value)):
                vars(module).setdefault(key, copy.deepcopy(value))


def _numbers_of(model: nn.Module) -> dict[str, tuple[dict[Any, Any], Any, float, bool]]:
    """The floating-point numbers that a module and its parts hold, and integers that are 1 (a factor may be).

    A dropout's rate is left out: where it is not 0, the module's own forward runs.

    Returns:
        name -> (the dict that holds it, its key, its value, whether it is the instance's and not its class's).
    """
    numbers: dict[str, tuple[dict[Any, Any], Any, float, bool]] = {}
    for path, child in model.named_modules():
        if is_identity(child):
            continue
        may_be_whole = not type(child).__module__.startswith("torch.")
        for kind in type(child).__mro__:
            for key, value in vars(kind).items() if not kind.__module__.startswith("torch.") else ():
                if _is_number(value, may_be_whole):
                    numbers.setdefault(_dotted(path, key), (vars(child), key, value, False))
        for owner, key, name in _walk(vars(child), path, 2):
            if _is_number(owner[key], may_be_whole):
                numbers[name] = (owner, key, owner[key], True)
    return numbers


def _is_number(value: Any, whole: bool) -> bool:
    return isinstance(value, float) or (whole and type(value) is int and value == 1)


def _walk(owner: Any, path: str, depth: int) -> Iterator[tuple[Any, Any, str]]:
    """(holder, key, name) of every value in nested dicts, lists and objects with no state besides attributes."""
    for key in list(range(len(owner)) if isinstance(owner, list) else owner):
        if key in INTERNAL:
            continue
        name, value = _dotted(path, key), owner[key]
        yield owner, key, name
        # one with a __deepcopy__ may still be the module's own object, not a copy's
        copied = is_plain_object(value) and not isinstance(value, Enum) and not hasattr(value, "__deepcopy__")
        inner = value if isinstance(value, (dict, list)) else vars(value) if copied else None
        if inner and depth:
            yield from _walk(inner, name, depth - 1)


def _dotted(*parts: Any) -> str:
    return ".".join(str(part) for part in parts if part != "")


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
