"""``ditfast warm``: what GPUs would compile at first use, compiled ahead without one.

First every part is rehearsed without compiling (``jit_cache_hook`` answers in the compiler's place), which takes
milliseconds a model and says which specialisations it launches. Then each of these is compiled once, in parallel, by
Triton's own ``preload``, and its launcher is built. What Triton's cache has is a hit: a run that is cut short goes on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .preparing import explain
from .uncomputed import Uncomputed
from .warm_parts import Part, runs


@dataclass(frozen=True)
class Kernel:
    """One specialisation: a kernel's module and name, and what Triton's ``preload`` compiles it from.

    ``candidate``: only tuning asks for it, so it may be one that the GPU refuses.
    """

    module: str
    name: str
    specialisation: str
    candidate: bool = False


@dataclass
class Found:
    """What a part launches; ``failures`` are sentences."""

    part: Part
    kernels: list[Kernel] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel: whether the cache had it, the cache's folder, and why it cannot be launched, or "".

    ``refused``: it is compiled, and takes more than the GPU has.
    """

    kernel: Kernel
    hit: bool = False
    folder: str = ""
    failure: str = ""
    refused: bool = False


class Workers:
    """Processes that rehearse one architecture, each with the Triton cache given; use as a context."""

    def __init__(self, arch: str, cache: Path, processes: int | None = None) -> None:
        # fresh interpreters: what a forked one inherits of threads and drivers is not to be told
        self._pool = ProcessPoolExecutor(
            processes or os.cpu_count(), get_context("spawn"), initializer=_begin, initargs=(arch, str(cache))
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def find(self, parts: Iterable[Part]) -> Iterator[Found]:
        """What each part launches, as it ends."""
        futures = {self._pool.submit(find, part): part for part in parts}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenExecutor as error:
                yield Found(futures[future], failures=[f"{futures[future].label}: {explain(error)[1]}"])

    def compile(self, kernels: Iterable[Kernel]) -> Iterator[Compiled]:
        """Each kernel, as it ends."""
        futures = {self._pool.submit(compile_kernel, kernel): kernel for kernel in kernels}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenExecutor as error:  # the compiler took its process down, and the others' with it
                yield Compiled(futures[future], failure=explain(error)[1])


def unique(found: Iterable[Found]) -> list[Kernel]:
    """Each specialisation once; a candidate only where nothing but tuning launches it."""
    kernels: dict[tuple[str, str, str], Kernel] = {}
    for kernel in (kernel for item in found for kernel in item.kernels):
        key = kernel.module, kernel.name, kernel.specialisation
        if key not in kernels or not kernel.candidate:
            kernels[key] = kernel
    return list(kernels.values())


_held = ExitStack()  # a worker rehearses until it ends


def _begin(arch: str, cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache  # before triton is imported
    # an interruption is the parent's: a kernel that is being compiled is compiled to its end, and kept
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    from ditfast.kernels.rehearsal import rehearse

    _held.enter_context(rehearse(arch))


def find(part: Part) -> Found:
    """What a part launches; to be called within a rehearsal."""
    found = Found(part)
    seen: dict[tuple[str, str, str], Kernel] = {}
    with _instead_of_compiling(seen, candidate=part.purpose == "tune"), Uncomputed():
        for name, run in runs(part):
            try:
                run()
            except Exception as error:  # whatever it is, the GPU would meet it too
                found.failures.append(f"{part.label}, {name}: {explain(error)[1]}")
    found.kernels = list(seen.values())
    return found


@contextmanager
def _instead_of_compiling(seen: dict[tuple[str, str, str], Kernel], candidate: bool) -> Iterator[None]:
    """Within a ``with`` block what would be compiled is noted, and neither compiled nor launched."""
    import triton

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function
        specialisation = compile["specialization_data"]
        seen.setdefault(
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
