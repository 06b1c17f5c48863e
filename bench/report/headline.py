"""A case in one line: the reference eager, the best torch.compile, ditfast, and best over best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..records.metrics import is_tie
from ..records.rows import ModelRow, OpRow, SampleRow
from ..records.text import STATUS, digits, factor, percent

_COMPILED = ("compile", "autotune", "overhead")
COLUMNS = (
    "reference, eager",
    "best torch.compile",
    "ditfast",
    "best of ditfast",
    "best over best",
    "of limit",
)


@dataclass(frozen=True)
class Headline:
    """The rows of one case, timed side by side.

    Attributes:
        rows: all of them; at least one.
        best: the fastest of ours that has its parity tick.
    """

    rows: Sequence[ModelRow]
    best: ModelRow | None

    @property
    def case(self) -> ModelRow:
        """Any row, for what they have in common."""
        return self.rows[0]

    @property
    def ours(self) -> list[ModelRow]:
        return [row for row in self.rows if row.is_ours]

    @property
    def speedup(self) -> float | None:
        return None if self.best is None else self.best.speedup

    @property
    def is_tie(self) -> bool:
        return (
            self.best is not None
            and self.best.speedup is not None
            and is_tie(self.best.speedup, noise(self.best))
        )

    @property
    def speedup_text(self) -> str:
        """Such as "1.15x", "1.01x, a tie", or "-" without a parity tick or a rival."""
        if self.speedup is None:
            return "-"
        return f"{factor(self.speedup)}, a tie" if self.is_tie else factor(self.speedup)

    @property
    def cells(self) -> list[str]:
        """One text for each of ``COLUMNS``; images/s but for the last two."""
        eager = next((row for row in self.rows if row.provider == "reference"), None)
        plain = next((row for row in self.rows if row.provider == "ditfast"), None)
        compiled = [row for row in self.rows if is_compiled(row.provider)]
        fastest = _fastest(compiled) or (compiled[0] if compiled else None)
        over = self.speedup_text
        if self.best is not None and self.best.speedup is not None and self.best.rival:
            shown = {"reference", *([fastest.provider] if fastest else [])}
            over += "" if self.best.rival in shown else f" over {self.best.rival}"
        if self.best is not None:
            best = f"{digits(self.best.images_per_s)} ({self.best.provider})"
        else:
            best = "no parity tick" if any(row.ms for row in self.ours) else rate(plain)
        share = "-" if self.best is None or self.best.ceiling_share is None else _share(self.best)
        return [rate(eager), rate(fastest, named=True), rate(plain), best, over, share]


def headlines(rows: Iterable[ModelRow]) -> list[Headline]:
    """One for each case, in the order of the rows."""
    cases: dict[tuple[object, ...], list[ModelRow]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return [
        Headline(members, _fastest([row for row in members if row.is_ours and row.parity is True]))
        for members in cases.values()
    ]


def noise(row: ModelRow | OpRow | SampleRow) -> float:
    return row.noise or 0.0


def speedup_text(row: ModelRow | OpRow | SampleRow) -> str:
    """Such as "1.15x over reference-compile" or "1.01x, a tie over eager"; empty without a parity tick or a rival."""
    if row.speedup is None or row.parity is not True:
        return ""
    tie = ", a tie" if is_tie(row.speedup, noise(row)) else ""
    return f"{factor(row.speedup)}{tie}" + (f" over {row.rival}" if row.rival else "")


def is_compiled(provider: str) -> bool:
    """Whether a rival runs under torch.compile, by its name."""
    return not provider.startswith("ditfast") and any(part in provider for part in _COMPILED)


def rate(row: ModelRow | None, named: bool = False) -> str:
    """Images/s of a row, or the reason that there are none; ``named`` adds the provider."""
    if row is None or row.status == "unavailable":
        return "not measured"
    if row.ms is None:
        return STATUS[row.status] if row.status != "ok" else "not measured"
    text = digits(row.images_per_s)
    if row.is_ours and row.parity is not True:
        return f"{text}, no parity tick"
    return f"{text} ({row.provider.removeprefix('reference-')})" if named else text


def _share(row: ModelRow) -> str:
    return f"{percent(row.ceiling_share)} of {row.ceiling or 'an unnamed limit'}"


def _fastest(rows: Iterable[ModelRow]) -> ModelRow | None:
    timed = [row for row in rows if row.status == "ok" and row.ms is not None]
    return min(timed, key=lambda row: row.ms.median if row.ms else float("inf"), default=None)
