"""The goals a campaign ends with: met, missed and by how much, or not measured and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from .ceilings import highest
from .records import Results
from .rows import ModelRow, OpRow

Status = Literal["met", "missed", "not measured"]

_COMPILE = ("reference-compile", "reference-max-autotune", "reference-reduce-overhead")
_ADALN = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
_SDPA = ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
_FLASH_ATTENTION_2 = ("flash-attn-2", "sdpa-flash")  # its package, and what torch has of it
_LARGE_BYTES = 256e6  # traffic from which on an adaLN kernel is held against the copy bandwidth


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        name: what is asked.
        target: the factor or share to reach; with ``at_most``, not to exceed.
        found: what was measured; None where it was not.
        detail: what was compared with what, or why nothing could be.
        unit: "x" for factors, "%" for shares, "" for counts.
    """

    name: str
    target: float
    found: float | None
    detail: str
    unit: Literal["x", "%", ""] = "x"
    at_most: bool = False

    @property
    def status(self) -> Status:
        if self.found is None:
            return "not measured"
        met = self.found <= self.target if self.at_most else self.found >= self.target
        return "met" if met else "missed"

    @property
    def short_by(self) -> float:
        """How far a missed goal is from its target; 0 for others."""
        return abs(self.found - self.target) if self.found is not None and self.status == "missed" else 0.0

    def text(self, value: float) -> str:
        """A value in the goal's unit."""
        return f"{value:.1%}" if self.unit == "%" else f"{value:.2f}x" if self.unit == "x" else f"{value:.0f}"


def goals(results: Iterable[Results]) -> list[Goal]:
    """All goals, from the result files of one device; the bound of XL/2 is traced, which takes seconds."""
    results = list(results)
    return [
        _over("DiT-XL/2", "forward", 1.12, results, _COMPILE, "the best torch.compile mode", 256),
        _share_of_bound(results),
        _over("DiT-XL/2", "train", 1.15, results, _COMPILE, "the best torch.compile mode"),
        _over("DiT-S/2", "train", 1.3, results, _COMPILE, "the best torch.compile mode"),
        _over("DiT-XL/2", "forward", 1.5, results, ("reference-reduce-overhead",), "reduce-overhead", 1),
        _adaln([row for result in results if result.suite == "ops" for row in result.rows]),
        _epilogues([row for result in results if result.suite == "ops" for row in result.rows]),
        *_attention([row for result in results if result.suite == "ops" for row in result.rows]),
        _saved([row for result in results if result.suite == "memory" for row in result.rows]),
        _parity(results),
    ]


def _of(rows: Iterable[ModelRow], model: str, mode: str) -> list[ModelRow]:
    """The bf16 rows of a model at 256 px that have a time."""
    return [
        row
        for row in rows
        if (row.model, row.mode, row.dtype) == (model, mode, "bf16")
        and row.latent_size == (32, 32)
        and row.conditioning == "adaln_zero"
        and row.ms is not None
    ]


def _fastest(rows: Sequence[ModelRow], wanted: Callable[[ModelRow], bool]) -> ModelRow | None:
    return min(filter(wanted, rows), key=lambda row: row.ms.median if row.ms else float("inf"), default=None)


def _over(
    model: str,
    mode: str,
    target: float,
    results: Iterable[Results],
    rivals: Sequence[str],
    named: str,
    batch: int | None = None,
) -> Goal:
    """Ours over the fastest of some rivals, timed side by side at a batch, or at the largest one that both have.

    Of several such cases the one in which most of these rivals were tried counts, and of those the larger batch;
    a goal is measured where all of them were.
    """
    at = "the largest batch" if batch is None else f"batch {batch}"
    name = f"{model} 256 px bf16, {mode}, {at}: over {named}"
    detail = "no rows of it"
    found: list[tuple[int, int, Goal]] = []
    for result in results:
        rows = _of(result.rows, model, mode) if result.suite == "models" else []
        for size in {row.batch for row in rows if batch in (None, row.batch)}:
            case = [row for row in rows if row.batch == size]
            ran = [row for row in case if row.provider in rivals]
            rival = _fastest(ran, lambda row: True)
            ours = _fastest(case, lambda row: row.is_ours and row.parity is True)
            if rival is None or ours is None or rival.ms is None or ours.ms is None:
                detail = "no time of ditfast with parity" if ours is None else f"no time of {named}"
                continue
            ratio = rival.ms.median / ours.ms.median
            said = f"{ours.provider} over {rival.provider} at batch {size}"
            # a mode that failed was tried; one that has no row may have been the best
            tried = {row.provider for row in result.rows if row.case == ours.case} & set(rivals)
            if len(tried) < len(rivals):
                said = f"{ratio:.2f}x so far: {said}, {len(tried)} of {len(rivals)} modes tried"
                found.append((len(tried), size, Goal(name, target, None, said)))
            else:
                found.append((len(tried), size, Goal(name, target, ratio, said)))
    if not found:
        return Goal(name, target, None, detail)
    return max(found, key=lambda item: item[:2])[2]


