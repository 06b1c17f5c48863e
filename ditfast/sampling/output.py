"""Files of samples, never half written under their names: PNGs, a labelled grid, and an npz written as a stream."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..files import written

Array = npt.NDArray[Any]

GRID_LIMIT = 64  # images; more make no picture that anybody looks at
_CELL, _CAPTION, _GAP = 96, 14, 4  # of the grid, in pixels
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # of an entry of a zip, so that equal samples are equal files
_BLOCK = 1 << 24


def save_array(array: Array, path: Path) -> None:
    """One .npy file. (numpy's own writer does not say why where it cannot write.)"""
    with written(path) as file:
        _write_npy(file, array.shape, array.dtype, [array])


def load_array(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """An array of :func:`save_array`, mapped, not read.

    Raises:
        ValueError: not of that shape and dtype, or damaged.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and it is made again") from None
    if array.shape != shape or array.dtype != dtype:
        expected = f"{np.dtype(dtype)} of shape {shape}"
        raise ValueError(f"{path} must hold {expected}, got {array.dtype} of shape {array.shape}: remove it")
    loaded: Array = array
    return loaded


def save_png(image: Array, path: Path, text: dict[str, str] | None = None) -> None:
    """(H, W, 3) uint8; ``text`` goes into the file's metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    with written(path) as file:
        Image.fromarray(image).save(file, "PNG", pnginfo=info)


def load_png(path: Path) -> Array:
    """(H, W, 3) uint8."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def save_grid(images: list[Array], captions: list[str], path: Path) -> None:
    """(H, W, 3) uint8 images as near to a square as they go, each above its caption; small ones enlarged."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = images[0].shape[:2]
    enlarge = max(1, math.ceil(_CELL / width))
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cell = (width * enlarge + _GAP, height * enlarge + _CAPTION + _GAP)
    canvas = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = place % columns * cell[0] + _GAP, place // columns * cell[1] + _GAP
        tile = Image.fromarray(image).resize((width * enlarge, height * enlarge), Image.Resampling.NEAREST)
        canvas.paste(tile, (x, y))
        text = caption.encode("ascii", "replace").decode()  # all that the built-in font may have
        while text and draw.textlength(text, font=font) > width * enlarge:
            text = text[:-1]
        draw.text((x, y + height * enlarge + 1), text, fill="black", font=font)
    with written(path) as file:
        canvas.save(file, "PNG")


def save_npz(
    path: Path, entries: dict[str, tuple[tuple[int, ...], npt.DTypeLike, Iterable[Array]]], comment: str
) -> None:
    """An npz as numpy.savez writes it, each array a stream of its rows: nothing is held but one block.

    Args:
        path: the file.
        entries: name -> (shape, dtype, blocks of rows that make it up in order).
        comment: of the archive, which readers of arrays do not see.

    Raises:
        ValueError: blocks that do not make up the shape.
    """
    with written(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (shape, dtype, blocks) in entries.items():
            entry = zipfile.ZipInfo(f"{name}.npy", _FIRST_DATE)
            with archive.open(entry, "w", force_zip64=True) as stream:
                rows = _write_npy(stream, shape, dtype, blocks)
            if rows != shape[0]:
                raise ValueError(f"{name} must have {shape[0]} rows, got {rows}")
        archive.comment = comment.encode()


def npz_comment(path: Path) -> str | None:
    """The comment of :func:`save_npz`; None for a file that is no such archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode(errors="replace")
    except zipfile.BadZipFile:
        return None


def _write_npy(file: IO[bytes], shape: tuple[int, ...], dtype: npt.DTypeLike, blocks: Iterable[Array]) -> int:
    """Header and rows; returns how many rows."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return sum(_write_rows(file.write, block, shape, dtype) for block in blocks)


def _write_rows(write: Callable[[Any], Any], block: Array, shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    if block.shape[1:] != shape[1:] or block.dtype != dtype:
        expected = f"{np.dtype(dtype)} of shape {shape[1:]}"
        raise ValueError(f"a block must have rows that are {expected}, got {block.dtype} of shape {block.shape[1:]}")
    flat = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    for begin in range(0, flat.size, _BLOCK):
        write(flat[begin : begin + _BLOCK].data)
    return len(block)
