"""``ditfast sample`` in processes of its own: killed and run again, shared by two; the device of each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ditfast
from ditfast.sampling.processes import Processes
from tests.sampling.conftest import IMAGE, ForkedRun, arrays, sampled, start_process

pytest.importorskip("diffusers", reason="needs the package diffusers")

subprocesses = pytest.mark.subprocess
_PATIENCE = 120  # seconds


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=_PATIENCE)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(assets: Path) -> tuple[dict[str, Any], bytes]:
    """Options of a run, and the npz of a single undisturbed process."""
    options = {"checkpoint": assets / "tiny.safetensors", "vae": assets / "vae", "num": 16, "threads": 1}
    options |= {"batch_size": 2, "steps": 20}
    sampled(**options, npz=assets / "whole.npz")
    return options, (assets / "whole.npz").read_bytes()


def test_a_run_that_was_killed_goes_on_with_the_same_bytes(alone: tuple[dict[str, Any], bytes], tmp_path: Path) -> None:
    npz, parts = tmp_path / "x.npz", tmp_path / "x.npz.parts"
    (tmp_path / "streams").mkdir()
    run = ForkedRun(tmp_path / "streams", **alone[0], npz=npz)
    (process,) = run.processes
    wait_for(lambda: process.exitcode is not None or len(list(parts.glob("batch-*.npy"))) >= 2)
    process.kill()
    ((code, out, _),) = run.end(_PATIENCE)
    num_finished = len(list(parts.glob("batch-*.npy")))
    assert code == -signal.SIGKILL and 2 <= num_finished < 8 and out == "" and not npz.exists()
    assert f"{16 - 2 * num_finished} images in" in sampled(**alone[0], npz=npz).stderr
    assert npz.read_bytes() == alone[1]
    assert {*os.listdir(tmp_path)} == {"x.npz", "streams"}


@subprocesses
def test_two_processes_beside_one(alone: tuple[dict[str, Any], bytes], tmp_path: Path) -> None:
    # torchrun has options that begin with --num, too
    options = {"num_images" if name == "num" else name: value for name, value in alone[0].items()}
    code, out, err = finished(start_process(**options, npz=tmp_path / "x.npz", ranks=2))
    assert code == 0, err
    assert out == f"{tmp_path / 'x.npz'}\n"
    assert err.count("16 images in") == 1
    assert (tmp_path / "x.npz").read_bytes() == alone[1]
    images, labels = arrays(tmp_path / "x.npz")
    assert images.shape == (16, *IMAGE) and labels.shape == (16,)
    assert len({image.tobytes() for image in images}) == 16
    assert os.listdir(tmp_path) == ["x.npz"]


@pytest.mark.quick
def test_two_processes_say_what_is_wrong_once(assets: Path, tmp_path: Path) -> None:
    out, streams = tmp_path / "out", tmp_path / "streams"
    out.mkdir()
    streams.mkdir()
    options = {"checkpoint": assets / "tiny.safetensors", "classes": 10, "out": out}
    first, second = ForkedRun(streams, "--latents", **options, ranks=2).end(_PATIENCE)
    assert first == (2, "", "error: --classes must be in 0..9 for this checkpoint, got 10\n")
    assert second == (2, "", "")
    assert os.listdir(out) == []


@pytest.fixture
def fails_in_the_second(assets: Path, tmp_path: Path) -> dict[str, Any]:
    """The second process's first batch holds the class whose row is NaN; the first would wait for it for ever."""
    model = ditfast.load_checkpoint(assets / "tiny.safetensors")
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[5] = float("nan")
    ditfast.save_checkpoint(model, tmp_path / "broken.safetensors")
    options = {"checkpoint": tmp_path / "broken.safetensors", "classes": "1,5", "batch_size": 1, "steps": 2}
    return {**options, "npz": tmp_path / "x.npz"}


NOT_FINITE = "error: image 1, class 5: latents are not finite from step 1 of 2 on"


@pytest.mark.quick
def test_a_process_that_fails_says_why(fails_in_the_second: dict[str, Any], tmp_path: Path) -> None:
    batch = tmp_path / "x.npz.parts" / "batch-000000.npy"
    run = ForkedRun(tmp_path, "--latents", **fails_in_the_second, ranks=2)
    first, second = run.processes
    second.join(_PATIENCE)
    wait_for(batch.exists)
    assert first.exitcode is None  # torchrun ends it
    first.kill()
    (_, out, err), ended = run.end(_PATIENCE)
    assert out == "" and "error" not in err
    assert ended == (2, "", f"{NOT_FINITE}\n")
    assert not (tmp_path / "x.npz").exists()
    assert np.isfinite(np.load(batch)).all()


@subprocesses
@pytest.mark.long
def test_a_process_that_fails_ends_the_others(fails_in_the_second: dict[str, Any], tmp_path: Path) -> None:
    process = start_process("--latents", **fails_in_the_second, ranks=2)
    code, _, err = finished(process)
    assert code != 0 and not (tmp_path / "x.npz").exists()
    assert err.count(NOT_FINITE) == 1
    assert "Traceback" not in err.split("ChildFailedError")[0].partition("error: ")[0]
    assert np.isfinite(np.load(tmp_path / "x.npz.parts" / "batch-000000.npy")).all()


def test_one_process_alone_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with Processes() as processes:
        assert (processes.rank, processes.size, processes.is_first) == (0, 1, True)
        assert processes.first(lambda: "said") == "said"
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("name", "gpus", "ranks", "rank", "expected"),
    [
        (None, 0, 1, 0, "cpu"),
        (None, 2, 1, 0, "cuda:0"),
        ("cpu", 2, 2, 1, "cpu"),
        ("cuda", 2, 2, 1, "cuda:1"),
        ("cuda:1", 2, 1, 0, "cuda:1"),
        ("cuda:1", 2, 2, 0, "--device must be cuda for 2 processes"),
        ("cuda:2", 2, 1, 0, "--device needs GPU 2 here, and torch sees 2"),
        ("cuda", 0, 1, 0, "--device needs GPU 0 here, and torch sees 0"),
        ("cuda", 1, 2, 0, "--device needs GPU 1 here, and torch sees 1; .* at most one process a GPU"),
    ],
)
def test_each_process_has_its_own_gpu(
    name: str | None, gpus: int, ranks: int, rank: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks)):
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if expected.startswith("--"):
        with pytest.raises(ValueError, match=expected):
            Processes().device(name)
    else:
        assert str(Processes().device(name)) == expected
