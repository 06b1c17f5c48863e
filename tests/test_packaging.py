"""The distribution: built from a copy of the checkout, installed into a clean environment, and run from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import ditfast

ROOMS = ("kernels", "bench")
# data files of both rooms, added to the copy so that the mapping is tried whether or not the real ones exist yet
STAND_IN_DATA = {"kernels/configs/stand-in.json": '{"from": "kernels"}', "bench/stand-in.json": '{"from": "bench"}'}


@dataclass(frozen=True)
class Built:
    """An sdist, the wheel built from it, and the wheel built from the checkout directly."""

    sdist: Path
    wheel: Path
    direct_wheel: Path


@dataclass(frozen=True)
class Environment:
    """A clean virtual environment that holds ditfast's wheel and reaches the dependencies of this one."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        paths = {"base": str(self.folder), "platbase": str(self.folder)}
        return Path(sysconfig.get_path("purelib", "nt" if os.name == "nt" else "posix_prefix", paths))

    def script(self, name: str) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin") / name

    def run(self, *arguments: str, cwd: Path, program: str = "python") -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHOME")}
        return _run(str(self.script(program)), *arguments, cwd=cwd, env=environment)


def _run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


def _install(wheel: Path, into: Environment) -> None:
    pip = (sys.executable, "-m", "pip", "--python", str(into.script("python")))
    # a ditfast installed beside the dependencies is none of this environment's
    options = ("--quiet", "--no-deps", "--no-index", "--ignore-installed")
    _run(*pip, "install", *options, str(wheel), cwd=wheel.parent)


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    for name, text in STAND_IN_DATA.items():
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text(text)
    folder = tmp_path_factory.mktemp("built")
    build = (sys.executable, "-m", "build", "--no-isolation", str(checkout))
    # without --wheel, build makes the wheel from the sdist it has just made
    _run(*build, "--outdir", str(folder / "sdist"), cwd=folder)
    _run(*build, "--outdir", str(folder / "direct"), "--wheel", cwd=folder)
    (sdist,), (wheel,), (direct,) = (
        list((folder / place).glob(pattern))
        for place, pattern in (("sdist", "*.tar.gz"), ("sdist", "*.whl"), ("direct", "*.whl"))
    )
    return Built(sdist, wheel, direct)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("venv"))
    venv.create(environment.folder, with_pip=False, symlinks=os.name != "nt")
    # a path in a .pth file is searched last, and .pth files of its own (an editable ditfast) are not read
    dependencies = "\n".join(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))
    (environment.site_packages / "dependencies.pth").write_text(dependencies + "\n")
    _install(built.wheel, environment)
    return environment


def test_both_wheels_hold_the_same_files(built: Built) -> None:
    assert _names(built.wheel) == _names(built.direct_wheel)


def test_the_wheel_holds_every_module_once_and_nothing_else(built: Built, source_files: list[Path]) -> None:
    modules = set()
    for path in source_files:
        if path.suffix == ".py" and path.parts[0] in ("ditfast", *ROOMS) and not _is_bench_test(path):
            modules.add(path.as_posix() if path.parts[0] == "ditfast" else f"ditfast/{path.as_posix()}")
    names = _names(built.wheel)
    assert {name for name in names if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in names} == {"ditfast", f"ditfast-{ditfast.__version__}.dist-info"}


def test_the_tests_of_bench_are_in_the_sdist_and_in_no_wheel(built: Built, source_files: list[Path]) -> None:
    tests = {path.as_posix() for path in source_files if _is_bench_test(path)}
    assert {"bench/conftest.py", "bench/test_operator_overhead.py"} <= tests
    with tarfile.open(built.sdist) as sdist:
        assert tests <= {name.partition("/")[2] for name in sdist.getnames()}
    for wheel in (built.wheel, built.direct_wheel):
        inside = {name.removeprefix("ditfast/") for name in _names(wheel)}
        assert not {name for name in inside if _is_bench_test(Path(name))}


