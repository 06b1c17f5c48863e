"""The command ``ditfast``."""

from .command import main

__all__ = ["main"]
