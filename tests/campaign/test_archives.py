"""Archives and carried Triton caches, without compiling anything; what is compiled ahead: test_warm.py."""

import io
import json
import lzma
import os
import random
import shutil
import sysconfig
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ditfast.bench.cases import transforms
from ditfast.bench.warm import kernel_cache
from ditfast.bench.warm.archives import extract, read_archive, write_archive, write_archives
from ditfast.cli.command import app
from ditfast.environment import cache_folder

SO = sysconfig.get_config_var("EXT_SUFFIX")
NAMES = ("triton", "build", "python", "platform", "ptxas")
HERE = dict.fromkeys(NAMES, "1") | {"variables": {}, "sources": {"_a_kernel": "a", "_b_kernel": "b"}}


def write_files(folder, **sizes):
    """Files of bytes that no compressor makes smaller, as (name, path)."""
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        (folder / name).write_bytes(random.Random(name).randbytes(size))
    return [(f"in/{name}", folder / name) for name in sizes]


def contents(files):
    return {name: path.read_bytes() for name, path in files}


def test_the_same_bytes_for_the_same_files(tmp_path):
    files = write_files(tmp_path / "files", a=5000, b=0, c=513)
    size = write_archive(files, tmp_path / "one.tar.xz")
    os.utime(files[0][1], (5, 5))
    files[1][1].chmod(0o600)
    write_archive(reversed(files), tmp_path / "two.tar.xz")
    one = (tmp_path / "one.tar.xz").read_bytes()
    assert one == (tmp_path / "two.tar.xz").read_bytes() and len(one) == size
    with tarfile.open(tmp_path / "one.tar.xz", "r:xz") as tar:  # as everybody reads it
        assert [(item.name, item.mtime, item.uid, item.uname) for item in tar] == [
            (f"in/{name}", 0, 0, "") for name in "abc"
        ]
    extracted = extract(tmp_path / "one.tar.xz", tmp_path / "out")
    assert {f"in/{path.name}": path.read_bytes() for path in extracted} == contents(files)
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == extracted


@pytest.mark.parametrize("name", ["/etc/a", "../a", "in/../../a", ""])
def test_names_that_leave_their_folder_are_not_packed(name, tmp_path):
    [(_, path)] = write_files(tmp_path / "files", a=3)
    with pytest.raises(ValueError, match="must be relative and without '..'"):
        write_archive([(name, path)], tmp_path / "a.tar.xz")


def test_bad_files_and_names_are_not_packed(tmp_path):
    files = write_files(tmp_path / "files", a=3, b=4)
    with pytest.raises(ValueError, match=r"must be a .tar.xz file, got .*a.tar.gz"):
        write_archive(files, tmp_path / "a.tar.gz")
    with pytest.raises(ValueError, match="names in an archive must differ, got 'in/a' twice"):
        write_archive([*files, ("in/a", files[1][1])], tmp_path / "a.tar.xz")
    write_archive(files, tmp_path / "a.tar.xz")
    before = (tmp_path / "a.tar.xz").read_bytes()
    with pytest.raises(FileNotFoundError):
        write_archive([*files, ("in/c", tmp_path / "absent")], tmp_path / "a.tar.xz")
    assert (tmp_path / "a.tar.xz").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.xz", "files"]


def test_as_many_archives_as_the_limit_asks_for(tmp_path):
    files = write_files(tmp_path / "files", **{f"f{index:02}": 3000 for index in range(20)})
    out = tmp_path / "out"
    out.mkdir()
    for name in ("cache-notes.tar.xz", "other.tar.xz"):
        (out / name).write_bytes(b"another's")
    many = write_archives(files, out, "cache", limit=10_000)
    assert [path.name for path in many] == [f"cache-{number}.tar.xz" for number in range(1, len(many) + 1)]
    assert len(many) == 7  # three of 3,000 bytes in each
    assert all(path.stat().st_size < 10_000 for path in many)
    assert {name: data for path in many for name, data in read_archive(path)} == contents(files)
    few = write_archives(files[:5], out, "cache", limit=10_000)
    assert [path.name for path in few] == ["cache-1.tar.xz", "cache-2.tar.xz"]
    [one] = write_archives(files, out, "cache")
    assert one.name == "cache.tar.xz" and dict(read_archive(one)) == contents(files)
    assert sorted(path.name for path in out.iterdir()) == ["cache-notes.tar.xz", "cache.tar.xz", "other.tar.xz"]
    assert write_archives([], out, "cache") == [] and not one.exists()


