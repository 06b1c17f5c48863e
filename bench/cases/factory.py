"""A user's own model by ``PATH:FACTORY``: a function that makes it, in a .py file or a module."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .providers import load_file


def make_model(spec: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """(model, inputs): what the factory returns, a module alone or with a tuple of its example inputs.

    Args:
        spec: "folder/file.py:make_model" or "package.module:make_model"; called without arguments.

    Raises:
        ValueError: no such file, module or function, or it fails; names ``spec``.
        TypeError: it returns something else.
    """
    path, _, name = spec.rpartition(":")
    if not path or not name:
        raise ValueError(f"a factory must look like PATH:FACTORY, such as my_model.py:make, got {spec!r}")
    _find_neighbours(path)
    try:
        module = load_file(Path(path).resolve()) if path.endswith(".py") else importlib.import_module(path)
        factory = getattr(module, name)
    except Exception as error:  # whatever a user's file raises
        raise ValueError(f"{spec} cannot be loaded: {type(error).__name__}: {error}") from error
    try:
        result = factory()
    except Exception as error:
        raise ValueError(f"{spec} failed: {type(error).__name__}: {error}") from error
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, ())
    if not isinstance(model, nn.Module):
        raise TypeError(f"{spec} must return a torch.nn.Module, or one and its inputs, got {type(result).__name__}")
    return model, (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def _find_neighbours(path: str) -> None:
    """Has a user's file find what lies beside it, and a module itself, as ``python file.py`` and ``python -m`` do."""
    folder = Path(path).resolve().parent if path.endswith(".py") else Path.cwd()
    for position, entry in ((0, str(folder)), (len(sys.path) + 1, str(Path.cwd()))):
        if entry not in sys.path:
            sys.path.insert(position, entry)
