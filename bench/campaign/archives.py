"""What a campaign takes along: its results in one archive, the compilers' caches in others, each small to carry."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...files import write_bytes
from ..warm.archives import extract, read_archive, write_archives
from ..warm.kernel_cache import MANIFEST, fits, kernel_files, read_manifest, unpack
from .run import STATE_FILE, Campaign

RESULTS, KERNELS, INDUCTOR = "results", "triton-cache", "inductor-cache"
_LOG_BYTES = 500_000  # the end of each log
_INDUCTOR_PREFIX = "inductor/"


class Caches:
    """The compilers' caches of a campaign, which its steps share.

    Args:
        folder: of all of them.
        archives: where their archives go.
    """

    def __init__(self, folder: Path, archives: Path) -> None:
        self._folder, self._archives = folder.absolute(), archives
        self._packed: dict[str, list[tuple[str, int]]] = {}

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment, for the steps."""
        return {"TRITON_CACHE_DIR": str(self._kernels), "TORCHINDUCTOR_CACHE_DIR": str(self._inductor)}

    @property
    def _kernels(self) -> Path:
        return self._folder / "triton"

    @property
    def _inductor(self) -> Path:
        return self._folder / "inductor"

    def fill(self, archives: Iterable[Path]) -> list[str]:
        """Unpacks archives of :meth:`pack` and of ``ditfast warm``; returns what was added, as sentences.

        Raises:
            ValueError: an archive that is damaged or holds no cache.
            OSError: it cannot be read.
        """
        lines, kernels = [], []
        for archive in archives:
            if all(name.startswith(_INDUCTOR_PREFIX) for name, _ in read_archive(archive)):
                lines.append(f"{archive}: {len(extract(archive, self._folder))} files of Inductor's cache")
            else:
                kernels.append(archive)
        if kernels:
            lines.append(f"{', '.join(map(str, kernels))}: {unpack(kernels, self._kernels)} kernels")
            manifest = read_manifest(self._kernels)
            if manifest is not None and (misfit := fits(manifest)):
                lines.append(f"not all of which are taken here, the others are compiled when needed: {misfit}")
        return lines

    def pack(self) -> list[Path]:
        """Writes the archives of the caches that have changed since the last call."""
        archives = []
        inductor = [(f"{_INDUCTOR_PREFIX}{path.relative_to(self._inductor)}", path) for path in _files(self._inductor)]
        kernels = list(kernel_files(self._kernels))
        if (manifest := self._kernels / MANIFEST).is_file():
            kernels.append((MANIFEST, manifest))
        for stem, files in ((KERNELS, kernels), (INDUCTOR, inductor)):
            sizes = [(name, path.stat().st_size) for name, path in files]
            if sizes != self._packed.get(stem, []):
                archives += write_archives(files, self._archives, stem)
                self._packed[stem] = sizes
        return archives


def _files(folder: Path) -> Iterator[Path]:
    """Its files, except temporary ones and locks."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith((".lock", ".tmp")) and "locks" not in path.parts:
            yield path


def pack_results(campaign: Campaign, archives: Path) -> list[Path]:
    """Writes the archive of results, logs, tuned tables and the state, in which the environment stands."""
    files = [(path.name, path) for path in [*campaign.result_files(), *sorted(campaign.folder.glob("*.table"))]]
    files.append((STATE_FILE, campaign.folder / STATE_FILE))
    ends = campaign.folder / "logs" / "ends"
    for path in sorted((campaign.folder / "logs").glob("*.txt")):
        if path.stat().st_size > _LOG_BYTES:
            ends.mkdir(exist_ok=True)
            write_bytes(path.read_bytes()[-_LOG_BYTES:], ends / path.name)
            path = ends / path.name
        files.append((f"logs/{path.name}", path))
    return write_archives(files, archives, RESULTS)


def unpack_results(archive: Path, folder: Path) -> None:
    """Unpacks a campaign's folder from its archive, to continue it.

    Raises:
        ValueError: an archive that is damaged or no campaign's, or a folder that holds a campaign already.
    """
    if (folder / STATE_FILE).exists():
        raise ValueError(f"--resume {archive}: {folder} holds a campaign already, which goes on without it")
    if STATE_FILE not in {name for name, _ in read_archive(archive)}:
        raise ValueError(f"--resume must be given the results.tar.xz of a campaign, got {archive}")
    staged = folder / ".unpacked"
    shutil.rmtree(staged, ignore_errors=True)
    paths = extract(archive, staged)
    for path in sorted(paths, key=lambda path: path.name == STATE_FILE):  # last: with it the others are complete
        target = folder / path.relative_to(staged.resolve())
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    shutil.rmtree(staged)
