"""Reading files of ``torch.save`` with objects of any class, without importing or running their code."""

from __future__ import annotations

import os
import sys
import threading
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_LOCK = threading.Lock()  # the list of allowed classes is global


class InertFile:
    """The content of a file of ``torch.save``, with inert objects in place of all objects that are not plain data.

    PyTorch's ``weights_only=True`` reader, which runs nothing but allowed classes, reads the file. For that time, every
    other class or function that the file names is replaced, in the reader's list of allowed classes, by a class of the
    same name that accepts what a pickle does with its objects and does nothing.

    Tensors are memory-mapped; those of a file in the format before PyTorch 1.6 are read, and such a file may not name
    any classes. Files that are broken or do more than build objects raise the errors of PyTorch's reader.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._inert: dict[int, tuple[object, str]] = {}  # by id; keeps the objects alive, so that ids are not reused
        self.content: Any
        if not zipfile.is_zipfile(path):
            self.content = torch.load(path, map_location="cpu", weights_only=True)
            return
        names = get_unsafe_globals_in_checkpoint(path)
        # Whether the objects of a class that is not imported are filled like dicts or lists has to be guessed.
        guesses = (dict, list) if any(_imported(name) is None for name in names) else ()
        try:
            self.content = self._load(path, names, unknown=object)
        except Exception:
            for unknown in guesses:
                with suppress(Exception):
                    self.content = self._load(path, names, unknown=unknown)
                    return
            raise

    def inert_name(self, value: object) -> str | None:
        """The class or function that an inert object stands for, or in a container, the first inert object in it."""
        if id(value) in self._inert:
            return self._inert[id(value)][1]
        inside: Iterable[object] = value if isinstance(value, list | tuple | set) else ()
        if isinstance(value, Mapping):
            inside = (*value.keys(), *value.values())
        return next((name for name in map(self.inert_name, inside) if name is not None), None)

    def _load(self, path: str | os.PathLike[str], names: list[str], *, unknown: type) -> Any:
        self._inert.clear()
        classes = [self._stand_in(name, unknown) for name in names]
        with _LOCK, safe_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def _stand_in(self, name: str, unknown: type) -> Any:
        """A class of that name whose objects are empty. PyTorch fills only plain dicts and lists."""
        found = _imported(name)
        like = unknown if found is None else found if isinstance(found, type) else object
        is_list = issubclass(like, list | deque)

        def new(cls: Any, *args: object, **kwargs: object) -> object:
            made: object = OrderedDict() if issubclass(like, dict) else [] if is_list else object.__new__(cls)
            self._inert[id(made)] = made, name
            return made

        module, _, attribute = name.rpartition(".")
        stand_in = type(attribute, (_Inert,), {"__module__": module, "__qualname__": attribute, "__new__": new})
        self._inert[id(stand_in)] = stand_in, name
        return stand_in


class _Inert:
    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


def _imported(name: str) -> object | None:
    """The object of that name if its module is imported already; nothing is imported or run."""
    module, _, attribute = name.rpartition(".")
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None