def test_the_wheel_holds_data_license_and_type_marker(built: Built) -> None:
    names = _names(built.wheel)
    files = ("py.typed", "sampling/imagenet.txt", "kernels/rehearsal/stub.c")
    assert {f"ditfast/{name}" for name in files} <= names
    assert {f"ditfast/{name}" for name in STAND_IN_DATA} <= names
    (license_name,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
    with zipfile.ZipFile(built.wheel) as wheel:
        assert "Apache License" in wheel.read(license_name).decode()


def test_the_metadata_states_the_dependencies(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(name).decode().split("\n\n")[0].splitlines()
    fields = [line.partition(": ")[::2] for line in lines]
    requires = [value for field, value in fields if field == "Requires-Dist"]
    base = [value for value in requires if "extra ==" not in value]
    assert base == [
        "torch>=2.9", 'triton>=3.6; platform_system == "Linux"', "numpy", "safetensors", "typer", "rich",
    ]  # fmt: skip
    extras = {value for field, value in fields if field == "Provides-Extra"}
    assert extras == {"flash", "diffusers", "bench", "evaluate", "train", "dev"}
    assert ("Requires-Python", ">=3.10") in fields
    assert ("License-Expression", "Apache-2.0") in fields


def test_the_sdist_holds_no_second_copy_of_the_rooms(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert not {name for name in names if name.startswith(("ditfast/kernels", "ditfast/bench"))}
    assert {"ditfast/parity.py", "LICENSE", "constraints.txt", "Makefile", "tests/conftest.py"} <= names
    # what the README links
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "docs/numerics.md", "bench/results/traced-cost.json"} <= names


def test_the_rooms_import_from_the_wheel(installed: Environment, tmp_path: Path) -> None:
    script = (
        "import json, importlib.resources as r, ditfast, ditfast.kernels, ditfast.bench, ditfast.bench.options as o; "
        "read = lambda package, name: json.loads(r.files(package).joinpath(name).read_text())['from']; "
        "print(json.dumps([ditfast.__file__, o.__file__, "
        "read('ditfast.kernels', 'configs/stand-in.json'), read('ditfast.bench', 'stand-in.json')]))"
    )
    face, options, *data = json.loads(installed.run("-c", script, cwd=tmp_path))
    assert Path(face) == installed.site_packages / "ditfast" / "__init__.py"
    assert Path(options) == installed.site_packages / "ditfast" / "bench" / "options.py"
    assert data == ["kernels", "bench"]


def test_a_rehearsal_runs_from_the_wheel(installed: Environment, tmp_path: Path) -> None:
    """Its stub is built from the file that was installed with it."""
    pytest.importorskip("triton", reason="needs the package triton")
    from ditfast.kernels.rehearsal import driver

    if shutil.which("gcc") is None or driver._has_driver():
        pytest.skip("needs gcc, and no NVIDIA driver")
    script = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, ditfast\n"
        "from ditfast.kernels.rehearsal import driver, rehearse\n"
        "with rehearse('sm_90') as seen:\n"
        "    x = torch.empty(2, 16, 64)\n"
        "    ditfast.ops.gated_residual(x, x, x[:, 0])\n"
        "print(driver.__file__, seen.launches)"
    )
    file, launches = installed.run("-c", script, cwd=tmp_path).split()
    assert Path(file) == installed.site_packages / "ditfast" / "kernels" / "rehearsal" / "driver.py"
    assert launches == "1"


@pytest.mark.parametrize("room", ROOMS)
def test_an_installed_distribution_of_that_name_wins_over_the_folder(
    room: str, installed: Environment, checkout: Path, tmp_path: Path
) -> None:
    _install(_stand_in(room, tmp_path), installed)
    script = (
        f"import json, {room}, ditfast, ditfast.{room}; "
        f"print(json.dumps([{room}.__file__, {room}.WHO, ditfast.__file__, list(ditfast.{room}.__path__)]))"
    )
    # the working directory comes first on the path of "python -c", so this is the case that could go wrong
    file, who, face, room_path = json.loads(installed.run("-c", script, cwd=checkout))
    assert Path(file) == installed.site_packages / room / "__init__.py"
    assert who == "stand-in"
    assert Path(face) == checkout / "ditfast" / "__init__.py"
    assert [Path(path) for path in room_path] == [checkout / "ditfast" / room]


def test_the_command_is_the_module(installed: Environment, tmp_path: Path) -> None:
    for arguments in (["--version"], ["convert", "--help"]):
        by_script = installed.run(*arguments, cwd=tmp_path, program="ditfast")
        assert by_script == installed.run("-m", "ditfast", *arguments, cwd=tmp_path)
        assert "ditfast" in by_script


def test_the_module_runs_from_a_checkout_without_installing(checkout: Path, tmp_path: Path) -> None:
    bare = Environment(tmp_path / "venv")
    venv.create(bare.folder, with_pip=False, symlinks=os.name != "nt")
    (bare.site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert bare.run("-m", "ditfast", "--version", cwd=checkout) == f"ditfast {ditfast.__version__}"


def _is_bench_test(path: Path) -> bool:
    """Whether a path of the checkout is one of bench/'s files for pytest."""
    return path.parts[0] == "bench" and (path.name == "conftest.py" or path.match("test_*.py"))


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    return set(names)


def _stand_in(name: str, folder: Path) -> Path:
    """A wheel of a distribution ``name`` with one package of that name."""
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/__init__.py", 'WHO = "stand-in"\n')
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel
