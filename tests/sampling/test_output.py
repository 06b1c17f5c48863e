"""Files of samples: never half written; an npz as numpy writes it, PNGs, the grid."""

from __future__ import annotations

import errno
import os
import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditfast import files
from ditfast.sampling import output
from ditfast.sampling.folder import Rows, RunFolder
from ditfast.sampling.work import Batch


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The system refuses to make a file larger than ``size`` bytes, as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def images(count: int, height: int = 8, width: int = 6) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_a_file_is_there_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files.written(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(RuntimeError), files.written(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.quick
def test_a_full_disk_leaves_nothing_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "batch.npy"
    with no_file_beyond(4096), pytest.raises(OSError) as raised:
        output.save_array(images(100), path)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert os.listdir(tmp_path) == []


def test_parts_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / f".000001.png.0123abcd{files.PART}").write_bytes(b"half")
    (tmp_path / "000000.png").write_bytes(b"whole")
    files.remove_parts(tmp_path)
    assert os.listdir(tmp_path) == ["000000.png"]


@pytest.mark.quick
def test_an_npz_is_what_numpy_would_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_BLOCK", 100)  # no multiple of a row's bytes
    array, labels = images(23), np.arange(23)
    entries = {
        "arr_0": (array.shape, array.dtype, (array[first : first + 5] for first in range(0, 23, 5))),
        "arr_1": (labels.shape, labels.dtype, [labels]),
    }
    path = tmp_path / "ours.npz"
    output.save_npz(path, entries, '{"seed": 0}')
    np.savez(tmp_path / "theirs.npz", array, labels)
    with np.load(path, allow_pickle=False) as ours, np.load(tmp_path / "theirs.npz") as theirs:
        assert ours.files == theirs.files == ["arr_0", "arr_1"]
        for name in ours.files:
            assert ours[name].dtype == theirs[name].dtype
            assert np.array_equal(ours[name], theirs[name])
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(tmp_path / "theirs.npz") as theirs:
        assert ours.testzip() is None
        assert ours.read("arr_0.npy") == theirs.read("arr_0.npy")
    assert output.npz_comment(path) == '{"seed": 0}'


def test_the_same_arrays_are_the_same_npz(tmp_path: Path) -> None:
    array = images(4)
    paths = [tmp_path / "one.npz", tmp_path / "two.npz"]
    for size, path in zip((1, 3), paths, strict=True):
        blocks = [array[first : first + size] for first in range(0, 4, size)]
        output.save_npz(path, {"arr_0": (array.shape, np.uint8, blocks)}, "")
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_only_a_block_of_an_npz_is_held(tmp_path: Path) -> None:
    import tracemalloc

    rows = (np.full((10, 64, 64, 3), value, np.uint8) for value in range(100))
    tracemalloc.start()
    output.save_npz(tmp_path / "big.npz", {"arr_0": ((1000, 64, 64, 3), np.uint8, rows)}, "")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 10 * 64 * 64 * 3 < 1000 * 64 * 64 * 3
    with np.load(tmp_path / "big.npz") as file:
        assert (file["arr_0"][:, 0, 0, 0] == np.arange(1000) // 10).all()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([images(3)], "arr_0 must have 4 rows, got 3"),
        ([images(4, 7)], "rows that are uint8 of shape \\(8, 6, 3\\), got uint8 of shape \\(7, 6, 3\\)"),
        ([images(4).astype(np.float32)], "uint8 of shape .*, got float32"),
    ],
)
def test_wrong_parts_leave_no_npz(blocks: list[np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        output.save_npz(tmp_path / "bad.npz", {"arr_0": ((4, 8, 6, 3), np.uint8, blocks)}, "")
    assert os.listdir(tmp_path) == []


def test_an_array_comes_back_or_is_refused(tmp_path: Path) -> None:
    array, path = images(5), tmp_path / "batch.npy"
    output.save_array(array, path)
    assert np.array_equal(output.load_array(path, array.shape, np.uint8), array)
    with pytest.raises(ValueError, match="must hold uint8 of shape \\(4, 8, 6, 3\\), got .*\\(5, 8, 6, 3\\)"):
        output.load_array(path, (4, 8, 6, 3), np.uint8)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="batch.npy is damaged"):
        output.load_array(path, array.shape, np.uint8)


def test_a_png_holds_the_pixels_and_what_it_shows(tmp_path: Path) -> None:
    image = images(1)[0]
    output.save_png(image, tmp_path / "image.png", {"class": "207 golden retriever"})
    assert np.array_equal(output.load_png(tmp_path / "image.png"), image)
    with Image.open(tmp_path / "image.png") as png:
        assert png.info["class"] == "207 golden retriever"


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (5, 3, 2), (64, 8, 8)])
def test_the_grid_shows_every_image_above_its_caption(count: int, columns: int, rows: int, tmp_path: Path) -> None:
    pictures = images(count, 128, 128)
    captions = [f"{index} na\u00efve {'x' * 80}" for index in range(count)]
    output.save_grid(list(pictures), captions, tmp_path / "grid.png")
    grid = output.load_png(tmp_path / "grid.png")
    step = (128 + output._CAPTION + output._GAP, 128 + output._GAP)
    assert grid.shape == (rows * step[0] + output._GAP, columns * step[1] + output._GAP, 3)
    for index, image in enumerate(pictures):
        y, x = index // columns * step[0] + output._GAP, index % columns * step[1] + output._GAP
        assert np.array_equal(grid[y : y + 128, x : x + 128], image)
        caption = grid[y + 128 : y + 128 + output._CAPTION, x : x + 128]
        assert caption.min() < 100 < caption.mean()  # dark letters on white
        # and none beyond the image's width
        assert (grid[y : y + step[0] - 1, x + 128 : x + step[1] - 1] == 255).all()


def test_small_images_are_enlarged(tmp_path: Path) -> None:
    output.save_grid([images(1)[0]], ["0"], tmp_path / "grid.png")
    grid = output.load_png(tmp_path / "grid.png")
    gap = output._GAP
    assert np.array_equal(grid[gap : gap + 128 : 16, gap : gap + 96 : 16], images(1)[0])


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    npz = tmp_path / "x[1].npz"  # no pattern
    folder = RunFolder(None, npz, [Batch(0, 0, 1)], Rows((2,), np.float32), {"seed": 0})
    folder.claim()
    folder.release()
    left = [npz.with_name(".x[1].npz.0123abcd.part"), folder.folder / ".settings.json.0123abcd.part"]
    other = npz.with_name(".x1.npz.0123abcd.part")
    for path in (*left, other):
        path.touch()
    folder.claim()
    folder.release()
    assert not any(path.exists() for path in left) and other.exists()
    (folder.folder / "settings.json").unlink()  # killed before any image was written
    left[1].touch()
    folder.claim()
    folder.release()
    assert not left[1].exists()