def _share_of_bound(results: Sequence[Results]) -> Goal:
    """Of the bound that follows from what ditfast's forward launches and the highest ceilings measured."""
    name = "DiT-XL/2 256 px bf16, forward, batch 256: of the bound from the measured ceilings"
    best: Goal = Goal(name, 0.9, None, "no rows of it", "%")
    ceilings = None
    for result in results:
        if result.ceilings is not None:
            ceilings = highest(ceilings, result.ceilings)
    for result in results:
        rows = _of(result.rows, "DiT-XL/2", "forward") if result.suite == "models" else []
        ours = _fastest(rows, lambda row: row.is_ours and row.parity is True and row.batch == 256)
        if ours is None or ours.ms is None or ceilings is None or "bf16" not in ceilings.matmul_tflops:
            continue
        bound = bound_ms(256, ceilings.matmul_tflops["bf16"], ceilings.copy_gb_per_s)
        share = bound / ours.ms.median
        if best.found is None or share > best.found:
            detail = f"{ours.provider}: {ours.ms.median:.2f} ms, bound {bound:.2f} ms"
            best = Goal(name, 0.9, share, detail, "%")
    return best


@lru_cache(maxsize=8)
def bound_ms(batch: int, tflops: float, gb_per_s: float) -> float:
    """The roofline of ditfast's XL/2 forward in bf16, in ms."""
    import torch

    from ditfast.config import MODELS

    from .cost_bench import trace
    from .roofline import roofline_ms

    return roofline_ms(trace(MODELS["DiT-XL/2"], batch, torch.bfloat16, "forward", "ditfast"), tflops, gb_per_s)


def _adaln(rows: Iterable[OpRow]) -> Goal:
    """The slowest adaLN kernel, by its share of the copy bandwidth."""
    name = "adaLN kernels: of the copy bandwidth, the least of those that move 256 MB or more"
    found = [
        row
        for row in rows
        if row.provider == "ditfast" and row.operator in _ADALN and row.share is not None and row.bytes >= _LARGE_BYTES
    ]
    ticked = [row for row in found if row.parity is True and row.dtype == "bf16" and row.timed == "graph"]
    if not ticked:
        return Goal(name, 0.9, None, "no bf16 rows of it with parity, timed from graphs", "%")
    least = min(ticked, key=lambda row: row.share or 0.0)
    detail = f"{least.operator}, {least.direction}, {least.size}; {len(ticked)} rows"
    return Goal(name, 0.9, least.share, detail, "%")


def _epilogues(rows: Iterable[OpRow]) -> Goal:
    """The slowest GEMM with an epilogue, beside the library's GEMM alone of the same run."""
    name = "GEMMs with an epilogue, bf16 forward: of the library's GEMM alone"
    rows = list(rows)
    alone = {row.case: row.ms.median for row in rows if row.provider == "gemm" and row.ms is not None}
    found = [
        (row.ms.median / alone[row.case], row)
        for row in rows
        if row.provider == "ditfast" and row.case in alone and row.ms is not None and row.parity is True
    ]
    found = [(ratio, row) for ratio, row in found if row.dtype == "bf16" and row.timed == "graph"]
    if not found:
        return Goal(name, 1.05, None, "no bf16 rows of both with parity, timed from graphs", "%", at_most=True)
    ratio, row = max(found, key=lambda item: item[0])
    detail = f"{row.operator}, {row.size}; {len(found)} rows"
    return Goal(name, 1.05, ratio, detail, "%", at_most=True)


