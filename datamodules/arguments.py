"""Validation of the arguments of datamodules."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def whole(name: str, value: SupportsIndex, least: int | None = None) -> int:
    """Return an option as an int.

    Raises:
        MisconfigurationException: If it is not an integer (a bool is not), or is less than ``least``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise MisconfigurationException(f"{name} must be an integer; got {value!r}.")
    if least is not None and number < least:
        raise MisconfigurationException(f"{name} must be at least {least}; got {number}.")
    return number


def distinct(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple.

    Raises:
        MisconfigurationException: If there are none, two are equal, or they are a single string.
    """
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise MisconfigurationException(f"{what} must be a list of one or several different names; got {names!r}.")
    return tuple(names)


def index_of(value: int | str, names: Sequence[str], what: str) -> int:
    """Return the index of an item given by its index or name.

    Raises:
        MisconfigurationException: If there is no such item.
    """
    if isinstance(value, str):
        if value in names:
            return names.index(value)
    elif not isinstance(value, bool) and 0 <= operator.index(value) < len(names):
        return operator.index(value)
    raise MisconfigurationException(
        f"There is no {what} {value!r}; choose one of {', '.join(map(repr, names))} (or 0 to {len(names) - 1})."
    )
