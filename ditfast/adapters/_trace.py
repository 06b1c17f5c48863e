"""The computation of a module's own forward beside that of the fused one: both traced with fake tensors.

The fused one is what ``use_backend("torch")`` gives: the formulas that the kernels answer to. What its own does and the
fused one does not, and random numbers would not show (:mod:`._operations`), is a reason to leave a module as it is.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

from ..ops import use_backend
from ._adapter import may_be_silent
from ._inputs import varying_axes
from ._operations import Operations, autocast_watched, sizes_watched

_LOCK = threading.RLock()  # one set of symbols for all
_HINTS = (3, 9)
# samples and tokens where they are numbers: primes, so that they are known again, and more than most thresholds
_NUMBERS = (53, 4099)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERNAL = frozenset(vars(nn.Module()))
# other values of a number that a module holds
_OTHERS: tuple[Callable[[float], float], ...] = (lambda x: 1.25 * x + 0.125, lambda x: 0.5 * x - 0.0625)
_MOST = 3  # operations that a reason names


class _Plain:
    """An object whose attributes are all that it is: it is as large as every such object."""


def is_plain_object(value: Any) -> bool:
    """Whether a value's attributes are all that it is."""
    kind = type(value)
    alone = kind.__basicsize__ == _Plain.__basicsize__ and hasattr(value, "__dict__")
    return (alone and not isinstance(value, nn.Module)) or kind is SimpleNamespace


class _Setting(NamedTuple):
    """How a forward is called."""

    dtype: torch.dtype
    training: bool = False
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        where = [" in training"] if self.training else []
        where += [f" under autocast to {_short(self.autocast)}"] if self.autocast else [f" in {_short(self.dtype)}"]
        return "".join(where)


class _Trace(NamedTuple):
    operations: Operations
    sizes: Counter[str]
    error: Exception | None

    @property
    def computed(self) -> tuple[Any, ...]:
        return self.operations.counts, self.operations.numbers

    @property
    def said(self) -> tuple[Any, ...]:
        """What it says, to be compared."""
        return *self.computed, self.hidden, str(self.error)

    @property
    def hidden(self) -> Counter[str]:
        return self.operations.hidden + self.sizes


# what was found of a class and its settings, and what its own forward then computed
_FOUND: dict[Hashable, tuple[list[Any], tuple[str | None, list[str]]]] = {}


def differences(
    old: nn.Module,
    new: nn.Module,
    given: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
    key: Hashable,
    reset: Callable[[], None],
    follow: bool,
) -> tuple[str | None, list[str]]:
    """(what a module's own forward does and the fused one does not, or None; what a trace could not settle).

    In inference and training, in the module's dtype, fp32, bf16 and fp16 and under autocast; with symbolic sizes, and
    with other values of the numbers that the module holds.

    Args:
        old, new: the module on its own forward and on the fused one.
        given: arguments for both.
        key: what says all that the result goes by, but for globals, or None: a process finds the same again where its
            own forward still computes the same.
        reset: is called before each run: what one keeps of fake tensors is not for the next.
        follow: whether to look for numbers that a forward goes by.
    """
    with _LOCK, _quiet():
        try:
            own = _Traced(old, given, device, reset)
            if key in _FOUND and _FOUND[key][0] == _said_by(own, dtype):
                return _FOUND[key][1]
            found = _differences(own, _Traced(new, given, device, reset), dtype, follow)
            if key is not None:
                _FOUND[key] = _said_by(own, dtype), found
            return found
        except Exception as error:  # whatever a foreign module does when it is copied
            return None, [f"its computation could not be traced: {said(error)}"]
        finally:
            mode, _ = _symbols()
            if mode.shape_env.guards or mode.shape_env.replacements:
                _symbols.cache_clear()  # a size that was compared is no longer free


def _said_by(own: _Traced, dtype: torch.dtype) -> list[Any]:
    return [own.run(_Setting(dtype, training), learns=False).said for training in (False, True)]