def test_a_file_above_the_limit_is_left_out_and_named(tmp_path):
    files = write_files(tmp_path / "files", a=100, huge=20_000, z=100)
    note = tmp_path / "cache.left-out.txt"
    with pytest.warns(UserWarning, match="1 files are above 10000 bytes, and in no archive"):
        [archive] = write_archives(files, tmp_path, "cache", limit=10_000)
    assert [name for name, _ in read_archive(archive)] == ["in/a", "in/z"]
    assert note.read_text() == "in/huge: 20000 bytes\n"
    write_archives(files[:1], tmp_path, "cache", limit=10_000)
    assert not note.exists()


def test_a_damaged_archive_leaves_nothing(tmp_path):
    files = write_files(tmp_path / "files", a=3000, b=5000)
    archive, out = tmp_path / "cache.tar.xz", tmp_path / "out"
    write_archive(files, archive)
    whole = archive.read_bytes()
    decompressor = lzma.LZMADecompressor()
    decompressor.decompress(whole)
    first = len(whole) - len(decompressor.unused_data)  # of its streams
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for data in (b"", b"no archive", whole[:-1], whole[:middle], whole[:first], flipped, whole + b"more"):
        archive.write_bytes(data)
        with pytest.raises(ValueError, match=r"cache.tar.xz is damaged, or no .tar.xz archive"):
            extract(archive, out)
    assert not out.exists()


