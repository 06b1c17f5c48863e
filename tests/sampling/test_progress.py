"""The progress of ``ditfast sample``: images/s of this run alone, the time left, a bar or plain lines."""

from __future__ import annotations

import pytest

from ditfast.sampling import progress as module
from ditfast.sampling.progress import Rate, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock's time; set it by ``clock[0]``."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_images_done_before_are_no_part_of_the_rate(clock: list[float]) -> None:
    rate = Rate(total=1000, before=400)
    assert rate.text() == "- images/s"
    clock[0] += 50
    rate.images = 500
    assert rate.per_second == 2.0
    assert rate.text() == "2 images/s, 0:04:10 left"
    rate.images = 400.01
    assert rate.text() == "0.0002 images/s, 833:19:10 left"


def test_plain_lines_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, 0) as update:
        for images in range(0, 101, 5):
            clock[0] += 3
            update(images)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "15/100 images, 1.25 images/s, 0:01:08 left"
    assert len(lines) == 5


def test_a_bar_on_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with progress(8, 2) as update:
        clock[0] += 2
        update(4.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/8" in err and "1.25 images/s, 0:00:03 left" in err


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress(8, 0, shown=False) as update:
        clock[0] += 60
        update(4)
    assert capsys.readouterr() == ("", "")
