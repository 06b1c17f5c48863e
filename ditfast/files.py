"""Files that are never half written."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def check_target(path: Path | None) -> None:
    """Refuses a --json file that could not be written in the end, before anything is measured.

    Raises:
        ValueError: a folder, or a file in a folder that does not exist or cannot be written.
    """
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"--json must be a file in a folder that exists and can be written, got {path}")


def write_json(data: Any, path: Path) -> None:
    """Writes beside, then renames: a reader, or an interruption, never meets half a file."""
    write_bytes((json.dumps(data, indent=1, allow_nan=False) + "\n").encode(), path)


def write_bytes(data: bytes, path: Path) -> None:
    """The same for any content."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
