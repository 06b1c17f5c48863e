"""CPU paths of the whole model: ditfast.DiT beside the reference, and what surrounds a call.

A provider is judged by the rule for models before it is timed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditfast import DiT, DiTConfig, load_checkpoint, reference, save_checkpoint
from ditfast.bench.cases.case import Case, Mode
from ditfast.bench.cases.providers import get_provider
from ditfast.bench.cases.workload import Workload, build_model, make_pool
from ditfast.bench.measure.flops import weight_bytes
from ditfast.bench.measure.judging import Judge
from ditfast.testing.inputs import random_batch, randomize_

Timed = Callable[..., Any]

CPU, FP32 = torch.device("cpu"), torch.float32
CONFIGS = {
    "tiny": DiTConfig(depth=2, hidden_size=128, num_heads=2, latent_size=(16, 16), num_classes=10),
    "DiT-S/8": DiTConfig.named("DiT-S/8"),
}
MODES: tuple[Mode, ...] = ("forward", "cfg", "train")


@functools.lru_cache(maxsize=1)
def workload(size: str, batch: int, mode: Mode) -> tuple[Workload, Judge]:
    """Shared by the providers of a case, which follow one another."""
    case = Case(CONFIGS[size], batch, FP32, mode)
    model = build_model(case.config, CPU, case.dtype, seed=0)
    work = Workload(case, CPU, model, make_pool(case, CPU, weight_bytes(model), seed=0))
    return work, Judge(work)


@pytest.mark.parametrize("provider", ["ditfast", "reference"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", CONFIGS)
def test_model(timed: Timed, size: str, mode: Mode, batch: int, provider: str) -> None:
    """A forward, a guided forward (of 2 * batch samples), or a training step with AdamW, in fp32."""
    work, judge = workload(size, batch, mode)
    variant = get_provider(provider).build(work)
    judgement = judge.judge(judge.compared(variant, work.pool[0]), {})
    assert judgement.parity is True, f"{provider} is not timed: {judgement.note}"
    inputs = itertools.cycle(work.pool)
    timed(
        lambda: variant.step(next(inputs)),
        group=f"{size}, {mode}, batch {batch}",
        device="cpu",
        dtype=FP32,
        shapes={str(index): tuple(value.shape) for index, value in enumerate(work.pool[0])},
        provider=provider,
        model=work.case.config.to_dict(),
    )


@pytest.mark.parametrize("how", ["safetensors", "official", "torch alone"])
@pytest.mark.parametrize("size", CONFIGS)
def test_checkpoint(timed: Timed, tmp_path: Path, size: str, how: str) -> None:
    """load_checkpoint from both single-file formats, beside torch.load into a model without storage."""
    config = CONFIGS[size]
    model = DiT(config)
    randomize_(model)
    path = tmp_path / ("model.safetensors" if how == "safetensors" else "model.pt")
    save_checkpoint(model, path)

    def alone() -> reference.DiT:
        with torch.device("meta"):
            result = reference.DiT(config)
        result.load_state_dict(torch.load(path, weights_only=True), assign=True)
        return result

    loaded = timed(
        alone if how == "torch alone" else lambda: load_checkpoint(path, config=config),
        group=f"{size}, checkpoint load",
        device="cpu",
        dtype=FP32,
        shapes={},
        bytes=path.stat().st_size,
    )
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("what", ["inputs", "weights"])
@pytest.mark.parametrize("size", CONFIGS)
def test_drawing(timed: Timed, size: str, what: str) -> None:
    """Random inputs of a batch of 8, and random weights: no part of a measurement, but of its wall clock."""
    config = CONFIGS[size]
    model = reference.DiT(config)

    def weights() -> list[torch.Tensor]:
        return list(randomize_(model).parameters())

    tensors = timed(
        weights if what == "weights" else lambda: random_batch(config, 8),
        group=f"{size}, drawing",
        device="cpu",
        dtype=FP32,
        shapes={"x": (8, config.in_channels, *config.latent_hw)} if what == "inputs" else {},
    )
    assert all(bool(tensor.isfinite().all()) and bool(tensor.any()) for tensor in tensors)
