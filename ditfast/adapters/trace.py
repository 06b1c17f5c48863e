"""What a module's own forward computes, compared with the fused one: both are traced with fake tensors.

The fused one runs with ``use_backend("torch")``: on the formulas, which specify the kernels. A module is left as it is
where its own forward does something that the fused one does not and that random numbers would not show
(:mod:`.operations`).
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
_MOST_NAMED = 3  # operations that a reason names
# key -> (what the module's own forward computed, the result)
_CACHE: dict[Hashable, tuple[list[Any], tuple[str | None, list[str]]]] = {}


def differences(
    old: nn.Module,
    new: nn.Module,
    arguments: Sequence[Any],
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
        arguments: for both.
        key: everything known that the result depends on, or None. A result is used again in the same process where
            the module's own forward still computes the same.
        reset: called before each run: fake tensors that one run keeps are not for the next.
        follow: whether to look for numbers that change the module's own forward and not the fused one.
    """
    with _LOCK, _quiet():
        try:
            original = Traced(old, arguments, device, reset)
            if key in _CACHE and _CACHE[key][0] == _facts_of(original, dtype):
                return _CACHE[key][1]
            result = _differences(original, Traced(new, arguments, device, reset), dtype, follow)
            if key is not None:
                _CACHE[key] = _facts_of(original, dtype), result
            return result
        except Exception as error:  # whatever a foreign module does when it is copied
            return None, [f"its computation could not be traced: {one_line(error)}"]
        finally:
            mode, _ = symbols()
            if mode.shape_env.guards or mode.shape_env.replacements:
                symbols.cache_clear()  # a size that was compared is no longer free


def _facts_of(original: Traced, dtype: torch.dtype) -> list[Any]:
    return [original.run(Setting(dtype, training), learns=False).facts for training in (False, True)]


def _differences(original: Traced, fused: Traced, dtype: torch.dtype, follow: bool) -> tuple[str | None, list[str]]:
    notes: dict[str, None] = {}  # in order, each once
    base_setting = Setting(dtype)
    settings = [base_setting, base_setting._replace(training=True)]
    for setting in settings:
        trace = original.run(setting, symbolic=True)
        sized = trace.sizes + _by_size(trace)
        if sized:  # which leaves the symbols numbers
            fused = fused.anew()
            other = fused.run(setting, symbolic=True)
            sized -= other.sizes + _by_size(other)
            original, fused = original.anew(), fused.anew()
        if sized:
            return _reason(list(sized), trace, base_setting, setting), []
        if trace.error is not None:
            notes[f"not traced with symbolic sizes: {one_line(trace.error)}"] = None
        elif original.mode.shape_env.replacements:
            notes["not traced with symbolic sizes: an operation of it takes them for numbers"] = None
    if not original.casts():
        notes["traced in its own dtype only: its parameters are no plain tensors"] = None
    else:
        settings += [Setting(x, training) for x in _DTYPES if x != dtype for training in (False, True)]
        if dtype == torch.float32:
            settings += [Setting(dtype, True, x) for x in (torch.bfloat16, torch.float16)]
    usual: dict[bool, tuple[Trace, Trace]] = {}  # in training or not: its own and the fused one
    for setting in settings:
        original_trace = original.run(setting)
        if original_trace.error is not None:
            notes[f"its own forward could not be traced: {one_line(original_trace.error)}"] = None
        base = usual.get(setting.training)
        if base is not None and original_trace.facts == base[0].facts:
            continue  # in another dtype it does the same
        fused_trace = fused.run(setting)
        if fused_trace.error is not None:
            notes[f"the fused forward could not be traced: {one_line(fused_trace.error)}"] = None
            break
        unread = original_trace.operations.opaque ^ fused_trace.operations.opaque
        if not unread:
            unmatched = list(original_trace.hidden - fused_trace.hidden)
            if base is not None and not unmatched:
                numbers = original_trace.operations.numbers - base[0].operations.numbers
                numbers -= fused_trace.operations.numbers
                unmatched += [f"computes {name} with {number}" for name, number in numbers]
            if unmatched:
                return _reason(unmatched, original_trace, base_setting, setting), []
        if original_trace.error is not None:
            break
        usual.setdefault(setting.training, (original_trace, fused_trace))
        if unread:
            notes[f"operations of other libraries tell nothing: {', '.join(sorted(unread))}"] = None
        elif kinds := sorted(set(original_trace.operations.counts) ^ set(fused_trace.operations.counts)):
            notes[f"computed otherwise, and alike in numbers: {', '.join(kinds)}"] = None
    for training, before in usual.items() if follow else ():
        if name := _number_not_followed(original, fused, settings[training], before):
            reason = f"its own forward goes by {name}, a number that it reads in each call"
            return f"{reason}, which the fused one does not", []
    return None, list(notes)


def _number_not_followed(
    original: Traced, fused: Traced, setting: Setting, before: tuple[Trace, Trace]
) -> str | None:
    """The name of a number that a module holds and that changes its own forward, but not the fused one."""
    if original.run(setting).computed != before[0].computed:
        return None  # it does something else each time, whatever its numbers are

    def differs(names: list[str], other: Callable[[float], float], alone: bool) -> bool:
        with original.changed(names, other):
            original_trace = original.run(setting, learns=False)
        if original_trace.error is not None:
            return not alone
        if original_trace.computed == before[0].computed:
            return False
        with fused.changed(names, other):
            fused_trace = fused.run(setting, learns=False)
        if fused_trace.error is not None:
            return not alone
        if _apart(original_trace, fused_trace) != _apart(*before):
            return True
        if alone:  # a number that does something now has been compared as it is, as an eps has
            idle = original.numbers[names[0]][2] == 0 or is_near(original.numbers[names[0]][2], 1)
            return idle and fused_trace.computed == before[1].computed
        followed = fused_trace.operations.numbers - before[1].operations.numbers
        return bool(original_trace.operations.numbers - before[0].operations.numbers - followed)

    floats = [name for name, number in original.numbers.items() if isinstance(number[2], float)]
    factors = [name for name in original.numbers if name not in floats]
    suspects = [(name, _OTHERS[0]) for name in factors]
    for other in _OTHERS:
        if floats and differs(floats, other, alone=False):
            suspects += [(name, other) for name in floats]
    return next((name for name, other in suspects if differs([name], other, alone=True)), None)


def _apart(original_trace: Trace, fused_trace: Trace) -> Counter[str]:
    """What one computes more often than the other."""
    original, fused = original_trace.operations.counts, fused_trace.operations.counts
    apart = Counter({f"+{key}": n for key, n in (original - fused).items()})
    apart.update({f"-{key}": n for key, n in (fused - original).items()})
    return apart


def _by_size(trace: Trace) -> Counter[str]:
    return Counter({kind: n for kind, n in trace.operations.hidden.items() if kind == "goes by a size"})


def _reason(facts: list[str], trace: Trace, usual: Setting, setting: Setting) -> str:
    places = trace.operations.places
    named = [f"{fact} ({places[fact]})" if places.get(fact) else fact for fact in facts[:_MOST_NAMED]]
    where = str(setting)
    if setting.autocast is None and setting.dtype == usual.dtype:
        where = " in training" if setting.training else ""
    return f"its own forward {', '.join(named)}{where}, which the fused one does not"


@contextmanager
def _quiet() -> Iterator[None]:
    """A forward that cannot be traced is named in the report, not in a log."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def one_line(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
