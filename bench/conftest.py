"""What the pytest-benchmark suites of this folder share: ``pytest bench``. They assert nothing about time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ditfast.environment import collect
from ditfast.ops import current_backend

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    # the earliest hook: without the plugin its options would be called unknown before anything says why
    if not any(pluginmanager.hasplugin(name) for name in ("benchmark", "pytest_benchmark.plugin")):
        raise pytest.UsageError(
            "bench/ needs the plugin pytest-benchmark, which is not loaded: pip install 'ditfast[bench]'"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpret = os.environ.get("TRITON_INTERPRET", "0")
    if interpret.lower() not in ("", "0", "false", "off", "no", "n"):
        raise pytest.UsageError(
            f"TRITON_INTERPRET must not be set, got {interpret!r}: bench/ would time Triton's interpreter "
            "(tests/ sets it where there is no GPU, so run the two apart)"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    # not part of machine_info: clocks and temperatures differ in every run, and a comparison would warn each time
    output_json["environment"] = _environment()


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Callable[..., Any]:
    """Times a call under conditions that go into its ``extra_info``.

    ``timed(call, group=..., device=..., dtype=..., shapes={name: sizes}, **more)`` returns the call's last result.

    What counts is the host's time. On CUDA that is the time to enqueue the work: the device is idle at the start,
    nothing waits for it within the timed calls, and it is waited for afterwards. The shapes are so small that the
    device is done before the host has enqueued the next call; were it not, the queue would fill and the figure
    would be the device's.
    """

    def run(
        call: Callable[[], Any],
        *,
        group: str,
        device: str,
        dtype: torch.dtype | None,
        shapes: Mapping[str, tuple[int, ...]],
        **more: Any,
    ) -> Any:
        environment = _environment()
        benchmark.group = group
        benchmark.extra_info |= {
            "shapes": {name: list(sizes) for name, sizes in shapes.items()},
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "backend": current_backend(),
            "torch": environment["packages"]["torch"],
            "torch_threads": environment["cpu"]["torch_threads"],
            "commit": environment["commit"],
            "dirty": environment["dirty"],
            **more,
        }
        call()  # lazy initialisation, and on a GPU compilation, are the first call's
        _wait(device)
        result = benchmark(call)
        _wait(device)
        return result

    return run


@functools.cache
def _environment() -> dict[str, Any]:
    return collect()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
