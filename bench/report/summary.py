"""The summary in plain language: every sentence is computed from the rows, bad news as plainly as good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..rows import ModelRow, VerifyRow
from ..text import STATUS, case_name, count, digits, factor, listed, mode_name, model_name, percent
from .compared import comparison_lines
from .data import Machine, Report
from .headline import Headline, headlines, noise, work
from .suites import computed_lines, host_lines, memory_lines, op_lines, scaling_lines


@dataclass(frozen=True)
class Section:
    """Sentences about one machine, or one comparison."""

    title: str
    lines: list[str]


def summarise(report: Report) -> list[Section]:
    """The sections in the order of the page: the machines, what was computed, the comparisons."""
    sections = [Section(machine.label, _machine_lines(machine)) for machine in report.machines]
    sections += [Section(machine.label, _computed_lines(machine)) for machine in report.computed]
    sections += [
        Section(f"{pair.new} against {pair.old}, on {pair.machine}", comparison_lines(pair))
        for pair in report.compared
    ]
    return sections


def as_text(sections: Sequence[Section]) -> str:
    """``summary.txt``."""
    blocks = ["\n".join([section.title, *(f"- {line}" for line in section.lines)]) for section in sections]
    return "\n\n".join(blocks) + "\n"


def _machine_lines(machine: Machine) -> list[str]:
    lines = machine.remarks
    groups: dict[tuple[str, str], list[Headline]] = {}
    for found in headlines(machine.rows("models")):
        groups.setdefault((found.case.mode, found.case.dtype), []).append(found)
    for (mode, dtype), cases in groups.items():
        lines += [_headline(machine.label, cases), *_tally(f"{mode_name(mode)}, {dtype}", cases)]
    lines += _outcomes(machine.rows("models"), _left_out(machine))
    lines += op_lines(machine.rows("ops")) + scaling_lines(machine.rows("scaling"))
    lines += memory_lines(machine.rows("memory")) + host_lines(machine.rows("host"))
    lines += _verdicts(machine.rows("verify"))
    return lines or ["Nothing was measured."]


def _computed_lines(machine: Machine) -> list[str]:
    """What it was computed with comes first: another version launches something else."""
    lines = [f"{machine.short_conditions}.", *machine.remarks]
    lines += computed_lines(machine.rows("cost")) if machine.of("cost") else []
    return lines + memory_lines(machine.rows("memory"), traced=True)


def _headline(device: str, cases: Sequence[Headline]) -> str:
    """The largest model at the largest batch, where ours has its tick somewhere."""
    ticked = [found for found in cases if found.best is not None]
    chosen = max(ticked or cases, key=lambda found: work(found.case))
    row, best = chosen.case, chosen.best
    where = f"On {device}, {model_name(row)} at batch {row.batch} in {row.dtype}, {mode_name(row.mode)}: "
    if best is None:
        return f"{where}no speed-up is stated, for no row of ditfast has a parity tick."
    text = f"{where}{best.provider} makes {digits(best.images_per_s)} images/s"
    if best.speedup is None:
        text += "; no rival ran beside it"
    elif chosen.is_tie:
        text += f", {factor(best.speedup)} the fastest rival ({best.rival}): a tie, the noise is {percent(noise(best))}"
    else:
        text += f": {factor(best.speedup)} the fastest rival ({best.rival})"
    if best.ceiling_share is not None:
        text += f"; {percent(best.ceiling_share)} of the {best.ceiling or 'measured'} limit"
    return text + "."


def _tally(what: str, cases: Sequence[Headline]) -> list[str]:
    """Ahead, tied and behind over all cases of a mode and dtype; then parity."""
    rated = [(found.speedup, found) for found in cases if found.speedup is not None]
    ahead = [speedup for speedup, found in rated if speedup > 1 and not found.is_tie]
    behind = [(speedup, found) for speedup, found in rated if speedup <= 1 and not found.is_tie]
    ties = sum(found.is_tie for _, found in rated)
    text = f"Over {count(len(cases), 'case')} ({what}), the best of ditfast is ahead of the fastest rival"
    text += f" in {len(ahead)}"
    if ahead:
        text += f" ({_range(ahead)})"
    text += f", tied in {ties}, behind in {len(behind)}"
    if behind:
        worst, found = min(behind, key=lambda pair: pair[0])
        text += f" (worst: {model_name(found.case)} at batch {found.case.batch}, {factor(worst)})"
    unrated = len(cases) - len(rated)
    lines = [
        text + (f"; {unrated} without a speed-up, for want of a parity tick or a rival." if unrated else ".")
    ]
    return lines + _parity(what, [row for found in cases for row in found.ours if row.ms is not None])


def _parity(what: str, rows: Sequence[ModelRow]) -> list[str]:
    failed = [case_and_note(row) for row in rows if row.parity is False]
    open_rows = [case_and_note(row) for row in rows if row.parity is None]
    if not rows:
        return [f"No row of ditfast ran ({what})."]
    if not failed and not open_rows:
        return [f"Parity held in every row of ditfast ({count(len(rows), 'row')}, {what})."]
    lines = []
    if failed:
        lines.append(
            f"PARITY FAILED in {len(failed)} of {count(len(rows), 'row')} of ditfast ({what}): {listed(failed)}."
        )
    if open_rows:
        lines.append(
            f"Parity could not be judged in {count(len(open_rows), 'row')} of ditfast ({what}): {listed(open_rows)}."
        )
    return lines


def case_and_note(row: ModelRow) -> str:
    return f"{model_name(row)} at batch {row.batch}, {row.provider}" + (f" ({row.note})" if row.note else "")


def _outcomes(rows: Sequence[ModelRow], left_out: dict[str, str]) -> list[str]:
    """Who ran out of memory, failed, or was not measured, and why."""
    lines = []
    for status, verb in (("oom", "ran out of memory"), ("error", "failed")):
        named = [f"{case_name(row)}, {row.provider}" for row in rows if row.status == status]
        if status == "error":
            found = [row for row in rows if row.status == status]
            named = [f"{case_name(row)}, {row.provider} ({row.note or 'no reason given'})" for row in found]
        if named:
            lines.append(f"{count(len(named), 'row')} {verb}: {listed(named)}.")
    reasons = {row.provider: row.note or STATUS[row.status] for row in rows if row.status == "unavailable"}
    return lines + [f"Not measured: {name}: {why}." for name, why in {**left_out, **reasons}.items()]


def _left_out(machine: Machine) -> dict[str, str]:
    """Why the default options left providers out."""
    found: dict[str, str] = {}
    for run in machine.of("models"):
        reasons = run.results.settings.get("providers_left_out")
        if isinstance(reasons, dict):
            found |= {str(name): str(reason) for name, reason in reasons.items()}
    return found


def _verdicts(rows: Sequence[VerifyRow]) -> list[str]:
    if not rows:
        return []
    failed = [f"{row.subject}, {row.backend}, {row.dtype} ({row.note or row.tensor})" for row in rows if not row.ok]
    if failed:
        return [f"NUMERICS FAILED in {len(failed)} of {count(len(rows), 'check')}: {listed(failed)}."]
    return [f"All {count(len(rows), 'check')} of the numerics against fp64 passed."]


def _range(values: Sequence[float]) -> str:
    low, high = factor(min(values)), factor(max(values))
    return low if low == high else f"{low} to {high}"