def _differences(own: _Traced, fused: _Traced, dtype: torch.dtype, follow: bool) -> tuple[str | None, list[str]]:
    notes: dict[str, None] = {}  # in order, each once
    own_setting = _Setting(dtype)
    settings = [own_setting, own_setting._replace(training=True)]
    for setting in settings:
        found = own.run(setting, symbolic=True)
        sized = found.sizes + _by_size(found)
        if sized:  # which leaves the symbols numbers
            fused = fused.anew()
            other = fused.run(setting, symbolic=True)
            sized -= other.sizes + _by_size(other)
            own, fused = own.anew(), fused.anew()
        if sized:
            return _reason(list(sized), found, own_setting, setting), []
        if found.error is not None:
            notes[f"not traced with symbolic sizes: {said(found.error)}"] = None
        elif own.mode.shape_env.replacements:
            notes["not traced with symbolic sizes: an operation of it takes them for numbers"] = None
    if not own.casts():
        notes["traced in its own dtype only: its parameters are no plain tensors"] = None
    else:
        settings += [_Setting(x, training) for x in _DTYPES if x != dtype for training in (False, True)]
        if dtype == torch.float32:
            settings += [_Setting(dtype, True, x) for x in (torch.bfloat16, torch.float16)]
    usual: dict[bool, tuple[_Trace, _Trace]] = {}  # in training or not: its own and the fused one
    for setting in settings:
        mine = own.run(setting)
        if mine.error is not None:
            notes[f"its own forward could not be traced: {said(mine.error)}"] = None
        base = usual.get(setting.training)
        if base is not None and mine.said == base[0].said:
            continue  # in another dtype it does the same
        theirs = fused.run(setting)
        if theirs.error is not None:
            notes[f"the fused forward could not be traced: {said(theirs.error)}"] = None
            break
        unread = mine.operations.opaque ^ theirs.operations.opaque
        if not unread:
            only = list(mine.hidden - theirs.hidden)
            if base is not None:
                numbers = mine.operations.numbers - base[0].operations.numbers - theirs.operations.numbers
                only += [f"computes {name} with {number}" for name, number in numbers]
            if only:
                return _reason(only, mine, own_setting, setting), []
        if mine.error is not None:
            break
        usual.setdefault(setting.training, (mine, theirs))
        if unread:
            notes[f"operations of other libraries tell nothing: {', '.join(sorted(unread))}"] = None
        elif kinds := sorted(set(mine.operations.counts) ^ set(theirs.operations.counts)):
            notes[f"computed otherwise, and alike in numbers: {', '.join(kinds)}"] = None
    for training, before in usual.items() if follow else ():
        if name := _number_not_followed(own, fused, settings[training], before):
            numbers_said = "a number that it reads in each call"
            return f"its own forward goes by {name}, {numbers_said}, which the fused one does not", []
    return None, list(notes)


def _number_not_followed(
    own: _Traced, fused: _Traced, setting: _Setting, before: tuple[_Trace, _Trace]
) -> str | None:
    """The name of a number that a module holds, with which its own forward computes what the fused one does not."""
    if own.run(setting).computed != before[0].computed:
        return None  # it does something else each time, whatever its numbers are

    def differs(names: list[str], other: Callable[[float], float], alone: bool) -> bool:
        with own.changed(names, other):
            mine = own.run(setting, learns=False)
        if mine.error is not None:
            return not alone
        if mine.computed == before[0].computed:
            return False
        with fused.changed(names, other):
            theirs = fused.run(setting, learns=False)
        if theirs.error is not None:
            return not alone
        if _apart(mine, theirs) != _apart(*before) or (alone and theirs.computed == before[1].computed):
            return True
        followed = theirs.operations.numbers - before[1].operations.numbers
        return not alone and bool(mine.operations.numbers - before[0].operations.numbers - followed)

    floats = [name for name, number in own.numbers.items() if isinstance(number[2], float)]
    factors = [name for name in own.numbers if name not in floats]
    suspects = [(name, _OTHERS[0]) for name in factors]
    for other in _OTHERS:
        if floats and differs(floats, other, alone=False):
            suspects += [(name, other) for name in floats]
    return next((name for name, other in suspects if differs([name], other, alone=True)), None)


