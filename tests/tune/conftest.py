"""What all tests of ``ditfast tune`` do without. Nothing here may import triton: it is loaded before its settings."""

from __future__ import annotations

from contextlib import nullcontext

import pytest


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection takes a second in a process that has compiled, and each shape that is measured makes five."""
    pytest.importorskip("triton")
    from ditfast.bench.measure import timing
    from ditfast.bench.tune import plan

    monkeypatch.setattr(timing, "_cheap_garbage_collection", nullcontext)
    monkeypatch.setattr(plan, "clear", lambda device: None)
