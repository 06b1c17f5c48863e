"""``ditfast warm`` compiles kernels ahead of their first use, without a GPU.

First every part is rehearsed without compiling: ``jit_cache_hook`` answers in the compiler's place. That takes
milliseconds a model and yields the specialisations that it launches. Then Triton's ``preload`` compiles each of them
once, in parallel, and builds its launcher. Kernels in Triton's cache are not compiled again, so an interrupted run goes
on where it was.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...environment import cpu_cores
from ..measure.preparing import explain
from ..measure.processes import end_with_parent
from ..prove.uncomputed import Uncomputed
from .parts import Part, runs

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Kernel:
    """One specialisation: a kernel's module and name, and the text that Triton's ``preload`` takes.

    ``candidate``: only tuning launches it, so the GPU may refuse it.
    """

    module: str
    name: str
    specialisation: str
    candidate: bool = False


@dataclass
class Launches:
    """The kernels that a part launches; ``failures`` are sentences."""

    part: Part
    kernels: list[Kernel] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Compiled:
    """A kernel's result: whether it was in the cache, its folder there, and why it cannot be launched, or "".

    ``refused``: it is compiled, but needs more than the GPU has.
    """

    kernel: Kernel
    hit: bool = False
    folder: str = ""
    failure: str = ""
    refused: bool = False


class Workers:
    """Processes that rehearse one architecture, each with the Triton cache given."""

    def __init__(self, arch: str, cache: Path, processes: int | None = None) -> None:
        self._arch, self._cache, self._processes = arch, cache, processes or cpu_cores()

    def find(self, parts: Iterable[Part]) -> Iterator[Launches]:
        """The launches of each part, as it ends."""
        for part, launches, reason in self._each(find, parts):
            yield launches or Launches(part, failures=[f"{part.label}: {reason}"])

    def compile(self, kernels: Iterable[Kernel]) -> Iterator[Compiled]:
        """The result of each kernel, as it ends."""
        for kernel, compiled, reason in self._each(compile_kernel, kernels):
            yield compiled or Compiled(kernel, failure=reason)

    def _each(
        self, function: Callable[[_Item], _Result], items: Iterable[_Item]
    ) -> Iterator[tuple[_Item, _Result | None, str]]:
        """(item, result or None, the reason for None), as they end.

        A process that dies breaks the pool with all its work, so the remaining items have a second try.
        """
        remaining, reason = list(items), ""
        for _ in range(2):
            # fresh interpreters: a forked one would inherit threads and drivers
            pool = ProcessPoolExecutor(
                self._processes, get_context("spawn"), initializer=_begin, initargs=(self._arch, str(self._cache))
            )
            ended = False
            try:
                futures: dict[Future[_Result], _Item] = {}
                with suppress(BrokenExecutor):
                    for item in remaining:
                        futures[pool.submit(function, item)] = item
                for future in as_completed(futures):
                    try:
                        result = future.result()
                    except BrokenExecutor as error:
                        reason = explain(error)[1]
                        continue
                    remaining.remove(futures[future])
                    yield futures[future], result, ""
                ended = True
            finally:
                pool.shutdown(wait=ended, cancel_futures=True)
            if not remaining:
                return
        for item in remaining:
            yield item, None, reason


def unique(launches: Iterable[Launches]) -> list[Kernel]:
    """Each specialisation once; it is a candidate if only tuning launches it."""
    kernels: dict[tuple[str, str, str], Kernel] = {}
    for kernel in (kernel for item in launches for kernel in item.kernels):
        key = kernel.module, kernel.name, kernel.specialisation
        if key not in kernels or not kernel.candidate:
            kernels[key] = kernel
    return list(kernels.values())


_held = ExitStack()  # a worker rehearses until it ends


def _begin(arch: str, cache: str) -> None:
    end_with_parent(signal.SIGKILL)
    os.environ["TRITON_CACHE_DIR"] = cache  # before triton is imported
    # the parent handles interruptions: the kernel in hand is compiled to its end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    from ditfast.kernels.rehearsal import rehearse

    _held.enter_context(rehearse(arch))


def find(part: Part) -> Launches:
    """The kernels that a part launches; to be called within a rehearsal."""
    launches = Launches(part)
    kernels: dict[tuple[str, str, str], Kernel] = {}
    with _instead_of_compiling(kernels, candidate=part.purpose == "tune"), Uncomputed():
        for name, run in runs(part):
            try:
                run()
            except Exception as error:  # it would fail on the GPU too
                launches.failures.append(f"{part.label}, {name}: {explain(error)[1]}")
    launches.kernels = list(kernels.values())
    return launches


@contextmanager
def _instead_of_compiling(kernels: dict[tuple[str, str, str], Kernel], candidate: bool) -> Iterator[None]:
    """Within a ``with`` block kernels are noted, and neither compiled nor launched."""
    import triton

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function
        specialisation = compile["specialization_data"]
        kernels.setdefault(
            (function.__module__, function.__name__, specialisation),
            Kernel(function.__module__, function.__name__, specialisation, candidate),
        )
        return True

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = note
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def compile_kernel(kernel: Kernel) -> Compiled:
    """Compiles a kernel, or takes it from the cache, and builds its launcher; to be called within a rehearsal."""
    import triton
    from triton.runtime.errors import OutOfResources

    hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = listen
    folder = ""
    try:
        compiled = getattr(import_module(kernel.module), kernel.name).preload(kernel.specialisation)
        folder = Path(next(iter(compiled.metadata_group.values()))).parent.name
        _ = compiled.run  # its launcher, and whether the GPU has room for it
    except OutOfResources as error:
        return Compiled(kernel, all(hits), folder, explain(error)[1], refused=True)
    except Exception as error:  # a kernel's failure is its own
        return Compiled(kernel, failure=explain(error)[1])
    finally:
        triton.knobs.compilation.listener = before
    return Compiled(kernel, all(hits), folder)
