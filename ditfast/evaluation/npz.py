"""Arrays in .npz files, read as a stream: 50,000 images of 256 pixels are 9.8 GB."""

from __future__ import annotations

import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

Statistics = dict[str, np.ndarray[Any, Any]]  # "mu" (D,) and "sigma" (D, D), as torch-fidelity has them
IMAGES = "arr_0"  # what numpy.savez calls its first array

# what zipfile, its decompressors and numpy's reader of headers raise
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Npz:
    """An .npz file of images (N, H, W, 3), uint8, under ``arr_0``, of statistics, or of both.

    Args:
        path: of the file.
        argument: its name in errors.

    Raises:
        ValueError: there is no such file, it is no .npz, or it is damaged. So do all methods.
    """

    path: Path
    argument: str

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise ValueError(f"{self.argument} must be an .npz file, and there is none at {self.path}")
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"{self.argument} must be an .npz file; {self.path} is none, or is cut off")
        self.names()

    def names(self) -> list[str]:
        """Of the arrays in it."""
        with self._archive() as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def image_shape(self) -> tuple[int, int, int]:
        """(number, height, width) of the images.

        Raises:
            ValueError: there are none, or they are no uint8 (N, H, W, 3) in C order.
        """
        if IMAGES not in self.names():
            present = ", ".join(self.names()) or "no arrays"
            raise ValueError(f"{self.argument} must hold images under {IMAGES!r}; {self.path} has {present}")
        with self._array(IMAGES) as (_, shape, fortran, dtype):
            pass
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            expected = f"uint8 images (N, H, W, 3) under {IMAGES!r}"
            raise ValueError(f"{self.argument} must hold {expected}, got {dtype} {shape}")
        if fortran:
            raise ValueError(f"{self.argument} must hold its images in C order, got Fortran's: no batch lies together")
        return shape[0], shape[1], shape[2]

    def batches(self, size: int) -> Iterator[Tensor]:
        """The images as (up to ``size``, 3, H, W), uint8; one batch at a time is in memory."""
        count, height, width = self.image_shape()
        with self._array(IMAGES) as (stream, *_):
            for start in range(0, count, size):
                shape = (min(size, count - start), height, width, 3)
                data = bytearray(_read(stream, math.prod(shape)))
                yield torch.frombuffer(data, dtype=torch.uint8).view(shape).permute(0, 3, 1, 2).contiguous()

    def statistics(self, mean: str, covariance: str) -> Statistics | None:
        """What is stored under these names, fp64; None where neither is.

        Raises:
            ValueError: one of the two is missing, or they are not finite (D,) and (D, D).
        """
        present = [name for name in (mean, covariance) if name in self.names()]
        if not present:
            return None
        if len(present) == 1:
            raise ValueError(f"{self.argument} must hold both {mean!r} and {covariance!r}, got {present[0]!r} alone")
        mu, sigma = self._floats(mean), self._floats(covariance)
        if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
            expected = f"{mean!r} (D,) and {covariance!r} (D, D)"
            raise ValueError(f"{self.argument} must hold {expected}, got {mu.shape} and {sigma.shape}")
        return {"mu": mu, "sigma": sigma}

    def _floats(self, name: str) -> np.ndarray[Any, Any]:
        with self._array(name) as (stream, shape, _, dtype):
            data = _read(stream, math.prod(shape) * dtype.itemsize)
        if dtype.kind != "f":
            raise ValueError(f"{self.argument} must hold floating-point numbers under {name!r}, got {dtype}")
        # a covariance is the same in Fortran's order
        values = np.frombuffer(data, dtype).reshape(shape).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"{self.argument} must hold finite numbers under {name!r}")
        return values

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except _DAMAGE as error:
            raise ValueError(f"{self.argument} cannot be read, {self.path} is damaged: {error}") from error

    @contextmanager
    def _array(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
        """(stream at the first element, shape, whether in Fortran order, dtype); nothing pickled is ever read."""
        with self._archive() as archive, archive.open(f"{name}.npy") as stream:
            shape, fortran, dtype = _header(stream)
            length = archive.getinfo(f"{name}.npy").file_size - stream.tell()
            if math.prod(shape) * dtype.itemsize != length:
                raise EOFError(f"{name!r} has {length} bytes, by its header {math.prod(shape) * dtype.itemsize}")
            yield stream, shape, fortran, dtype


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) of a .npy file, read up to its first element."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy files of version {version} are not known")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    return shape, fortran, dtype


def _read(stream: IO[bytes], count: int) -> bytes:
    # the archive compares its checksum when the last byte is read
    data = stream.read(count)
    if len(data) != count:
        raise EOFError(f"{count - len(data)} bytes are missing")
    return data
