"""Names from user-written files: trimming, and comparison with the names that exist."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def trimmed(text: str) -> str:
    r"""Strip whitespace and invisible characters, such as no-break spaces and byte order marks.

    Example:
        >>> trimmed("\ufeff kitchen\u00a0\t")
        'kitchen'
    """
    shown = [place for place, letter in enumerate(text) if not _is_blank(letter)]
    return text[shown[0] : shown[-1] + 1] if shown else ""


def written_otherwise(name: str, there: Iterable[str]) -> str | None:
    """The existing name that differs only in case, whitespace, slashes or Unicode form, or ``None``.

    Example:
        >>> written_otherwise("Living room", ["attic", "livingroom"])
        'livingroom'
        >>> written_otherwise("attic", ["attic", "cellar"]) is None
        True
    """
    plain = _plain(name)
    return next((one for one in sorted(there) if one != name and _plain(one) == plain), None)


def hint(name: str, there: Iterable[str]) -> str:
    """Addition to a message about a missing name: the right spelling, if only that is wrong.

    Example:
        >>> hint("Attic", ["attic"]), hint("Attic", ["cellar"])
        (", where it is 'attic'", '')
    """
    found = written_otherwise(name, there)
    return "" if found is None else f", where it is {found!r}"


def _plain(name: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return "".join(letter for letter in folded.replace("\\", "/") if not _is_blank(letter))


def _is_blank(letter: str) -> bool:
    """Whether a character is whitespace, or a control or format character without a width."""
    return letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf")
