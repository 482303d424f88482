"""Registries: the named entries of one kind of extension, such as merge rules, adaptations or methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Protocol, TypeVar


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """Name under which it is registered."""


T = TypeVar("T", bound=Named)


class Registry(Mapping[str, T]):
    """Entries of one kind by name, in order of registration.

    Args:
        kind: Name of the kind in messages, such as ``"merge rule"``.
        entries: Initial entries.

    Raises:
        ValueError: If two entries have the same name, or a name is not valid.

    Example:
        >>> from pathlib import Path
        >>> files = Registry("file", [Path("a.txt")])
        >>> files.register(Path("b.txt"))
        PosixPath('b.txt')
        >>> list(files)
        ['a.txt', 'b.txt']
        >>> files.find("B.TXT")
        Traceback (most recent call last):
        ValueError: Unknown file 'B.TXT'; did you mean 'b.txt'? Known: a.txt, b.txt.
    """

    def __init__(self, kind: str, entries: Iterable[T] = ()) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        for entry in entries:
            self.register(entry)

    def register(self, entry: T) -> T:
        """Add an entry and return it, so that this also serves as a class decorator.

        Raises:
            ValueError: If its name is taken, empty, or has a ``+`` (which joins names) or a path separator.
        """
        if not entry.name or set(entry.name) & set("+/\\"):
            raise ValueError(f"A {self.kind} cannot be called {entry.name!r}: a name has no '+', '/' or '\\'.")
        if entry.name in self._entries:
            raise ValueError(f"There is already a {self.kind} called {entry.name!r}.")
        self._entries[entry.name] = entry
        return entry

    def unregister(self, name: str) -> T:
        """Remove an entry and return it, such as at the end of a test.

        Raises:
            KeyError: If there is none of that name.
        """
        return self._entries.pop(name)

    def find(self, name: str) -> T:
        """The entry of that name.

        Raises:
            ValueError: If there is none; the message suggests the closest name.
        """
        if name in self._entries:
            return self._entries[name]
        raise ValueError(f"Unknown {self.kind} {name!r}{did_you_mean(name, self)} Known: {', '.join(self)}.")

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The middle of a message about an unknown name: the closest known name, or just a period.

    Example:
        >>> did_you_mean("ewc", ["EWC", "MAS"]), did_you_mean("something", ["EWC", "MAS"])
        ("; did you mean 'EWC'?", '.')
    """
    by_lower = {one.lower(): one for one in known}
    close = get_close_matches(str(name).lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else "."
