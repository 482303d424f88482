"""Reading files of ``torch.save`` that hold objects of any class, without looking up or running one of them."""

from __future__ import annotations

import os
import sys
import threading
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_LOCK = threading.Lock()  # what is allowed is allowed in the whole process


class InertFile:
    """The content of a file of ``torch.save``, in which an inert object stands for each that is no plain data.

    It is read by PyTorch's reader for ``weights_only=True``, which runs what is on its list and nothing else. For the
    time of reading, every other class or function that the file names is on that list, too, by its name alone: in its
    place is a class that takes what a pickle does to its objects, and does nothing.

    Args:
        path: The file. Its tensors are mapped into memory, and read when they are used; those of a file in the format
            before PyTorch 1.6 are read, and it may name no classes.

    Attributes:
        content: What it holds.
        is_mapped: Whether the tensors are mapped.

    Raises:
        Exception: Whatever PyTorch's reader makes of a file that is broken or does more than build objects.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._inert: dict[int, tuple[object, str]] = {}  # by identity; held, so that no other object gets it
        self.is_mapped = zipfile.is_zipfile(path)
        if not self.is_mapped:
            self.content: Any = torch.load(path, map_location="cpu", weights_only=True)
            return
        names = get_unsafe_globals_in_checkpoint(path)
        # Of classes that are not imported here it is not known whether their objects are filled as dicts or lists are.
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
        """The class or function that an inert object stands for; of a container, the first that is inside."""
        if id(value) in self._inert:
            return self._inert[id(value)][1]
        inside: Iterable[object] = ()
        if isinstance(value, Mapping):
            inside = (*value.keys(), *value.values())
        elif isinstance(value, list | tuple | set):
            inside = value
        return next((name for name in map(self.inert_name, inside) if name is not None), None)

    def _load(self, path: str | os.PathLike[str], names: list[str], *, unknown: type) -> Any:
        self._inert.clear()
        classes = [self._stand_in(name, unknown) for name in names]
        with _LOCK, safe_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def _stand_in(self, name: str, unknown: type) -> Any:
        """A class of that name whose objects are empty; PyTorch fills none but its own dicts and lists."""
        found = _imported(name)
        like = unknown if found is None else found if isinstance(found, type) else object
        make: Callable[[Any], object] = object.__new__
        if issubclass(like, dict):
            make = _new_dict
        elif issubclass(like, list | deque):
            make = _new_list

        def new(cls: Any, *args: object, **kwargs: object) -> object:
            made = make(cls)
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


def _new_dict(cls: object) -> dict[Any, Any]:
    return OrderedDict()


def _new_list(cls: object) -> list[Any]:
    return []


def _imported(name: str) -> object | None:
    """What has that name, if its module is imported; nothing is imported, and no code of the module runs."""
    module, _, attribute = name.rpartition(".")
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None
