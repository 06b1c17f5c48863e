"""The table of ``ditfast tune``: one line for each shape, saved after each; a later run skips measured shapes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ditfast.kernels import launch
from ditfast.kernels.configs import attention, gemm, rows, tables

from ...files import write_bytes
from ...ops import attention_implementations as attention_choice

_CACHES = (tables.load, rows._row_config, *gemm.CACHES, attention._launch_config)
_DIGITS = 4  # of a time


@dataclass
class Table:
    """A GPU's table, on disk from the first entry on.

    Attributes:
        environment: of the last run that wrote, which is this one.
        versions: of this run; a measurement under the same versions is not repeated.
    """

    path: Path
    gpu: str
    environment: dict[str, Any]
    versions: dict[str, str]
    entries: dict[str, tables.Fields] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, gpu: str, environment: dict[str, Any]) -> Table:
        """The table in the file, to be extended, or a new one.

        Raises:
            ValueError: it is damaged, of another GPU, or cannot be written; names the file.
        """
        if path.parent == tables.CONFIGS:
            with contextlib.suppress(OSError):  # an installation without tables has no folder for them
                path.parent.mkdir(exist_ok=True)
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise ValueError(f"--out must be a file in a folder that exists and can be written, got {path}")
        table = cls(path, gpu, environment, versions())
        if path.exists():
            saved = tables.read_table(path)
            if saved["gpu"] != gpu:
                raise ValueError(f"{path} is the table of {saved['gpu']!r}, this GPU is {gpu!r}: give another --out")
            table.entries, table.measured = saved["entries"], saved["measured"]
        return table

    def has(self, key: str) -> bool:
        """Whether a shape was measured under the versions of this run."""
        record = self.measured.get(key, {})
        return key in self.entries and all(record.get(name) == value for name, value in self.versions.items())

    def add(self, key: str, fields: tables.Fields, times: Mapping[str, float | None], shape: str) -> None:
        """Adds a shape's winner and saves the table; launches use it from now on.

        Args:
            times: "ms", "heuristic_ms" and "noise"; the latter two None if the heuristic's choice does not run.
            shape: the sizes that were measured.
        """
        self.entries[key] = fields
        rounded = {name: None if value is None else float(f"{value:.{_DIGITS}g}") for name, value in times.items()}
        self.measured[key] = {**rounded, "shape": shape, **self.versions}
        write_bytes(self.render().encode(), self.path)
        refresh()

    def render(self) -> str:
        """JSON with a line for each key, for people to read and to compare."""
        head = {"schema": tables.SCHEMA, "gpu": self.gpu, "environment": self.environment}
        text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
        return f'{text},\n "entries": {_lines(self.entries)},\n "measured": {_lines(self.measured)}\n}}\n'


def versions() -> dict[str, str]:
    """The versions that a time depends on: torch, triton, and a digest of the kernels' code (no tables)."""
    import triton

    digest = hashlib.sha256()
    folder = Path(tables.__file__).parent
    for path in (*sorted(folder.parent.glob("*.py")), *sorted(folder.glob("*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {"torch": str(torch.__version__), "triton": str(triton.__version__), "kernels": digest.hexdigest()[:12]}


def refresh() -> None:
    """Drops cached tables, choices of configurations, and the plans that hold them."""
    for cached in _CACHES:
        cached.cache_clear()
    attention_choice.forget()
    launch.forget()


def _lines(values: Mapping[str, Any]) -> str:
    """An object with each key on a line, in the order of its parts, numbers by their size."""
    lines = [
        f"  {json.dumps(key)}: {json.dumps(values[key], allow_nan=False)}" for key in sorted(values, key=_key_order)
    ]
    return "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"


def _key_order(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split("/")]
