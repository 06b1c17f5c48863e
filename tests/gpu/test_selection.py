"""`pytest -m gpu`: what it selects, and that its tests need no package that a GPU machine may lack."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import _is_for

TESTS = Path(__file__).parents[1]
# the module compares samplers with diffusers', so its GPU test is skipped with it
NEEDS_DIFFUSERS = {"inference/test_samplers.py"}
MISSING = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        packages = ("diffusers", "flash_attn", "peft", "pytest_benchmark", "timm", "torch_fidelity")
        return None if name.partition(".")[0] in packages else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("expression", "session"),
    [
        ("", None),
        ("gpu", "gpu"),
        ("gpu and not subprocess", "gpu"),
        ("rehearsal", "rehearsal"),
        ("rehearsal and not compiler", "rehearsal"),
        ("not gpu", None),
        ("not kernels", None),
        ("kernels", None),
        ("gpu or kernels", None),
        ("rehearsal or kernels", None),
        ("not subprocess", None),
    ],
)
def test_what_a_session_is_for(expression, session):
    selected = [tests for tests in ("gpu", "rehearsal") if _is_for(tests, expression)]
    assert selected == ([] if session is None else [session])


@pytest.mark.long
@pytest.mark.subprocess
def test_gpu_tests_are_collected_without_optional_packages(tmp_path):
    (tmp_path / "missing_packages.py").write_text(MISSING)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "missing_packages"]
    listing = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *plugins, str(TESTS)],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert listing.returncode == 0, listing.stdout[-2000:]
    collected = set(re.findall(r"tests/([\w/]*test_\w+\.py)::", listing.stdout))
    mark = re.compile(r"^(pytestmark = |@)pytest\.mark\.gpu$", re.M)
    marked = {
        str(file.relative_to(TESTS)) for file in TESTS.rglob("test_*.py") if mark.search(file.read_text())
    }
    assert collected == marked - NEEDS_DIFFUSERS
