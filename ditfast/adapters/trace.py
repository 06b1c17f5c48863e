"""The computation of a module's own forward beside that of the fused one: both traced with fake tensors.

The fused one is what ``use_backend("torch")`` gives: the formulas that the kernels answer to. What its own does and the
fused one does not, and random numbers would not show (:mod:`.operations`), is a reason to leave a module as it is.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .fakes import Setting, Trace, Traced, symbols
from .operations import is_near

_LOCK = threading.RLock()  # one set of symbols for all
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# other values of a number that a module holds
_OTHERS: tuple[Callable[[float], float], ...] = (lambda x: 1.25 * x + 0.125, lambda x: 0.5 * x - 0.0625)
_MOST = 3  # operations that a reason names
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
        key: what says all that the result goes by, as far as is known, or None: a process finds the same again where
            its own forward still computes the same.
        reset: is called before each run: what one keeps of fake tensors is not for the next.
        follow: whether to look for numbers that a forward goes by.
    """
    with _LOCK, _quiet():
        try:
            own = Traced(old, given, device, reset)
            if key in _FOUND and _FOUND[key][0] == _said_by(own, dtype):
                return _FOUND[key][1]
            found = _differences(own, Traced(new, given, device, reset), dtype, follow)
            if key is not None:
                _FOUND[key] = _said_by(own, dtype), found
            return found
        except Exception as error:  # whatever a foreign module does when it is copied
            return None, [f"its computation could not be traced: {said(error)}"]
        finally:
            mode, _ = symbols()
            if mode.shape_env.guards or mode.shape_env.replacements:
                symbols.cache_clear()  # a size that was compared is no longer free


def _said_by(own: Traced, dtype: torch.dtype) -> list[Any]:
    return [own.run(Setting(dtype, training), learns=False).said for training in (False, True)]


def _differences(own: Traced, fused: Traced, dtype: torch.dtype, follow: bool) -> tuple[str | None, list[str]]:
    notes: dict[str, None] = {}  # in order, each once
    own_setting = Setting(dtype)
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
        settings += [Setting(x, training) for x in _DTYPES if x != dtype for training in (False, True)]
        if dtype == torch.float32:
            settings += [Setting(dtype, True, x) for x in (torch.bfloat16, torch.float16)]
    usual: dict[bool, tuple[Trace, Trace]] = {}  # in training or not: its own and the fused one
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
            if base is not None and not only:
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
    own: Traced, fused: Traced, setting: Setting, before: tuple[Trace, Trace]
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
        if _apart(mine, theirs) != _apart(*before):
            return True
        if alone:  # a number that does something now has been compared as it is, as an eps has
            idle = own.numbers[names[0]][2] == 0 or is_near(own.numbers[names[0]][2], 1)
            return idle and theirs.computed == before[1].computed
        followed = theirs.operations.numbers - before[1].operations.numbers
        return bool(mine.operations.numbers - before[0].operations.numbers - followed)

    floats = [name for name, number in own.numbers.items() if isinstance(number[2], float)]
    factors = [name for name in own.numbers if name not in floats]
    suspects = [(name, _OTHERS[0]) for name in factors]
    for other in _OTHERS:
        if floats and differs(floats, other, alone=False):
            suspects += [(name, other) for name in floats]
    return next((name for name, other in suspects if differs([name], other, alone=True)), None)


def _apart(mine: Trace, theirs: Trace) -> Counter[str]:
    """What one computes more often than the other."""
    apart = Counter({f"+{key}": n for key, n in (mine.operations.counts - theirs.operations.counts).items()})
    apart.update({f"-{key}": n for key, n in (theirs.operations.counts - mine.operations.counts).items()})
    return apart


def _by_size(trace: Trace) -> Counter[str]:
    return Counter({what: n for what, n in trace.operations.hidden.items() if what == "goes by a size"})


def _reason(found: list[str], trace: Trace, usual: Setting, setting: Setting) -> str:
    places = trace.operations.places
    said_of = [f"{what} ({places[what]})" if places.get(what) else what for what in found[:_MOST]]
    where = str(setting)
    if setting.autocast is None and setting.dtype == usual.dtype:
        where = " in training" if setting.training else ""
    return f"its own forward {', '.join(said_of)}{where}, which the fused one does not"


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


def said(error: Exception) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
