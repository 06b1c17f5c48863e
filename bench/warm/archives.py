"""Archives (.tar.xz) of many small files: the same bytes for the same files, never half written, safe to unpack.

Files are compressed in chunks on all cores. Each chunk is an xz stream; an archive is its chunks in sequence, which
every tar and xz reads as one. The size of each chunk is thus known when archives are filled up to a limit.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import secrets
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...files import write_bytes

SUFFIX = ".tar.xz"
_CHUNK_BYTES = 4 << 20  # before compression: more gains little
_PRESET = 1  # of cubins a third more than by the default, in a sixth of its time
_END = bytes(2 * tarfile.BLOCKSIZE)

Files = Sequence[tuple[str, Path]]


class _Chunk(NamedTuple):
    files: Files
    data: bytes


def write_archive(files: Iterable[tuple[str, Path]], archive: Path) -> int:
    """Packs files into one archive, sorted by name, without owners and times; returns its size in bytes.

    Args:
        files: (name in the archive, the file).
        archive: NAME.tar.xz; written beside, then renamed.

    Raises:
        ValueError: another suffix, or a name that is absolute, leaves its folder or comes twice.
    """
    if not archive.name.endswith(SUFFIX):
        raise ValueError(f"an archive must be a {SUFFIX} file, got {archive}")
    return _write((chunk.data for chunk in _chunks(_checked(files), _CHUNK_BYTES)), archive)


def write_archives(
    files: Iterable[tuple[str, Path]], folder: Path, stem: str, limit: int = 15_000_000
) -> list[Path]:
    """Packs files into as few archives as stay below a limit, and removes the other archives of earlier calls.

    A file too large for an archive is left out; STEM.left-out.txt beside the archives and a warning name it.

    Args:
        files: (name in the archive, the file).
        folder: where archives go.
        stem: STEM.tar.xz is the archive; several are STEM-1.tar.xz, STEM-2.tar.xz and so on.
        limit: each archive has fewer bytes.

    Returns:
        The archives, in order; none if there are no files.

    Raises:
        ValueError: a name that is absolute, leaves its folder or comes twice.
    """
    room = limit - len(_compressed(_END)) - 1
    parts: list[list[bytes]] = []
    filled, left_out = 0, []
    for chunk in _fitting(_chunks(_checked(files), max(1, min(_CHUNK_BYTES, limit // 4))), room):
        if len(chunk.data) > room:
            left_out += [f"{name}: {path.stat().st_size} bytes\n" for name, path in chunk.files]
            continue
        if not parts or filled + len(chunk.data) > room:
            parts.append([])
            filled = 0
        parts[-1].append(chunk.data)
        filled += len(chunk.data)
    numbers = [""] if len(parts) == 1 else [f"-{number}" for number in range(1, len(parts) + 1)]
    archives = [folder / f"{stem}{number}{SUFFIX}" for number in numbers[: len(parts)]]
    for part, archive in zip(parts, archives, strict=True):
        _write(part, archive)
    for archive in folder.glob(f"*{SUFFIX}"):
        if archive not in archives and re.fullmatch(re.escape(stem) + r"(-\d+)?", archive.name[: -len(SUFFIX)]):
            archive.unlink()
    note = folder / f"{stem}.left-out.txt"
    if left_out:
        write_bytes("".join(left_out).encode(), note)
        warnings.warn(f"{note}: {len(left_out)} files are above {limit} bytes, and in no archive", stacklevel=2)
    else:
        note.unlink(missing_ok=True)
    return archives


def read_archive(archive: Path) -> list[tuple[str, bytes]]:
    """(name, content) of each file in an archive.

    Raises:
        ValueError: an archive that is damaged or no .tar.xz, or that holds links, devices or names outside a folder.
    """
    files = []
    data, raw = archive.read_bytes(), bytearray()
    try:
        while data:  # after a stream must come another: lzma.open would drop anything else
            stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            raw += stream.decompress(data)
            if not stream.eof:
                raise EOFError("it ends too early")
            data = stream.unused_data
        if not raw.endswith(_END):  # tarfile takes the end of a file for that of an archive
            raise EOFError("it ends too early")
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                content = tar.extractfile(member) if member.isreg() else None
                if content is None or not _is_inside(member.name):
                    raise ValueError(f"{archive}: {member.name!r} is no file within the folder to unpack in")
                files.append((member.name, content.read()))
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{archive} is damaged, or no {SUFFIX} archive: {error}") from None
    return files


def extract(archive: Path, folder: Path) -> list[Path]:
    """Unpacks an archive into a folder, each file written beside and renamed; returns the files.

    Everything is read and checked before anything is written.

    Raises:
        ValueError: an archive that is damaged or no .tar.xz, or that holds anything but files within the folder.
    """
    members = read_archive(archive)
    base = folder.resolve()
    targets = [(base / name).resolve() for name, _ in members]
    for target, (name, _) in zip(targets, members, strict=True):
        if not target.is_relative_to(base):  # through a link that lies there
            raise ValueError(f"{archive}: {name!r} would be written outside {folder}")
    for target, (_, data) in zip(targets, members, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(data, target)
    return targets


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _checked(files: Iterable[tuple[str, Path]]) -> Files:
    """The files sorted by name, their names checked."""
    ordered = sorted(files)
    names = [name for name, _ in ordered]
    for name in names:
        if not _is_inside(name):
            raise ValueError(f"a name in an archive must be relative and without '..', got {name!r}")
    if len(set(names)) < len(names):
        twice = next(name for name, after in zip(names, names[1:], strict=False) if name == after)
        raise ValueError(f"names in an archive must differ, got {twice!r} twice")
    return ordered


def _chunks(files: Files, size: int) -> Iterator[_Chunk]:
    """The files in their order, in compressed chunks of about ``size`` bytes before compression."""
    groups: list[list[tuple[str, Path]]] = []
    filled = size
    for name, path in files:
        if filled >= size:
            groups.append([])
            filled = 0
        groups[-1].append((name, path))
        filled += path.stat().st_size
    # the compressor lets other threads run
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_chunk, groups)


def _fitting(chunks: Iterable[_Chunk], room: int) -> Iterator[_Chunk]:
    """The chunks; those too large for the room are split into single files."""
    for chunk in chunks:
        if len(chunk.data) > room and len(chunk.files) > 1:
            yield from map(_chunk, ([file] for file in chunk.files))
        else:
            yield chunk


def _chunk(files: Files) -> _Chunk:
    blocks = bytearray()
    for name, path in files:
        content, entry = path.read_bytes(), tarfile.TarInfo(name)
        entry.size = len(content)
        blocks += entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
    return _Chunk(files, _compressed(bytes(blocks)))


def _compressed(data: bytes) -> bytes:
    return lzma.compress(data, preset=_PRESET)


def _write(chunks: Iterable[bytes], archive: Path) -> int:
    """Chunks and the end of an archive, written beside, then renamed."""
    beside = archive.with_name(f".{archive.name}.{secrets.token_hex(4)}.part")
    try:
        with beside.open("wb") as file:
            for data in chunks:
                file.write(data)
            file.write(_compressed(_END))
            size = file.tell()
        os.replace(beside, archive)
    finally:
        beside.unlink(missing_ok=True)
    return size
