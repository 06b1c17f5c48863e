"""The parts of a sampling run: its fixed batches, the random stream of each image, and its settings.

Nothing here knows how many processes share the work: batches are cut from the number of images alone, and an image's
stream comes from the seed and its number. That is why the bytes are the same for one process or many, interrupted or
not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MASK = (1 << 32) - 1
_CHUNK = 1 << 22
MOST_IMAGES = 1 << 32


@dataclass(frozen=True)
class Batch:
    """Images first .. first + count - 1 of a run, always computed together."""

    index: int
    first: int
    count: int


class Start(NamedTuple):
    """What a batch begins with."""

    labels: list[int]
    noise: Tensor  # (N, C, h, w), fp32, on the CPU
    generators: list[torch.Generator]


def cut(num: int, batch_size: int) -> list[Batch]:
    """The batches of a run; the last may be smaller.

    Raises:
        ValueError: no image, no batch, or more images than there are streams.
    """
    if not 1 <= num <= MOST_IMAGES:
        raise ValueError(f"--num must be in 1..2^32, got {num}")
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    return [
        Batch(index, first, min(batch_size, num - first)) for index, first in enumerate(range(0, num, batch_size))
    ]


def image_generator(seed: int, image: int) -> torch.Generator:
    """The random stream of an image, on the CPU.

    torch's CPU generator uses 32 bits of its seed. Within a run they are a mix of ``seed`` plus the image's number,
    so no two images of a run share a stream, and runs with neighbouring seeds do not share most of theirs.
    """
    return torch.Generator().manual_seed((_mixed(seed) + image) & _MASK)


def draw_label(generator: torch.Generator, num_classes: int) -> int:
    """Uniform over the classes; the first draw from an image's stream, made whether or not its label is given."""
    return int(torch.randint(num_classes, (1,), generator=generator))


def label_of(image: int, seed: int, classes: Sequence[int] | None, num_classes: int) -> int:
    """The label of an image: ``classes`` repeated in turn, or drawn from its stream."""
    return classes[image % len(classes)] if classes else draw_label(image_generator(seed, image), num_classes)


def start(
    batch: Batch, seed: int, classes: Sequence[int] | None, num_classes: int, shape: tuple[int, int, int]
) -> Start:
    """Labels, noise and streams of a batch; an image's are the same in whatever batch it lies.

    Args:
        batch: which images.
        seed: of the run.
        classes: to be repeated in turn, or None to draw them.
        num_classes: of the checkpoint.
        shape: (C, h, w) of a latent.
    """
    labels, noise, generators = [], torch.empty(batch.count, *shape), []
    for place in range(batch.count):
        generator = image_generator(seed, batch.first + place)
        drawn = draw_label(generator, num_classes)
        labels.append(classes[(batch.first + place) % len(classes)] if classes else drawn)
        torch.randn(shape, generator=generator, out=noise[place])
        generators.append(generator)
    return Start(labels, noise, generators)


def share(batches: Sequence[Batch], rank: int, size: int) -> list[Batch]:
    """A process's part of the batches that are left."""
    return list(batches[rank::size])


def digest(paths: Sequence[Path]) -> dict[str, Any]:
    """What identifies files: their size and a hash of their contents, wherever they lie."""
    checksum, size = hashlib.sha256(), 0
    for path in paths:
        for chunk in _chunks(path):
            checksum.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": checksum.hexdigest()}


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Where two settings differ, one text each with both values."""
    keys = dict.fromkeys([*current, *stored])
    return [
        f"{key} {_shown(current.get(key))} (there: {_shown(stored.get(key))})"
        for key in keys
        if stored.get(key) != current.get(key)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _mixed(seed: int) -> int:
    """32 bits of a 64-bit number, every bit depending on all (the finaliser of splitmix64)."""
    value = (seed + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
    return (value ^ (value >> 31)) & _MASK


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
