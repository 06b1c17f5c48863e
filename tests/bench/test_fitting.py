"""The search for the largest batch that fits."""

from __future__ import annotations

import pytest

from ditfast.bench.measure.fitting import device_bytes, guess_batch, largest_batch

GIB = 1 << 30


def test_guess_by_the_straight_line() -> None:
    # 2 GiB and 1 GiB an image; 0.94 of 102.13 GiB leave room for 94 images
    points = [(8, 10 * GIB), (32, 34 * GIB)]
    assert guess_batch(points, int(102.13 * GIB), 32, 128) == 88  # 94, to a multiple of 8
    assert guess_batch(points, int(102.13 * GIB), 90, 128) == 94  # no multiple of 8 between 90 and 94
    assert guess_batch([*points, (1, 9 * GIB)], int(102.13 * GIB), 32, 128) == 88  # by the two largest


def test_guess_in_the_middle_where_the_line_does_not_help() -> None:
    assert guess_batch([], GIB, 0, 32) == 16
    assert guess_batch([(8, GIB)], GIB, 8, 32) == 16  # the middle, 20, to a multiple of 8
    assert guess_batch([(1, GIB), (2, GIB)], GIB, 2, 8) == 5
    # the line says 1000 fit, and 64 did not
    assert guess_batch([(8, 9), (16, 17)], 1064, 16, 64) == 40


@pytest.mark.parametrize(("low", "high"), [(0, 1), (7, 8), (240, 255), (240, 256)])
def test_nothing_left_to_try(low: int, high: int) -> None:
    assert guess_batch([], GIB, low, high) is None


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 7, 100, 255, 256, 1000])
def test_the_search_ends_within_a_sixteenth(largest: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= largest

    fitting = largest_batch(fits, limit=256)
    expected = min(largest, 256)
    assert fitting <= expected
    assert expected - fitting <= max(1, expected // 16) if expected > 16 else fitting == expected
    assert len(tried) == len(set(tried)) <= 14
    assert max(tried) <= 256


def test_a_good_start_saves_tries() -> None:
    tried: list[int] = []
    assert 176 <= largest_batch(lambda batch: not tried.append(batch) and batch <= 190, 4096, start=180) <= 190  # type: ignore[func-returns-value]
    assert len(tried) <= 7


def test_memory_of_the_host() -> None:
    import torch

    assert 2**28 < device_bytes(torch.device("cpu")) < 2**50
