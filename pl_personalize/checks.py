"""Checks of options."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import inf
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_option(option: str, value: Any, *, least: float = 0, most: float = inf, exclusive: bool = False) -> None:
    """Refuse a value that is no finite number from ``least`` to ``most``, or more than ``least`` if ``exclusive``.

    Example:
        >>> check_option("lr", 0.1, exclusive=True)
        >>> check_option("epochs", 0, least=1)
        Traceback (most recent call last):
        lightning.fabric.utilities.exceptions.MisconfigurationException: epochs must be 1 or more; got 0.
    """
    number = -inf
    if not isinstance(value, bool | str):
        with suppress(TypeError):
            number = float(value)
    if not ((least < number if exclusive else least <= number) and number < inf and number <= most):
        range_ = "positive" if exclusive and least == 0 else f"{least:g} or more"
        range_ += f", and at most {most:g}" if most < inf else ""
        raise MisconfigurationException(f"{option} must be {range_}; got {value!r}.")


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise MisconfigurationException(f"{option} must be one of {', '.join(choices)}; got {value!r}.")