def _apart(mine: _Trace, theirs: _Trace) -> Counter[str]:
    """What one computes more often than the other."""
    apart = Counter({f"+{key}": n for key, n in (mine.operations.counts - theirs.operations.counts).items()})
    apart.update({f"-{key}": n for key, n in (theirs.operations.counts - mine.operations.counts).items()})
    return apart


def _by_size(trace: _Trace) -> Counter[str]:
    return Counter({what: n for what, n in trace.operations.hidden.items() if what == "goes by a size"})


def _reason(found: list[str], trace: _Trace, usual: _Setting, setting: _Setting) -> str:
    places = trace.operations.places
    said_of = [f"{what} ({places[what]})" if places.get(what) else what for what in found[:_MOST]]
    where = str(setting)
    if setting.autocast is None and setting.dtype == usual.dtype:
        where = " in training" if setting.training else ""
    return f"its own forward {', '.join(said_of)}{where}, which the fused one does not"


class _Traced:
    """A module with fake tensors, whose forward is run to see what it computes."""

    def __init__(
        self, model: nn.Module, given: Sequence[Any], device: torch.device, reset: Callable[[], None]
    ) -> None:
        self.source, self.given, self.device, self.reset = model, tuple(given), device, reset
        self.mode, self.symbols = _symbols()
        with FakeCopyMode(self.mode):
            self.model = copy.deepcopy(model)
            for child in self.model.modules():
                _keep_what_its_classes_hold(child)
        self.parameters: list[tuple[dict[str, Any], str, Tensor]] = [
            (into, name, tensor)
            for child in self.model.modules()
            for into in (child._parameters, child._buffers)
            for name, tensor in into.items()
            if tensor is not None and tensor.is_floating_point()
        ]
        self.tensors = _tensors_of(self.model)
        self.numbers = _numbers_of(self.model)

    def anew(self) -> _Traced:
        """Another with symbols of which nothing is known."""
        _symbols.cache_clear()
        return _Traced(self.source, self.given, self.device, self.reset)

    def casts(self) -> bool:
        """Whether its parameters can be given another dtype."""
        return all(type(tensor) in (FakeTensor, nn.Parameter) for _, _, tensor in self.parameters)

    @contextmanager
    def changed(self, names: Sequence[str], other: Callable[[float], float]) -> Iterator[None]:
        """Other values of these numbers."""
        known = [self.numbers[name] for name in names if name in self.numbers]
        for owner, key, value, _ in known:
            owner[key] = other(value)
        try:
            yield
        finally:
            for owner, key, value, its_own in known:
                if its_own:
                    owner[key] = value
                else:
                    del owner[key]

    def run(self, setting: _Setting, symbolic: bool = False, learns: bool = True) -> _Trace:
        self.reset()
        operations = Operations(_NUMBERS, self.tensors)
        learns = learns and setting.training and not symbolic and setting.autocast is None
        self.model.train(setting.training)
        if self.casts():
            for into, name, tensor in self.parameters:
                cast = tensor.detach().to(setting.dtype)
                into[name] = nn.Parameter(cast, setting.training) if isinstance(tensor, nn.Parameter) else cast
        error: Exception | None = None
        watched: Any = _with_symbols(self.mode.shape_env) if symbolic else nullcontext(Counter())
        with self.mode, watched as sizes, _called_so(setting, self.device):
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
        return _Trace(operations, sizes, error)

    def _arguments(self, setting: _Setting, lengths: Sequence[Any]) -> list[Any]:
        def made(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: made(item) for key, item in value.items()}
            if not isinstance(value, Tensor):
                return value
            shape: list[Any] = list(value.shape)
            for axis, (varies, length) in enumerate(zip(varying_axes(value, self.given), lengths, strict=True)):
                if varies:
                    shape[axis] = length
            if not value.is_floating_point():
                return torch.zeros(shape, dtype=value.dtype, device=self.device)
            return torch.empty(shape, dtype=setting.dtype, device=self.device, requires_grad=setting.training)

        arguments = [made(value) for value in self.given]
        return arguments if isinstance(arguments[-1], dict) else [*arguments, {}]


