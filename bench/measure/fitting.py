"""Finding the largest batch that fits a device's memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

_HEADROOM = 0.94  # the driver, the context and fragmentation take their part
_GRAIN = 16  # a search ends within a sixteenth


def device_bytes(device: torch.device) -> int:
    """Memory of a device in bytes; of the host for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def guess_batch(points: Sequence[tuple[int, int]], limit: int, low: int, high: int) -> int | None:
    """The batch to try next between one that fits and one that does not.

    Args:
        points: (batch, peak bytes) measured before. From two on, memory is taken to grow with the batch in a
            straight line through the two largest; from fewer, the middle is taken.
        limit: bytes of the device.
        low, high: the largest batch known to fit (0: none) and the smallest known not to.

    Returns:
        a batch strictly between them, a multiple of 8 where one lies there; None where nothing is left to try.
    """
    if high - low <= max(1, high // _GRAIN):
        return None
    middle = guess = (low + high) // 2
    known = sorted(dict(points).items())[-2:]
    if len(known) == 2 and known[1][1] > known[0][1]:
        (first, before), (second, after) = known
        slope = (after - before) / (second - first)
        guess = int((limit * _HEADROOM - before) / slope + first)
    if guess >= high:  # the line is wrong: that batch was tried
        guess = middle
    guess = max(guess, low + 1)
    rounded = guess // 8 * 8
    return rounded if rounded > low else guess


def largest_batch(fits: Callable[[int], bool], limit: int, start: int = 1) -> int:
    """The largest batch that fits, to the next sixteenth: doubled from ``start``, then halved in between.

    Args:
        fits: tries a batch.
        limit: where to stop; it is the answer where it fits.

    Returns:
        0 where not even one image fits.
    """
    low, high = 0, min(start, limit)
    while fits(high):
        if high >= limit:
            return limit
        low, high = high, min(2 * high, limit)
    while high - low > max(1, high // _GRAIN):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
