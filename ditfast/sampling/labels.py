"""Class names and their labels: those of ImageNet, of a diffusers folder, or of a file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

_IMAGENET = Path(__file__).with_name("imagenet.txt")
_SUGGESTED = 3


class ClassNames:
    """Names of the labels 0..N-1.

    Args:
        lines: one a label; synonyms are separated by commas.
        source: for messages.
    """

    def __init__(self, lines: Sequence[str], source: str) -> None:
        self.lines, self.source = list(lines), source
        self._labels: dict[str, list[int]] = {}
        for label, line in enumerate(self.lines):
            # the line as a whole, too: names of a --class-file may hold commas
            for name in dict.fromkeys(_plain(part) for part in (line, *line.split(","))):
                if name:
                    self._labels.setdefault(name, []).append(label)

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, label: int) -> str:
        """The first of a label's names."""
        return self.lines[label].split(",")[0].strip()

    def label(self, name: str) -> int:
        """The label of a name or synonym, whatever its case, underscores for spaces.

        Raises:
            ValueError: unknown, with the nearest names; or the name of several labels, with them.
        """
        matches = self._labels.get(_plain(name), [])
        if len(matches) == 1:
            return matches[0]
        if matches:
            listed = " and ".join(f"{label} ({self.lines[label]})" for label in matches)
            raise ValueError(f"class name {name!r} is ambiguous in {self.source}: {listed}; choose by --classes")
        close = difflib.get_close_matches(_plain(name), self._labels, n=_SUGGESTED)
        words = [other for other in self._labels if _plain(name) in other.split()][:_SUGGESTED]
        nearest = list(dict.fromkeys([*close, *words]))[:_SUGGESTED]
        hint = "; the nearest: " + ", ".join(f"{other} ({self._labels[other][0]})" for other in nearest)
        raise ValueError(f"unknown class name {name!r} in {self.source}{hint if nearest else ''}")


def class_names(num_classes: int, checkpoint: Path, class_file: Path | None = None) -> ClassNames | None:
    """The names of a checkpoint's classes: of the file, else of a diffusers pipeline's folder, else ImageNet's for a
    thousand classes; None where there are none.

    Raises:
        ValueError: a file with another number of names, or one that cannot be read.
    """
    if class_file is not None:
        try:
            lines = class_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--class-file must be a text file, got {class_file}: {error}") from None
        while lines and not lines[-1].strip():
            lines.pop()
        if len(lines) != num_classes:
            raise ValueError(f"--class-file must have {num_classes} lines, one name a class, got {len(lines)}")
        return ClassNames(lines, str(class_file))
    index = next((path for path in _indices(checkpoint) if path.is_file()), None)
    if index is not None and (names := _id2label(index, num_classes)):
        return ClassNames(names, str(index))
    if num_classes == 1000:
        text = _IMAGENET.read_text(encoding="utf-8")
        return ClassNames([line for line in text.splitlines() if not line.startswith("#")], "ImageNet")
    return None


def choose(
    labels: str | None, names: Iterable[str] | None, num_classes: int, known: ClassNames | None
) -> list[int] | None:
    """The labels that --classes and --class-names ask for, in that order; None where neither is given.

    Raises:
        ValueError: no number, out of range, an unknown name, or names where the classes have none.
    """
    if labels is None and not names:
        return None
    chosen = [_label(part, num_classes) for part in labels.split(",")] if labels is not None else []
    for name in names or ():
        if known is None:
            raise ValueError(
                f"--class-names needs the names of the {num_classes} classes: give --class-file with one a line, "
                "or labels by --classes"
            )
        chosen += _labels_of(name, known)
    return chosen


def _labels_of(text: str, known: ClassNames) -> list[int]:
    """The labels of one name, which may hold commas, or of several between commas."""
    parts = [part for part in text.split(",") if part.strip()]
    if len(parts) < 2:
        return [known.label(text.strip(" ,"))]
    try:
        return [known.label(text)]
    except ValueError:
        return [known.label(part.strip()) for part in parts]


def _label(text: str, num_classes: int) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"--classes must be labels between commas, such as 207,360, got {text.strip()!r}")
    label = int(text)
    if label >= num_classes:
        raise ValueError(f"--classes must be in 0..{num_classes - 1} for this checkpoint, got {label}")
    return label


def _indices(checkpoint: Path) -> tuple[Path, ...]:
    """Where a pipeline's model_index.json lies: in the folder, or above the transformer's."""
    if not checkpoint.is_dir():
        return ()
    return checkpoint / "model_index.json", checkpoint.resolve().parent / "model_index.json"


def _id2label(path: Path, num_classes: int) -> list[str]:
    """A pipeline's names, or nothing where it has none for every class."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")).get("id2label") or {}
        named = {int(key): str(value) for key, value in values.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its id2label cannot be read: {error}") from None
    return [named[label] for label in range(num_classes)] if set(named) >= set(range(num_classes)) else []


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
