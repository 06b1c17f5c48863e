"""Arguments that are gone: refused by name, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping


def refuse_gone(function: str, given: Mapping[str, object], gone: Mapping[str, str]) -> None:
    """Raises where a function was given keywords that it has no parameters for.

    Args:
        function: its name.
        given: those keywords.
        gone: the names that it once took, with what to do instead.

    Raises:
        TypeError: there are any; what is not in ``gone`` as Python refuses it.
    """
    for name in given:
        if name in gone:
            raise TypeError(f"{function} takes no {name} any more: {gone[name]}")
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
