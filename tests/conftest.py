"""Shared by all tests: torch's threads, a fixed seed, and the markers of what a machine may lack."""

from __future__ import annotations

import functools
import gc
import os
import random
import shutil
import signal
import subprocess
import sysconfig
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark.expression import Expression

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # of two workers on two cores each has one: threads that wait for each other cost more than they bring
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    # known before a module is collected, so before triton is imported and CUDA looks for devices: in one process
    # kernels are launched or run in Triton's interpreter, and whatever is not a GPU test is the same on every machine
    if not _is_for("gpu", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if not _is_for("rehearsal", config.option.markexpr):
            os.environ.setdefault("TRITON_INTERPRET", "1")
    # a shell's background job starts with SIGINT ignored, and Python leaves it so
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_for(tests: str, expression: str) -> bool:
    """Whether ``-m`` selects tests of this marker, and neither the interpreter's nor those without a marker."""

    def selects(marker: str) -> bool:  # later pytests ask for a marker's arguments too
        return bool(Expression.compile(expression).evaluate(lambda name, **_: name == marker))

    return bool(expression) and selects(tests) and not selects("kernels") and not selects("")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_pairs(items)
    for marker in ("rehearsal", "long"):
        if _is_for(marker, config.option.markexpr):
            continue
        left_out = [item for item in items if item.get_closest_marker(marker)]
        items[:] = [item for item in items if not item.get_closest_marker(marker)]
        config.hook.pytest_deselected(items=left_out)


def _leave_pairs(items: list[pytest.Item]) -> None:
    """Marks as long what a ``pairwise`` test has beyond every pair of its parameters' values."""
    cases: dict[str, dict[pytest.Item, list[Any]]] = {}
    for item in items:
        if item.get_closest_marker("pairwise"):
            values = sorted((name, repr(value)) for name, value in vars(item)["callspec"].params.items())
            cases.setdefault(item.nodeid.partition("[")[0], {})[item] = list(combinations(values, 2))
    for pairs_of in cases.values():
        runs: Counter[Any] = Counter()

        def gain(item: pytest.Item) -> tuple[bool, int, int]:
            """What is quick first, then what brings most new pairs, then the pairs that ran least."""
            counts = [runs[pair] for pair in pairs_of[item]]  # noqa: B023
            return item.get_closest_marker("quick") is not None, counts.count(0), -sum(counts)

        while pairs_of:
            item = max(pairs_of, key=gain)
            quick, new, _ = gain(item)
            pairs = pairs_of.pop(item)
            if quick or new:
                runs.update(pairs)
            else:
                item.add_marker("long")


def pytest_collection_finish(session: pytest.Session) -> None:
    # torch, triton and the tests themselves are a million objects, which every full collection would walk
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and real kernels: run `pytest -m gpu` on a machine that has one")
    if item.get_closest_marker("kernels"):
        prepare_interpreter()
    if item.get_closest_marker("compiler") and (reason := _compiler_missing()):
        pytest.skip(reason)


@functools.cache
def prepare_interpreter() -> None:
    """Has Triton's interpreter round to bf16 as a GPU does (it truncates, which biases sums by many ulps), and replace
    the builtins of its language once a launch (not at every call of a device function, half of its time)."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return

    patch = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(np.shape(data))
        return convert(data, source, target, mode)

    interpreter._convert_float = rounded


@functools.cache
def _compiler_missing() -> str | None:
    """Why torch.compile cannot build its C++ here, or None."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"needs a C++ compiler; {compiler} is not on the PATH"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"needs Python's C headers; no Python.h in {sysconfig.get_path('include')}"
    return None


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state; returns the seed."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(params=["cpu", "gpu"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where "auto" takes formulas, and where it takes kernels, which run in the interpreter."""
    from ditfast.ops import backend

    if request.param == "gpu":
        monkeypatch.setattr(backend, "on_gpu", lambda x: True)
        monkeypatch.setattr(backend, "_gpu_reason", lambda index: None)
    return str(request.param)


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up limits: a command measures them again after every case, and its test is about something else."""
    from ditfast.bench.measure import ceilings
    from ditfast.bench.records.files import Ceilings

    def made_up(device: torch.device, precisions: Iterable[str], seconds: float = 0.5) -> Ceilings:
        names = dict.fromkeys(precisions)
        return Ceilings(40.0, 1 << 20, dict.fromkeys(names, 0.2), dict.fromkeys(names, 1024))

    monkeypatch.setattr(ceilings, "measure_ceilings", made_up)


@pytest.fixture(scope="session")
def source_files() -> list[Path]:
    """The repository's files, relative to its root: tracked, and new ones that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip(f"needs a git checkout; {ROOT} is none")
    # safe.directory: a checkout owned by another user is fine to list
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    names = [Path(name) for name in listing.stdout.decode().split("\0") if name]
    # a file deleted but not yet committed is still listed
    return [name for name in names if os.path.lexists(ROOT / name)]


@pytest.fixture(scope="session")
def checkout(source_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the repository's files, symlinks kept, so that building leaves the checkout untouched."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in source_files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    yield copy
    shutil.rmtree(copy)
