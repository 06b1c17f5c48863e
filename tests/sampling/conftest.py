"""Shared by the tests of ``ditfast sample``: a tiny random checkpoint, a tiny random autoencoder, and the command."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from typer.testing import CliRunner, Result

import ditfast
from ditfast.cli.command import app, main
from ditfast.testing.inputs import randomize_

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ditfast.DiTConfig(depth=2, hidden_size=48, num_heads=2, num_classes=10, latent_size=(8, 4))
SHAPE = (4, 8, 4)
IMAGE = (64, 32, 3)
STEPS = 3


def make_checkpoint(path: Path, config: ditfast.DiTConfig = CONFIG, broken: str | None = None) -> Path:
    """A random one; ``broken`` names a parameter of which one value is NaN."""
    model = randomize_(ditfast.DiT(config))
    if broken is not None:
        with torch.no_grad():
            model.get_parameter(broken)[-1] = float("nan")
    ditfast.save_checkpoint(model, path)  # type: ignore[arg-type]
    return path


def make_autoencoder(folder: Path, channels: int = 4, **config: Any) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        sample_size=64,
        latent_channels=channels,
        **config,
    ).save_pretrained(folder)
    return folder


@contextmanager
def sampling_assets(folder: Path) -> Iterator[Path]:
    """A folder with a checkpoint and an autoencoder, and one thread while they are used.

    Two threads that wait for each other on busy cores take many times as long for so little.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make_checkpoint(folder / "tiny.safetensors")
    make_autoencoder(folder / "vae")
    yield folder
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny random checkpoint and autoencoder, to sample from."""
    with sampling_assets(tmp_path_factory.mktemp("sample")) as folder:
        yield folder


@pytest.fixture
def latents(assets: Path) -> dict[str, Any]:
    """Options of ``ditfast sample`` for latents; --latents and --out or --npz are added."""
    return {"checkpoint": assets / "tiny.safetensors", "steps": STEPS, "batch_size": 3}


@pytest.fixture
def images(assets: Path, latents: dict[str, Any]) -> dict[str, Any]:
    """Options of ``ditfast sample`` for images; --out or --npz is added."""
    return {**latents, "vae": assets / "vae"}


def sample(*arguments: str | Path, **options: Any) -> Result:
    """``ditfast sample`` in this process; an option x_y=z is --x-y z."""
    return CliRunner().invoke(app, ["sample", *_texts(arguments, options)])


def sampled(*arguments: str | Path, **options: Any) -> Result:
    result = sample(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str | Path, **options: Any) -> str:
    """The one-line message for bad input."""
    result = sample(*arguments, **options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def start_process(*arguments: str | Path, ranks: int = 1, **options: Any) -> subprocess.Popen[str]:
    """The same in a fresh process, or in several under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "ditfast", "sample", *_texts(arguments, options)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class ForkedRun:
    """``ditfast sample`` in forks of this process, which import nothing anew: in one, or in several that share a run.

    Unlike torchrun it ends none of them where another fails.
    """

    def __init__(self, folder: Path, *arguments: str | Path, ranks: int = 1, **options: Any) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        command = ["ditfast", "sample", *_texts(arguments, options)]
        self.processes = []
        for rank in range(ranks):
            rank_variables = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
            rank_variables |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
            variables = {**address, **rank_variables} if ranks > 1 else {}
            fork = multiprocessing.get_context("fork").Process
            process = fork(target=_run_in_fork, args=(command, variables, *self._streams(rank)), daemon=True)
            process.start()
            self.processes.append(process)

    def _streams(self, rank: int) -> tuple[Path, Path]:
        return self._folder / f"{rank}.out", self._folder / f"{rank}.err"

    def end(self, patience: float) -> list[tuple[int | None, str, str]]:
        """Exit code (None of one that had to be killed), stdout and stderr of every process."""
        ended = []
        for rank, process in enumerate(self.processes):
            process.join(patience)
            code = process.exitcode
            process.kill()
            process.join()
            out, err = self._streams(rank)
            ended.append((code, out.read_text(), err.read_text()))
        return ended


def _run_in_fork(command: list[str], variables: dict[str, str], out: Path, err: Path) -> None:
    os.environ.update(variables)
    sys.argv = command
    with open(out, "w") as sys.stdout, open(err, "w") as sys.stderr:
        main()


def arrays(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        return file["arr_0"], file["arr_1"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    return settings


def _texts(arguments: tuple[str | Path, ...], options: dict[str, Any]) -> list[str]:
    named = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    return [*map(str, arguments), *named]