def _attention(rows: Iterable[OpRow]) -> list[Goal]:
    """This project's attention kernels beside other implementations of the same run, the worst case of each goal."""
    wanted = [
        (72, 1.0, "the best other implementation", None),
        (72, 1.2, "FlashAttention 2", _FLASH_ATTENTION_2),
        (64, 1.0, "FlashAttention 2", _FLASH_ATTENTION_2),
    ]
    rows = [row for row in rows if row.operator == "self_attention" and row.dtype == "bf16" and row.timed == "graph"]
    found = []
    for head_dim, target, named, rivals in wanted:
        ratios = []
        for ours in rows:
            if ours.provider != "ditfast-triton" or ours.width != head_dim * (ours.num_heads or 0):
                continue
            others = [row for row in rows if row.case == ours.case and not row.is_ours]
            if not {row.provider for row in others} >= set(_SDPA):
                continue  # one that has no row may have been the best
            times = [(row.ms.median, row.provider) for row in others if row.ms]
            times = [time for time in times if rivals is None or time[1] in rivals]
            if times and ours.ms is not None and ours.parity is True:
                rival = min(times)
                ratios.append((rival[0] / ours.ms.median, f"{ours.direction}, {ours.size}, {rival[1]}"))
        name = f"attention kernels at head dim {head_dim}, bf16: over {named}"
        if not ratios:
            found.append(Goal(name, target, None, "no bf16 rows of it with parity beside all of SDPA's kernels"))
            continue
        ratio, case = min(ratios)
        found.append(Goal(name, target, ratio, f"{case}; {len(ratios)} rows"))
    return found


def _saved(rows: Iterable[Any]) -> Goal:
    """What training keeps for the backward, the worst model."""
    name = "saved for the backward in training: at most this share of the reference's"
    known = {row.key: row for row in rows if row.saved_bytes and row.mode == "train" and row.dtype == "bf16"}
    shares = []
    for row in known.values():
        other = known.get((*row.key[:-1], "reference"))
        if row.provider == "ditfast" and other is not None:
            shares.append((row.saved_bytes / other.saved_bytes, row))
    if not shares:
        return Goal(name, 0.62, None, "no bf16 rows of ditfast beside the reference", "%", at_most=True)
    share, row = max(shares, key=lambda item: item[0])
    return Goal(name, 0.62, share, f"{row.model} batch {row.batch}", "%", at_most=True)


def _parity(results: Iterable[Results]) -> Goal:
    """Rows of ours that ran and have no tick, and failures of verify."""
    name = "parity everywhere: rows without it"
    bad, judged = [], 0
    for result in results:
        for row in result.rows:
            if result.suite == "verify":
                judged += 1
                bad += [] if row.ok else [f"verify {row.subject} {row.dtype}"]
                continue
            row = row.row if result.suite == "scaling" else row
            if result.suite not in ("models", "ops", "scaling") or not row.is_ours:
                continue
            if row.ms is not None or row.status == "error":  # what failed computes nothing right
                judged += 1
                good = row.status == "ok" and row.parity is True
                bad += [] if good else [f"{result.suite} {row.case[0]} {row.provider}"]
    if not judged:
        return Goal(name, 0, None, "nothing was judged", "", at_most=True)
    detail = f"{judged} judged" + (f"; {', '.join(bad[:3])}" if bad else "")
    return Goal(name, 0, len(bad), detail, "", at_most=True)


def goals_table(found: Sequence[Goal]) -> Any:
    """The goals for a terminal."""
    from rich.console import Group

    from .render import line, plain_table

    table = plain_table()
    for header in ("goal", "target", "found", "", "by"):
        table.add_column(header, justify="left" if header == "goal" else "right", no_wrap=header != "goal")
    styles = {"met": "green", "missed": "red", "not measured": "dim"}
    for goal in found:
        bound = "at most " if goal.at_most else "at least "
        table.add_row(
            f"{goal.name} ({goal.detail})",
            bound + goal.text(goal.target),
            "-" if goal.found is None else goal.text(goal.found),
            f"[{styles[goal.status]}]{goal.status}[/]",
            goal.text(goal.short_by) if goal.status == "missed" else "",
        )
    return Group(line("Goals", "bold"), table)
