"""What arguments of datamodules have to be."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def whole(name: str, value: SupportsIndex, least: int | None = None) -> int:
    """The value of an option that must be a whole number.

    Raises:
        MisconfigurationException: If it is none, or less than ``least``. True and False are none.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise MisconfigurationException(f"{name} must be a whole number; got {value!r}.")
    if least is not None and number < least:
        raise MisconfigurationException(f"{name} must be at least {least}; got {number}.")
    return number


def distinct(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names that tell things apart: of two that are the same, the second would never be found.

    Raises:
        MisconfigurationException: If there is none, one is there twice, or they are a single text.
    """
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise MisconfigurationException(f"{what} must be a list of names, at least one, each once; got {names!r}.")
    return tuple(names)


def index_of(value: int | str, names: Sequence[str], what: str) -> int:
    """The number, from 0, of what is given by its number or name.

    Raises:
        MisconfigurationException: If there is none.
    """
    if isinstance(value, str):
        if value in names:
            return names.index(value)
    elif not isinstance(value, bool) and 0 <= operator.index(value) < len(names):
        return operator.index(value)
    raise MisconfigurationException(
        f"There is no {what} {value!r}; there are {', '.join(map(repr, names))} (or 0 to {len(names) - 1})."
    )
