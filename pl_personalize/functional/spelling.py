"""Names that users write in files: without blanks around them, and compared with what is there."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def trimmed(text: str) -> str:
    r"""A name without blanks and invisible characters around it, such as no-break spaces and byte order marks.

    Example:
        >>> trimmed("\ufeff kitchen\u00a0\t")
        'kitchen'
    """
    shown = [place for place, letter in enumerate(text) if not _is_blank(letter)]
    return text[shown[0] : shown[-1] + 1] if shown else ""


def written_otherwise(name: str, there: Iterable[str]) -> str | None:
    """The name that differs from another in its case, blanks, slashes or Unicode form alone; ``None`` if none does.

    Example:
        >>> written_otherwise("Living room", ["attic", "livingroom"])
        'livingroom'
        >>> written_otherwise("attic", ["attic", "cellar"]) is None
        True
    """
    plain = _plain(name)
    return next((one for one in sorted(there) if one != name and _plain(one) == plain), None)


def hint(name: str, there: Iterable[str]) -> str:
    """What to add to a message that a name is not there: how it is written, if that is what is wrong.

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
    """Also of a class without a width: control and format characters."""
    return letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf")
