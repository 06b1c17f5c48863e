"""Packages that need torchvision for images alone, imported also where it cannot be had.

The torchvision on PyPI for Linux is CUDA's, which cannot be imported beside a CPU's torch. So `make env` installs
timm and torch-fidelity without their requirements, and here stand-ins take its place while they are imported.
"""

import importlib
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import pytest


class _Names(type):
    """A class every attribute of which is its own name: InterpolationMode's members are keys of a table."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _Finder:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def imported(package):
    """The package, or a skip with the reason."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package} (make env installs it)", allow_module_level=True)
    if importlib.util.find_spec("torchvision") is not None:
        try:
            return importlib.import_module(package)
        except RuntimeError as error:  # its operators are not this torch's
            pytest.skip(f"{package} cannot be imported with this torchvision: {error}", allow_module_level=True)
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(package)
    finally:
        # nobody else is to find it
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
