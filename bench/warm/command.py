"""``ditfast warm``: compiles kernels of models and commands without a GPU, and carries them to machines with one."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options

if TYPE_CHECKING:
    from .compile import Compiled, Launches
    from .parts import Part

_FAILED = 1
_MODES = "forward,train"


def warm(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="The GPU: sm_80, sm_86, sm_89, sm_90 or sm_120; may be repeated.", show_default=False
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A named model, DiT-XL/2 by default; may be repeated.", show_default=False),
    ] = None,
    image_size: options.ImageSizes = None,
    mode: Annotated[
        str, typer.Option(help="By commas: forward, cfg, train, train-checkpoint.", metavar="MODES")
    ] = _MODES,
    purpose: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="By commas: what verify, bench (models and ops) and tune launch, in place of the models' own forward "
            "and training.",
            show_default=False,
            metavar="COMMANDS",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="bf16, fp16 or fp32; may be repeated. bf16 by default, of verify all three.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            help="Images in a batch; may be repeated. By default 1, 2, 4 ... 256, of bench its own.",
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="The Triton cache to fill; by default Triton's own.", show_default=False, metavar="DIR"),
    ] = None,
    archive: Annotated[
        Path | None,
        typer.Option(
            help="Pack what launches need: compiled kernels and their launchers.",
            show_default=False,
            metavar="FILE.tar.xz",
        ),
    ] = None,
    unpack: Annotated[
        list[Path] | None,
        typer.Option(
            help="Add this archive's kernels to the cache instead; may be repeated.",
            show_default=False,
            metavar="FILE.tar.xz",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes at once; by default one a core.", show_default=False)
    ] = None,
) -> None:
    """Compile kernels before they are needed, without a GPU, so that no first call waits for a compiler.

    They are launched on a GPU that is not there, which needs gcc and a machine without NVIDIA's driver, and what
    Triton then compiles stays in its cache. What the cache has is not compiled again: cut short, it goes on. Elsewhere
    --unpack adds an archive to the cache there, which needs neither gcc nor a GPU. They are taken where the wheel of
    triton, the version of Python and the kernels' sources are the same; ditfast info says so. Unpack only archives
    that you trust: launchers are native code.
    """
    from ...console import terminated_as_interrupted
    from ...environment import cache_folder
    from ..suites.suite import INTERRUPTED

    folder = cache_folder() if cache is None else cache.absolute()
    if unpack:
        if mode != _MODES or any((arch, model, image_size, purpose, dtype, batch, archive, jobs)):
            raise ValueError("--unpack compiles nothing: it goes with --cache alone")
        _unpack(unpack, folder)
        return
    parts, jobs = _checked(arch, model, image_size, mode, purpose, dtype, batch, archive, jobs)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--cache must be a folder that can be written, got {folder}")
    try:
        with terminated_as_interrupted():
            failed = [_warm(name, of_arch, folder, jobs) for name, of_arch in parts.items()]
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what was compiled is kept in {folder}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if archive is not None:
        _pack(folder, archive)
    if any(failed):
        raise typer.Exit(_FAILED)


def _checked(
    arch: list[str] | None,
    model: list[str] | None,
    image_size: list[str] | None,
    mode: str,
    purpose: str | None,
    dtype: list[str] | None,
    batch: list[int] | None,
    archive: Path | None,
    jobs: int | None,
) -> tuple[dict[str, list[Part]], int | None]:
    """The parts of each architecture, and the processes.

    Raises:
        ValueError: an option is wrong, or nothing can be compiled here; the message says why.
    """
    from ..cases.case import DTYPES, parse_dtype, parse_mode, unknown
    from .archives import SUFFIX

    try:
        from ditfast.kernels.rehearsal import GPUS, unavailable

        from .parts import PURPOSES, plan
    except ImportError as error:
        raise ValueError(f"warm needs the package triton: {error}") from None
    for name in arch or ("",):
        if name not in GPUS:
            raise ValueError(f"--arch must be one of {', '.join(GPUS)}, got {name or 'none'}")
    purposes = _listed(purpose or "")
    for name in purposes:
        if name not in PURPOSES:
            raise ValueError(unknown("--for", name, PURPOSES))
    for option, values in (("--batch", batch or ()), ("--jobs", () if jobs is None else (jobs,))):
        for value in values:
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
    if archive is not None:
        parent = archive.absolute().parent
        writable = parent.is_dir() and os.access(parent, os.W_OK) and not archive.is_dir()
        if not archive.name.endswith(SUFFIX) or not writable:
            raise ValueError(f"--archive must be a {SUFFIX} file in a folder that can be written, got {archive}")
    configs = options.named_configs(model or ("DiT-XL/2",), image_size or ("256",), "adaln_zero")
    modes = [parse_mode(name) for name in _listed(mode)]
    if not modes:
        raise ValueError(f"--mode must name at least one mode, got {mode!r}")
    dtypes = [parse_dtype(name) for name in dtype or ("bf16",)]
    if (reason := unavailable()) is not None:
        raise ValueError(f"kernels cannot be compiled ahead: {reason}")
    all_dtypes = () if dtype else tuple(DTYPES.values())
    parts = {
        name: plan(name, purposes, configs, dtypes, modes, tuple(dict.fromkeys(batch or ())), all_dtypes)
        for name in dict.fromkeys(arch or ())
    }
    return parts, jobs


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _warm(arch: str, parts: Sequence[Part], cache: Path, jobs: int | None) -> bool:
    """One architecture; returns whether something failed."""
    from ...console import progress
    from ...files import write_json
    from . import kernel_cache
    from .compile import Workers, unique

    begin = time.monotonic()
    launches: list[Launches] = []
    compiled: list[Compiled] = []
    workers = Workers(arch, cache, jobs)
    with progress(len(parts), f"{arch}: what is launched") as step:
        for item in workers.find(parts):
            launches.append(item)
            step(f"{arch}: {item.part.label} launches {len(item.kernels)} kernels")
    kernels = unique(launches)
    try:
        with progress(len(kernels), f"{arch}: compiling") as step:
            for result in workers.compile(kernels):
                compiled.append(result)
                step(f"{arch}: {result.kernel.name}{' (in the cache)' if result.hit else ''}")
    finally:  # an interrupted run has a manifest too
        folders = [result.folder for result in compiled if result.folder]
        complete = len(compiled) == len(kernels) and all(result.folder for result in compiled)
        labels = [item.part.label for item in launches if complete and not item.failures]
        manifest = kernel_cache.make_manifest(arch, labels, folders)
        write_json(kernel_cache.merged(kernel_cache.read_manifest(cache), manifest), cache / kernel_cache.MANIFEST)
    return _report(arch, launches, compiled, cache, time.monotonic() - begin)


def _report(arch: str, launches: Sequence[Launches], compiled: Sequence[Compiled], cache: Path, seconds: float) -> bool:
    """Prints failures and counts; returns whether something failed. A candidate that the GPU refuses is none."""
    refused = [result for result in compiled if result.refused and result.kernel.candidate]
    failures = [failure for item in launches for failure in item.failures]
    failures += [f"{item.kernel.name}: {item.failure}" for item in compiled if item.failure and item not in refused]
    for failure in failures:
        typer.echo(f"FAIL {arch}, {failure}", err=True)
    hits = sum(result.hit for result in compiled)
    compiled_now = sum(bool(result.folder) for result in compiled) - hits
    text = f"{arch}: {compiled_now} kernels compiled, {hits} taken from the cache, {seconds:.0f} s; {cache}"
    if refused:
        text += f"; {len(refused)} candidates of tune take more than the GPU has"
    typer.echo(text)
    return bool(failures)


def _pack(cache: Path, archive: Path) -> None:
    from . import kernel_cache

    manifest = kernel_cache.read_manifest(cache)
    entries: dict[str, Any] = {} if manifest is None else manifest["architectures"]
    folders = {name for entry in entries.values() for name in entry["kernels"]}
    size = kernel_cache.pack(cache, archive, folders)
    typer.echo(f"{archive}: {len(folders)} kernels, {size} bytes")


def _unpack(archives: Sequence[Path], cache: Path) -> None:
    from . import kernel_cache

    count = kernel_cache.unpack(archives, cache)
    typer.echo(f"{cache}: {count} kernels from {', '.join(map(str, archives))}")
    manifest = kernel_cache.read_manifest(cache)
    reason = "" if manifest is None else kernel_cache.fits(manifest)
    if reason:
        typer.echo(f"not all of them are taken here: {reason}", err=True)
