"""Arguments that functions no longer take: refused by name, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping


def refuse_gone(function: str, arguments: Mapping[str, object], gone: Mapping[str, str]) -> None:
    """Raises where a function was given keyword arguments that it does not take.

    Args:
        function: its name.
        arguments: what it took as ``**gone``.
        gone: the arguments that it once took, each with what to do instead.

    Raises:
        TypeError: there is one; in Python's words where it was never taken.
    """
    for name in arguments:
        if name in gone:
            raise TypeError(f"{function} takes no {name} any more: {gone[name]}")
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
