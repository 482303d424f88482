"""State dicts: tied entries, module versions, prefixes, and what some of them know about their tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]
"""Tensors by name: a dict, or an object that reads each tensor from a file on access."""
Versions = dict[str, dict[str, Any]]
"""Entries of a state dict's ``_metadata`` by module name, such as ``{"version": 2}``."""
Bounds = tuple[float, float]
"""The smallest and the largest entry of a tensor."""


@runtime_checkable
class Aliased(Protocol):
    """A state dict that knows its tied entries, see :func:`shared_entries`, such as one that reads from a file."""

    aliases: dict[str, str]


@runtime_checkable
class Versioned(Protocol):
    """A state dict with the versions of its modules, under the name that PyTorch uses."""

    _metadata: Versions | None


@runtime_checkable
class Described(Protocol):
    """Importances whose metadata say how they were computed, as ``kind`` and ``reduction``."""

    metadata: Mapping[str, Any]


@runtime_checkable
class Bounded(Protocol):
    """Importances that were checked, and know the range of each tensor."""

    def bounds(self, name: str) -> Bounds | None:
        """The smallest and the largest entry, or ``None`` if unknown or outdated."""


def shared_entries(tensors: Mapping[str, Any]) -> dict[str, str]:
    """The name of each entry that shares the storage of an earlier one (tied weights), with the name of that one.

    Entries that are not tensors, and tensors without storage (sparse, meta or empty ones), are never shared.
    """
    if isinstance(tensors, Aliased):
        return tensors.aliases
    first: dict[Any, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
            continue
        place = tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        view = tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
        if (earlier := first.setdefault((place, view), name)) != name:
            shared[name] = earlier
    return shared


def module_versions(state: Mapping[str, Any]) -> Versions | None:
    """Copy the module versions in a state dict's ``_metadata``; ``None`` if it has none."""
    if not isinstance(state, Versioned) or not isinstance(state._metadata, Mapping):
        return None
    return {str(name): dict(entry) for name, entry in state._metadata.items() if isinstance(entry, Mapping)}


def versions_above(versions: Versions | None, module: str) -> Versions:
    """The versions of a submodule, with names relative to the module that contains it as ``module``."""
    return {f"{module}.{name}".removesuffix("."): entry for name, entry in (versions or {}).items()}


def kind_of(importance: Mapping[str, Any]) -> str | None:
    """The kind and reduction of importances, such as ``"mas (sample)"``, or ``None`` if they do not know it."""
    metadata = importance.metadata if isinstance(importance, Described) else {}
    kind, reduction = metadata.get("kind"), metadata.get("reduction")
    return f"{kind} ({reduction})" if reduction is not None else kind


def with_versions(entries: Mapping[str, Any], versions: Versions | None) -> dict[str, Any]:
    """A state dict of the entries whose ``_metadata`` has the given module versions."""
    state = OrderedDict(entries)
    if versions is not None:
        vars(state)["_metadata"] = OrderedDict(versions)
    return state


Entry = TypeVar("Entry", covariant=True)


class NamedEntries(Mapping[str, Entry]):
    """Base class for mappings whose names, and by default values, are those of ``self._entries``."""

    _entries: Mapping[str, Any]

    def __getitem__(self, name: str) -> Entry:
        entry: Entry = self._entries[name]
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class PrefixView(NamedEntries[Any]):
    """The entries of a submodule in a state dict, with names relative to it, read on access.

    It passes on what the state dict knows: tied entries, module versions, and the kind and bounds of importances.

    Example:
        >>> body = PrefixView({"body.0.weight": torch.ones(2), "head.weight": torch.zeros(2)}, "body")
        >>> list(body), body["0.weight"].tolist()
        (['0.weight'], [1.0, 1.0])
    """

    def __init__(self, state: Mapping[str, Any], module: str) -> None:
        self._state, self._module, self._prefix = state, module, f"{module}."
        self._entries = {name.removeprefix(self._prefix): name for name in state if name.startswith(self._prefix)}

    def __getitem__(self, name: str) -> Any:
        return self._state[self._entries[name]]

    @property
    def aliases(self) -> dict[str, str]:
        """The tied entries, see :func:`shared_entries`."""
        shared = shared_entries(self._state)
        firsts = [(shared.get(full, full), name) for name, full in self._entries.items()]
        inside = {first: name for first, name in reversed(firsts)}
        return {name: inside[first] for first, name in firsts if inside[first] != name}

    @property
    def _metadata(self) -> Versions | None:
        versions = module_versions(self._state)
        return versions and {
            name[len(self._module) :].removeprefix("."): entry
            for name, entry in versions.items()
            if name == self._module or name.startswith(self._prefix)
        }

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The state dict's metadata, empty if it has none."""
        return self._state.metadata if isinstance(self._state, Described) else {}

    def bounds(self, name: str) -> Bounds | None:
        """The range of the importances of a parameter, if it is known."""
        return self._state.bounds(self._prefix + name) if isinstance(self._state, Bounded) else None
