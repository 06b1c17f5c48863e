"""Campaigns of steps that take no time."""

from __future__ import annotations

from dataclasses import replace

from ditfast.bench.campaign.run import Campaign, Step
from ditfast.bench.records.rows import ModelRow, Spread


def step(name: str, code: str, **options: object) -> Step:
    """A step that runs this Python; "{json}" in it stands for the step's result file."""
    return Step(name, ("-c", code), **options)  # type: ignore[arg-type]


def write(text: str) -> str:
    """Code that appends to the step's result file."""
    return f"open(r'{{json}}', 'a').write({text!r})"


def states(campaign: Campaign) -> dict[str, str]:
    return {name: done.state for name, done in campaign.steps.items()}


def model_row(provider: str, ms: float | None = 10.0, parity: bool | None = True) -> ModelRow:
    """A row of XL/2's forward at batch 256; without a time one that failed."""
    blank = ModelRow("DiT-XL/2", "adaln_zero", (32, 32), 256, 1152, 28, 256, "bf16", "forward", provider, "bf16", "ok")
    spread = None if ms is None else Spread(ms, ms, ms, 5, 1)
    return replace(blank, status="error" if ms is None else "ok", ms=spread, parity=parity, note="" if ms else "boom")
