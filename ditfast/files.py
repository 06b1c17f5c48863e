"""Files that are never half written: each is written beside its target, then renamed."""

from __future__ import annotations

import glob
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PART = ".part"  # how a temporary file's name ends


def check_target(path: Path | None) -> None:
    """Refuses a --json file that could not be written in the end, before anything is measured.

    Raises:
        ValueError: a folder, or a file in a folder that does not exist or cannot be written.
    """
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"--json must be a file in a folder that exists and can be written, got {path}")


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it at the end of the block, or is removed if anything fails.

    Args:
        path: the target; a symlink is replaced, not followed.
        sync: whether the file and its new name are to survive a loss of power.

    Raises:
        OSError: it cannot be written (a full disk, for one), naming ``path``.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        with _synced(path.parent, sync):
            os.replace(temporary, path)
    except OSError as error:
        # an error of the file itself comes without a name; one of another file keeps its own
        if error.filename is not None and str(error.filename) != str(temporary):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written(path: Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """:func:`replacing` with the temporary file open for writing."""
    with replacing(path, sync) as temporary, open(temporary, "wb") as file:
        yield file


def write_json(data: Any, path: Path) -> None:
    """As :func:`write_bytes`, indented by one; NaN and infinities are refused."""
    write_bytes((json.dumps(data, indent=1, allow_nan=False) + "\n").encode(), path)


def write_bytes(data: bytes, path: Path) -> None:
    """Replaces the file: a reader, or an interruption, never meets half of it. It does not wait for the disk."""
    with written(path, sync=False) as file:
        file.write(data)


def remove_parts(folder: Path, name: str = "") -> None:
    """Removes temporary files that a killed process left behind; of the file ``name``, or of all."""
    for path in folder.glob(f".{glob.escape(name)}{'.' if name else ''}*{PART}"):
        path.unlink(missing_ok=True)


@contextmanager
def _synced(folder: Path, sync: bool) -> Iterator[None]:
    """Has a rename within the block survive a loss of power, where the system can."""
    if not sync or not hasattr(os, "O_DIRECTORY"):
        yield
        return
    # opened first: whoever waits for the file may then remove the folder
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield
        os.fsync(handle)
    finally:
        os.close(handle)
