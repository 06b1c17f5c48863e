"""The packages of ditfast: ``kernels/`` and ``bench/`` lie at the top and are installed inside ``ditfast``.

In a checkout the same names resolve through the committed symlinks ``ditfast/kernels`` and ``ditfast/bench``.
Everything else about the distribution is in pyproject.toml.
"""

from __future__ import annotations

from fnmatch import fnmatch

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

MAPPED = ("kernels", "bench")
# pytest's files in bench/: of the checkout and the sdist (MANIFEST.in), not of the installed package
TESTS = ("test_*.py", "conftest.py")


class BuildWithoutTests(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [item for item in found if not any(fnmatch(f"{item[1]}.py", pattern) for pattern in TESTS)]


packages = find_packages(
    include=["ditfast", "ditfast.*"],
    # reached through the symlinks they would be packaged twice
    exclude=[pattern for room in MAPPED for pattern in (f"ditfast.{room}", f"ditfast.{room}.*")],
)
for room in MAPPED:
    # named outright: without an __init__.py at its top (so that the PyPI package "kernels" wins over the
    # folder when the working directory is the checkout) find_packages does not see it
    packages += [f"ditfast.{room}", *(f"ditfast.{room}.{name}" for name in find_packages(room))]

setup(
    packages=packages,
    cmdclass={"build_py": BuildWithoutTests},
    package_dir={"ditfast": "ditfast", **{f"ditfast.{room}": room for room in MAPPED}},
    package_data={
        "ditfast": ["py.typed"],
        "ditfast.sampling": ["imagenet.txt"],
        "ditfast.kernels": ["README.md"],
        "ditfast.kernels.configs": ["*.json"],
        "ditfast.kernels.rehearsal": ["stub.c"],
        "ditfast.bench": ["*.json", "results/*.json"],
    },
)
