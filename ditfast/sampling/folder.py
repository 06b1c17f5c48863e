"""The folder of a run: its batches until the run is complete, then PNGs with a grid, or one npz."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import remove_parts, written
from . import output
from .work import Batch, differences

_SETTINGS = "settings.json"
_OURS = re.compile(r"\d{6,}\.png|grid\.png|batch-\d+\.npy|latents\.npz")


@dataclass(frozen=True)
class Rows:
    """The array of an image: (H, W, 3) uint8, or (C, h, w) fp32 for latents."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class RunFolder:
    """The folder of a run.

    A batch is done when its file exists, or its PNGs. Files are written beside and then renamed, so a run that was
    killed goes on where it stopped. ``settings.json`` says what the files were made with.

    Args:
        folder: where batches and settings lie; by default beside the npz.
        npz: the file that the batches become; None for PNGs in the folder.
        batches: of the run.
        rows: the array of an image.
        settings: everything that the bytes depend on, ready for JSON.
    """

    def __init__(
        self, folder: Path | None, npz: Path | None, batches: Sequence[Batch], rows: Rows, settings: dict[str, Any]
    ) -> None:
        if folder is None:
            if npz is None:
                raise ValueError("give --out DIR for PNGs, or --npz FILE for one file of all images")
            folder = npz.with_name(npz.name + ".parts")
        self.folder, self.npz, self.batches, self.rows = folder, npz, batches, rows
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._is_own_folder = npz is not None and folder == npz.with_name(npz.name + ".parts")
        self._lock: int | None = None

    @property
    def num(self) -> int:
        return self.batches[-1].first + self.batches[-1].count

    def is_complete(self) -> bool:
        """Whether the npz is there, from these very settings.

        Raises:
            ValueError: it is something else, naming the difference; it is never overwritten.
        """
        if self.npz is None or not self.npz.exists():
            return False
        comment = None if self.npz.is_dir() else output.npz_comment(self.npz)
        try:
            stored = json.loads(comment or "")
        except ValueError:
            stored = None
        if not isinstance(stored, dict):
            raise ValueError(f"{self.npz} exists and is none of ditfast's: choose another name, or remove it")
        self._check_equal(stored, self.npz)
        path = self.folder / _SETTINGS
        if path.exists() and _read_settings(path) == self.settings:
            self._clear()  # a run that was killed between the npz and this
        return True

    def claim(self) -> None:
        """Makes the folder this run's, before anything is computed.

        Raises:
            ValueError: it is another run's or somebody else's, or in use, or the disk has no room.
            OSError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.npz is not None:
                with tempfile.TemporaryFile(dir=self.npz.absolute().parent):
                    pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.npz or self.folder)) from None
        self._take_lock()
        try:
            self._make_ours()
        except BaseException:
            self.release()
            raise

    def _make_ours(self) -> None:
        path = self.folder / _SETTINGS
        results = sorted(path.name for path in self.folder.iterdir() if _OURS.fullmatch(path.name))
        if path.exists():
            stored = _read_settings(path)
            if results or stored.keys() != self.settings.keys():  # a run without results fixes no settings
                self._check_equal(stored, self.folder)
            remove_parts(self.folder)
            if self.npz is not None:
                remove_parts(self.npz.parent, self.npz.name)
        elif results:
            raise ValueError(f"{self.folder} holds {results[0]} but no {_SETTINGS} of a run: choose another folder")
        remove_parts(self.folder, _SETTINGS)
        self._check_room()
        with written(path) as file:  # written even if unchanged: it shows that the folder can be written
            file.write((json.dumps(self.settings, indent=1) + "\n").encode())

    def done(self) -> list[Batch]:
        """The batches that are done."""
        names = set(os.listdir(self.folder))
        return [batch for batch in self.batches if all(name in names for name in self._names(batch))]

    def save(self, batch: Batch, images: npt.NDArray[Any], texts: Sequence[dict[str, str]]) -> None:
        """A finished batch (N, *rows.shape), with the metadata of each PNG."""
        if self.npz is not None:
            output.save_array(images, self.folder / self._names(batch)[0])
            return
        for image, name, text in zip(images, self._names(batch), texts, strict=True):
            output.save_png(image, self.folder / name, text)

    def finish(self, labels: npt.NDArray[np.int64], caption: Callable[[int], str]) -> Path:
        """Makes the requested files of all batches; returns the one to look at.

        Raises:
            ValueError: a batch is missing or damaged.
        """
        if self.npz is not None:
            return self._finish_npz(self.npz, labels)
        if self.num > output.GRID_LIMIT:
            return self.folder
        images = [output.load_png(self.folder / name) for batch in self.batches for name in self._names(batch)]
        output.save_grid(images, [caption(image) for image in range(self.num)], self.folder / "grid.png")
        return self.folder / "grid.png"

    def _finish_npz(self, npz: Path, labels: npt.NDArray[np.int64]) -> Path:
        def blocks() -> Iterator[npt.NDArray[Any]]:
            for batch in self.batches:
                path = self.folder / self._names(batch)[0]
                yield output.load_array(path, (batch.count, *self.rows.shape), self.rows.dtype)

        entries = {
            "arr_0": ((self.num, *self.rows.shape), self.rows.dtype, blocks()),
            "arr_1": ((self.num,), np.int64, [labels]),
        }
        output.save_npz(npz, entries, json.dumps(self.settings))
        self._clear()
        return npz

    def _clear(self) -> None:
        """Removes what the npz now holds."""
        for batch in self.batches:
            (self.folder / self._names(batch)[0]).unlink(missing_ok=True)
        if self._is_own_folder:
            (self.folder / _SETTINGS).unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def release(self) -> None:
        """Lets another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _names(self, batch: Batch) -> list[str]:
        if self.npz is not None:
            return [f"batch-{batch.index:06d}.npy"]
        return [f"{image:06d}.png" for image in range(batch.first, batch.first + batch.count)]

    def _check_equal(self, stored: dict[str, Any], path: Path) -> None:
        if changes := differences(stored, self.settings):
            raise ValueError(
                f"{path} was made with other settings: {', '.join(changes)}; give those to go on, or choose another"
            )

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two runs at once write the same bytes, only twice
            return
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(f"{self.folder} is being written by another run: wait for it, or choose another") from None
        except OSError:  # a network file system without locks
            pass

    def _check_room(self) -> None:
        """Refuses a run whose arrays cannot fit; the size of PNGs is not known before."""
        if self.npz is None:
            return
        remaining = sum(batch.count for batch in self.batches) - sum(batch.count for batch in self.done())
        whole, target = self.num * self.rows.bytes, self.npz.absolute().parent
        if os.stat(target).st_dev == os.stat(self.folder).st_dev:
            needed = {target: whole + remaining * self.rows.bytes}
        else:
            needed = {target: whole, self.folder: remaining * self.rows.bytes}
        for place, size in needed.items():
            if size > (free := shutil.disk_usage(place).free):
                raise ValueError(
                    f"{place} must have {size / 2**30:.2f} GiB free for the batches and the npz, got {free / 2**30:.2f}"
                )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no settings of a run: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is no settings of a run: wanted a JSON object, got {type(stored).__name__}")
    return stored
