"""``--compare OLD.json``: the same rows of two runs side by side; changes within the noise are ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .metrics import is_tie
from .records import Results, Row

Verdict = Literal["faster", "slower", "tie"]

# where these differ, a change of speed may be theirs
_CONDITIONS = (("cpu", "model"), ("cpu", "torch_threads"), ("gpu", "name"), ("gpu", "driver"), ("packages", "torch"))


@dataclass(frozen=True)
class Change:
    """A row that both runs measured. ``speedup`` is old time over new time."""

    row: Row
    old_ms: float
    new_ms: float
    speedup: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """The changes, how many measured rows only one run has, and the conditions that differ."""

    changes: list[Change]
    only_old: int
    only_new: int
    conditions: list[str]


def compare(old: Results, new: Results) -> Comparison:
    """Compares the rows with a time in both runs.

    A change is a tie where it is no larger than the noise of either run, or where the quartiles overlap.
    """
    before = {row.key: row for row in old.rows if row.ms is not None}
    after = {row.key: row for row in new.rows if row.ms is not None}
    return Comparison(
        changes=[_change(before[key], row) for key, row in after.items() if key in before],
        only_old=len(before.keys() - after.keys()),
        only_new=len(after.keys() - before.keys()),
        conditions=_differences(old.environment, new.environment),
    )


def _change(old: Row, new: Row) -> Change:
    assert old.ms is not None and new.ms is not None
    speedup = old.ms.median / new.ms.median
    overlap = old.ms.p25 <= new.ms.p75 and new.ms.p25 <= old.ms.p75
    verdict: Verdict = "faster" if speedup > 1 else "slower"
    if overlap or is_tie(speedup, max(old.noise or 0.0, new.noise or 0.0)):
        verdict = "tie"
    return Change(new, old.ms.median, new.ms.median, speedup, verdict)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = []
    for group, name in _CONDITIONS:
        was, now = ((environment.get(group) or {}).get(name) for environment in (old, new))
        if was != now:
            found.append(f"{group} {name}: {was} then, {now} now")
    return found