@contextmanager
def _quiet() -> Iterator[None]:
    """A forward that cannot be traced is a line of the report, not of a log."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


@contextmanager
def _called_so(setting: _Setting, device: torch.device) -> Iterator[None]:
    """No weight that autocast has cast is kept: it is a fake one."""
    autocast = torch.autocast(
        device.type, dtype=setting.autocast, enabled=setting.autocast is not None, cache_enabled=False
    )
    with use_backend("torch"), torch.set_grad_enabled(setting.training), autocast:
        yield


@contextmanager
def _with_symbols(env: Any) -> Iterator[Counter[str]]:
    """torch's compositions in Python, some of whose C++ takes sizes for numbers."""
    with enable_python_dispatcher(), sizes_watched(env) as sizes:
        yield sizes


@functools.cache
def _symbols() -> tuple[Any, tuple[Any, Any]]:
    """A fake mode, and the numbers of samples and tokens as symbols of it: torch keeps what it has proved of them."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 2)
    sample = mode.from_tensor(torch.empty(_HINTS, device="meta"), symbolic_context=context)
    return mode, tuple(sample.shape)  # type: ignore[return-value]


def _tensors_of(model: nn.Module) -> dict[int, tuple[Tensor, str]]:
    """The tensors that a module holds beside its parameters, by id, and what they are."""
    found = {}
    for path, child in model.named_modules():
        for name, value in child._buffers.items():
            if value is not None:
                found[id(value)] = value, f"the buffer {_dotted(path, name)}"
        for owner, key, name in _walk(vars(child), path, 2):
            if isinstance(owner[key], Tensor):
                found[id(owner[key])] = owner[key], f"{name}, a tensor that is no parameter"
    return found


def _keep_what_its_classes_hold(module: nn.Module) -> None:
    """Dicts, lists and objects, as copies of its own."""
    for kind in reversed(type(module).__mro__):
        for key, value in vars(kind).items() if not kind.__module__.startswith("torch.") else ():
            if not key.startswith("__") and (isinstance(value, (dict, list)) or is_plain_object(value)):
                vars(module).setdefault(key, copy.deepcopy(value))


def _numbers_of(model: nn.Module) -> dict[str, tuple[dict[Any, Any], Any, float, bool]]:
    """The floating-point numbers that a module and its parts hold, and whole numbers that are 1, as a factor may be:
    name -> (whose, key, value, not its class's).

    A dropout's rate is none: where that is alive, the module's own forward runs.
    """
    found: dict[str, tuple[dict[Any, Any], Any, float, bool]] = {}
    for path, child in model.named_modules():
        if may_be_silent(child):
            continue
        own_numbers = not type(child).__module__.startswith("torch.")
        for kind in type(child).__mro__:
            for key, value in vars(kind).items() if not kind.__module__.startswith("torch.") else ():
                if _is_number(value, own_numbers):
                    found.setdefault(_dotted(path, key), (vars(child), key, value, False))
        for owner, key, name in _walk(vars(child), path, 2):
            if _is_number(owner[key], own_numbers):
                found[name] = (owner, key, owner[key], True)
    return found


def _is_number(value: Any, whole: bool) -> bool:
    return isinstance(value, float) or (whole and type(value) is int and value == 1)


def _walk(owner: Any, path: str, depth: int) -> Iterator[tuple[Any, Any, str]]:
    """What settings hold, in dicts, lists and objects that are nothing but their attributes: (whose, key, name)."""
    for key in list(range(len(owner)) if isinstance(owner, list) else owner):
        if key in INTERNAL:
            continue
        name, value = _dotted(path, key), owner[key]
        yield owner, key, name
        # what says itself how it is copied may be the module's own object, not a copy's
        copied = is_plain_object(value) and not isinstance(value, Enum) and not hasattr(value, "__deepcopy__")
        inner = value if isinstance(value, (dict, list)) else vars(value) if copied else None
        if inner and depth:
            yield from _walk(inner, name, depth - 1)


def _dotted(*parts: Any) -> str:
    return ".".join(str(part) for part in parts if part != "")


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def said(error: Exception) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