def hostile(name, kind=tarfile.REGTYPE, target=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        tar.addfile(tarfile.TarInfo("harmless"))
        tar.addfile(entry)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        hostile("../escaped"),
        hostile("/tmp/ditfast-escaped"),
        hostile("in/../../escaped"),
        hostile("link", tarfile.SYMTYPE, "/etc/passwd"),
        hostile("link", tarfile.LNKTYPE, "harmless"),
        hostile("pipe", tarfile.FIFOTYPE),
    ],
    ids=["parent", "absolute", "hidden parent", "symbolic link", "hard link", "pipe"],
)
def test_an_archive_writes_nothing_outside_its_folder(archive, tmp_path):
    (tmp_path / "a.tar.xz").write_bytes(archive)
    with pytest.raises(ValueError, match=r"a.tar.xz: '.*' is no file within the folder"):
        extract(tmp_path / "a.tar.xz", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.xz"]


def test_a_link_in_the_folder_leads_nowhere(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "in").symlink_to(tmp_path / "outside")
    write_archive(write_files(tmp_path / "files", a=3), tmp_path / "a.tar.xz")
    with pytest.raises(ValueError, match="'in/a' would be written outside"):
        extract(tmp_path / "a.tar.xz", tmp_path / "out")
    assert not list((tmp_path / "outside").iterdir())


def make_cache(cache, names=("_adaln_fwd_kernel", "_gemm_kernel")):
    """A cache as Triton leaves it, with files that no launch needs."""
    for number, name in enumerate(names):
        folder = cache / f"K{number}"
        (folder / "tmp.pid_1_2").mkdir(parents=True)
        (folder / "tmp.pid_1_2" / f"{name}.cubin").write_bytes(b"half")
        files = [f"{name}.{kind}" for kind in ("source", "ttir", "ptx", "cubin", "json")]
        for file in files:
            (folder / file).write_text(f"{file} of {number}")
        group = {"child_paths": {file: str(folder / file) for file in files}}
        (folder / f"__grp__{name}.json").write_text(json.dumps(group))
    (cache / "L0").mkdir()
    (cache / "L0" / f"__triton_launcher{SO}").write_bytes(b"launcher")
    (cache / "L0" / "__triton_launcher.cpython-39-x86_64-linux-gnu.so").write_bytes(b"another Python's")
    (cache / "L0" / "lock").write_text("")
    return cache


def groups(cache):
    return {path.name: json.loads(path.read_text())["child_paths"] for path in sorted(cache.glob("*/__grp__*"))}


def test_which_files_of_a_cache_are_carried(tmp_path):
    cache = make_cache(tmp_path / "cache")
    assert [name for name, _ in kernel_cache.kernel_files(cache)] == [
        "K0/__grp___adaln_fwd_kernel.json", "K0/_adaln_fwd_kernel.cubin", "K0/_adaln_fwd_kernel.json",
        "K1/__grp___gemm_kernel.json", "K1/_gemm_kernel.cubin", "K1/_gemm_kernel.json",
        f"L0/__triton_launcher{SO}",
    ]  # fmt: skip
    assert [name.partition("/")[0] for name, _ in kernel_cache.kernel_files(cache, {"K1"})] == ["K1"] * 3 + ["L0"]


@pytest.mark.parametrize("form", ["archive", "folder of archives", "copied cache"])
def test_a_cache_at_another_path(form, tmp_path):
    """The groups name the files at their new paths, and no others."""
    cache, unpacked = make_cache(tmp_path / "cache"), tmp_path / "there"
    source = tmp_path / "parts"
    source.mkdir()
    if form == "archive":
        source = source / "a.tar.xz"
        assert kernel_cache.pack(cache, source) == source.stat().st_size
    elif form == "folder of archives":
        limit = max(write_archive([file], tmp_path / "a.tar.xz") for file in kernel_cache.kernel_files(cache)) + 1
        assert len(write_archives(kernel_cache.kernel_files(cache), source, "cache", limit)) > 1
    else:
        source = cache.rename(tmp_path / "copied")
    assert kernel_cache.unpack(source, unpacked) == 2
    files = [f"{name}.{kind}" for name in ("_adaln_fwd_kernel", "_gemm_kernel") for kind in ("cubin", "json")]
    assert groups(unpacked) == {
        f"__grp__{name}.json": {file: str(unpacked / folder / file) for file in files if name in file}
        for folder, name in (("K0", "_adaln_fwd_kernel"), ("K1", "_gemm_kernel"))
    }
    assert (unpacked / "K1" / "_gemm_kernel.cubin").read_text() == "_gemm_kernel.cubin of 1"
    assert (unpacked / "L0" / f"__triton_launcher{SO}").exists()
    if form != "copied cache":  # moved as a whole, it is mended in place
        moved = unpacked.rename(tmp_path / "moved")
        assert kernel_cache.unpack(moved, moved) == 2
        assert {Path(path).parents[1] for group in groups(moved).values() for path in group.values()} == {moved}


def test_an_incomplete_kernel_is_left_out(tmp_path):
    """Triton would take its group for a hit, and fail."""
    cache = make_cache(tmp_path / "cache")
    (cache / "K0" / "_adaln_fwd_kernel.cubin").unlink()
    (cache / "K1" / "__grp___gemm_kernel.json").write_text("{")
    kernel_cache.pack(cache, tmp_path / "a.tar.xz")
    with pytest.raises(ValueError, match=r"a.tar.xz must hold compiled kernels, got none"):
        kernel_cache.unpack(tmp_path / "a.tar.xz", tmp_path / "there")
    assert groups(tmp_path / "there") == {}
    with pytest.raises(ValueError, match="empty must hold compiled kernels, got none"):
        (tmp_path / "empty").mkdir()
        kernel_cache.unpack(tmp_path / "empty", tmp_path / "there")


def manifest(architecture="sm_90", label="a model", folder="K0", **other):
    entry = {"warmed": [label], "kernels": [folder]}
    return {"schema": kernel_cache.SCHEMA, "identity": HERE | other, "architectures": {architecture: entry}}


def test_manifests_add_up_while_nothing_changes():
    merged = kernel_cache.merged(manifest(), manifest(label="verify", folder="K1"))
    assert merged["architectures"] == {"sm_90": {"warmed": ["a model", "verify"], "kernels": ["K0", "K1"]}}
    assert list(kernel_cache.merged(merged, manifest("sm_80"))["architectures"]) == ["sm_90", "sm_80"]
    other = manifest("sm_80", triton="2")
    assert kernel_cache.merged(merged, other) == kernel_cache.merged(None, other) == other


def test_manifests_of_several_archives_add_up_without_damaged_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_identity", lambda: HERE)
    archives = []
    for arch, content in (
        ("sm_90", json.dumps(manifest("sm_90"))),
        ("sm_80", json.dumps(manifest("sm_80"))),
        ("bad", json.dumps({"schema": kernel_cache.SCHEMA})),
        ("list", "[]"),
        ("misfit", json.dumps(manifest("sm_120", triton="0"))),
    ):
        cache = make_cache(tmp_path / arch, ("_adaln_fwd_kernel",))
        (cache / kernel_cache.MANIFEST).write_text(content)
        archives.append(tmp_path / f"{arch}.tar.xz")
        kernel_cache.pack(cache, archives[-1])
    kernel_cache.unpack(archives, tmp_path / "there")
    merged = kernel_cache.read_manifest(tmp_path / "there")
    assert merged is not None and list(merged["architectures"]) == ["sm_90", "sm_80"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({}, ""),
        ({"triton": "2"}, "made with triton 2, and here is 1"),
        ({"python": "3.9"}, "made with Python 3.9, and here is 1"),
        ({"platform": "win"}, "made with the platform win, and here is 1"),
        ({"build": "2"}, "made with another build of triton 1"),
        ({"ptxas": "V1"}, "made with ptxas V1, and here is 1 (TRITON_PTXAS_PATH)"),
        ({"variables": {"DISABLE_LLVM_OPT": "1"}}, "made with other values of DISABLE_LLVM_OPT"),
        ({"sources": {"_a_kernel": "a", "_b_kernel": "c"}}, "1 of 2 kernels have changed: _b_kernel"),
        ({"sources": {}}, "2 of 2 kernels have changed: _a_kernel, _b_kernel"),
    ],
)
def test_why_a_cache_does_not_fit(other, reason, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_identity", lambda: HERE)
    assert kernel_cache.fits(manifest(**other)) == reason


def test_another_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(kernel_cache, "_identity", lambda: HERE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert kernel_cache.fits(manifest("sm_90")) == "made for sm_90, and the GPU is sm_80"
    assert kernel_cache.fits(manifest("sm_80")) == ""


def test_commands_of_a_carried_cache(tmp_path, monkeypatch):
    """warm --unpack and info, neither of which needs a compiler or a GPU."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(kernel_cache, "_identity", lambda: HERE)
    cache, unpacked = make_cache(tmp_path / "cache", ("_adaln_fwd_kernel", "_anothers_kernel")), tmp_path / "there"
    (cache / kernel_cache.MANIFEST).write_text(json.dumps(manifest(triton="0")))
    kernel_cache.pack(cache, tmp_path / "a.tar.xz")
    result = CliRunner().invoke(app, ["warm", "--unpack", str(tmp_path / "a.tar.xz"), "--cache", str(unpacked)])
    assert (result.exit_code, result.stdout) == (0, f"{unpacked}: 2 kernels from {tmp_path / 'a.tar.xz'}\n")
    assert result.stderr == "not all of them are taken here: made with triton 0, and here is 1\n"
    info = CliRunner().invoke(app, ["info", "--json", "--cache", str(unpacked)])
    assert json.loads(info.stdout)["kernel_cache"] == {
        "folder": str(unpacked),
        "kernels": 1,  # of ditfast
        "warmed": {"sm_90": ["a model"]},
        "missing": 0,
        "misfit": "made with triton 0, and here is 1",
    }
    monkeypatch.setenv("TRITON_CACHE_DIR", str(unpacked))
    lines = CliRunner().invoke(app, ["info"]).stdout.splitlines()[-3:]
    assert lines == [
        f"  {unpacked}: 1 compiled kernels of ditfast",
        "  compiled ahead for sm_90: a model",
        "  not all of which are taken here: made with triton 0, and here is 1",
    ]
    shutil.rmtree(unpacked / "K0")
    assert CliRunner().invoke(app, ["info"]).stdout.splitlines()[-1] == "  but 1 of them are missing"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache / "absent"))
    assert json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)["kernel_cache"]["misfit"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--arch must be one of sm_80, .*, got none"),
        (["--arch", "sm_70"], "--arch must be one of .*, got sm_70"),
        (["--arch", "sm_90", "--for", "verify,tun"], "--for must be one of verify, bench, tune, got 'tun'"),
        (["--arch", "sm_90", "--mode", ","], "--mode must name at least one mode, got ','"),
        (["--arch", "sm_90", "--model", "DiT-XL/3"], "got 'DiT-XL/3'; did you mean"),
        (["--arch", "sm_90", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--arch", "sm_90", "--archive", "a.tar"], "--archive must be a .tar.xz file"),
        (["--arch", "sm_90", "--archive", "absent/a.tar.xz"], "--archive must be a .tar.xz file in a folder"),
        (["--arch", "sm_90", "--unpack", "a.tar.xz"], "--unpack compiles nothing"),
        (["--mode", "cfg", "--unpack", "a.tar.xz"], "--unpack compiles nothing"),
        (["--unpack", "absent.tar.xz"], "absent.tar.xz: No such file"),
    ],
)
def test_bad_options_of_warm(options, message, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["warm", *options])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr)


def test_torch_compile_leaves_triton_its_cache(monkeypatch):
    """Without a chosen folder Inductor points Triton elsewhere, for all later kernels of the process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    usual = cache_folder()
    transforms.compiled(lambda inputs: inputs[0])
    assert os.environ["TRITON_CACHE_DIR"] == str(usual)
