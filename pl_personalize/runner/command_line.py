"""Entry points of scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.artifacts import ArtifactError


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End a script with ``error: …`` and a status that is not zero where files, options or the system are at fault.

    Example:
        >>> with errors_in_one_line():  # doctest: +IGNORE_EXCEPTION_DETAIL
        ...     open("/nowhere/at/all")
        Traceback (most recent call last):
        SystemExit: error: [Errno 2] No such file or directory: '/nowhere/at/all'
    """
    try:
        yield
    except (ArtifactError, MisconfigurationException, OSError) as error:
        sys.exit(f"error: {error}")


def run_script(main: Callable[..., None], *, as_positional: bool = False) -> None:
    """Call a function with the options of the command line."""
    from jsonargparse import auto_cli

    with errors_in_one_line():
        auto_cli(main, as_positional=as_positional)
