"""Campaigns of steps that take no time."""

from __future__ import annotations

from ditfast.bench.campaign import Campaign, Step


def step(name: str, code: str, **options: object) -> Step:
    """A step that runs this Python; "{json}" in it stands for the step's result file."""
    return Step(name, ("-c", code), **options)  # type: ignore[arg-type]


def write(text: str) -> str:
    """Code that appends to the step's result file."""
    return f"open(r'{{json}}', 'a').write({text!r})"


def states(campaign: Campaign) -> dict[str, str]:
    return {name: done.state for name, done in campaign.steps.items()}
