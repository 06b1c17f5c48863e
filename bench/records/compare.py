"""``--compare OLD.json``: the same rows of two runs side by side; changes within the noise are ties."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .files import Results
from .machine import part
from .metrics import is_tie
from .rows import ModelRow, OpRow, ScalingRow

Verdict = Literal["faster", "slower", "tie"]

# where these differ, a change of speed may be theirs
_CONDITIONS = (
    ("cpu", "model"),
    ("cpu", "torch_threads"),
    ("gpu", "name"),
    ("gpu", "driver"),
    ("gpu", "cuda"),
    ("packages", "torch"),
    ("packages", "triton"),
    ("packages", "diffusers"),
)
#: The suites whose rows have a time.
COMPARABLE = ("models", "ops", "scaling")


@dataclass(frozen=True)
class Change:
    """A row that both runs measured, as it is now. ``speedup`` is old time over new time."""

    row: Any
    old_ms: float
    new_ms: float
    speedup: float
    verdict: Verdict

    @property
    def is_regression(self) -> bool:
        """Whether ditfast became slower; a slower rival points to the machine or its versions."""
        return self.verdict == "slower" and timed(self.row).is_ours


@dataclass(frozen=True)
class Comparison:
    """The changes, what was lost, how many measured rows only one run has, and the conditions that differ.

    Attributes:
        lost: rows of the new run that have no time now and had one then.
        unticked: rows of the new run without the parity tick that they had then.
    """

    changes: list[Change]
    only_old: int
    only_new: int
    conditions: list[str]
    lost: list[Any] = field(default_factory=list)
    unticked: list[Any] = field(default_factory=list)

    @property
    def regressed(self) -> int:
        """How many rows of ditfast became slower past the noise, no longer run, or lost their tick."""
        worse = {change.row.key for change in self.changes if change.is_regression}
        return len(worse | {row.key for row in [*self.lost, *self.unticked] if timed(row).is_ours})


def timed(row: Any) -> ModelRow | OpRow:
    """The part of a row that has the time: a point of a curve carries a model row."""
    if isinstance(row, ScalingRow):
        return row.row
    if isinstance(row, (ModelRow, OpRow)):
        return row
    raise TypeError(f"row must be of the suites {', '.join(COMPARABLE)}, got a {type(row).__name__}")


def compare(old: Results, new: Results) -> Comparison:
    """Compares the rows with a time in both runs.

    A change is a tie where it is no larger than the noise of either run, or where the quartiles overlap.

    Raises:
        ValueError: two different suites, or one whose rows have no time.
    """
    if old.suite != new.suite or new.suite not in COMPARABLE:
        expected = f"two runs of one of the suites {', '.join(COMPARABLE)}"
        raise ValueError(f"only {expected} can be compared, got {old.suite} and {new.suite}")
    then = {row.key: row for row in old.rows}
    now = {row.key: row for row in new.rows}
    before = {key: row for key, row in then.items() if timed(row).ms is not None}
    after = {key: row for key, row in now.items() if timed(row).ms is not None}
    return Comparison(
        changes=[_change(before[key], row) for key, row in after.items() if key in before],
        only_old=len(before.keys() - after.keys()),
        only_new=len(after.keys() - before.keys()),
        conditions=_differences(old.environment, new.environment),
        lost=[row for key, row in now.items() if key in before and key not in after],
        unticked=[
            row
            for key, row in after.items()
            if key in before and timed(before[key]).parity is True and timed(row).parity is not True
        ],
    )


def _change(old: Any, new: Any) -> Change:
    was, now = timed(old), timed(new)
    assert was.ms is not None and now.ms is not None
    speedup = was.ms.median / now.ms.median
    overlap = was.ms.p25 <= now.ms.p75 and now.ms.p25 <= was.ms.p75
    verdict: Verdict = "faster" if speedup > 1 else "slower"
    if overlap or is_tie(speedup, max(was.noise or 0.0, now.noise or 0.0)):
        verdict = "tie"
    return Change(new, was.ms.median, now.ms.median, speedup, verdict)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    differences = []
    for group, name in _CONDITIONS:
        was, now = (part(environment, group).get(name) for environment in (old, new))
        if was != now:
            differences.append(f"{group} {name}: {was} then, {now} now")
    return differences
