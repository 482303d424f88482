"""What a state dict is beside names and tensors: entries that are one tensor, and the versions of its modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Versions = dict[str, dict[str, Any]]
"""By the name of a module what PyTorch keeps of it in a state dict's ``_metadata``, such as ``{"version": 2}``."""


def shared_entries(tensors: Mapping[str, Any]) -> dict[str, str]:
    """The entries that are the same storage as an earlier one (tied weights), each with that one's name.

    A mapping that reads its tensors from a file knows this itself, as its attribute ``aliases``. Entries that are no
    tensors, and tensors without a storage of their own (sparse, or on the meta device), are shared with none.
    """
    known: dict[str, str] | None = getattr(tensors, "aliases", None)
    if known is not None:
        return known
    first: dict[Any, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
            continue
        storage = tensor.untyped_storage().data_ptr()
        key = (
            tensor.device,
            storage,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )
        if key in first:
            shared[name] = first[key]
        else:
            first[key] = name
    return shared


def module_versions(state: Mapping[str, Any]) -> Versions | None:
    """A copy of a state dict's ``_metadata``, by which modules know the version of their entries; ``None`` without."""
    found = getattr(state, "_metadata", None)
    if not isinstance(found, Mapping):
        return None
    return {str(name): dict(entry) for name, entry in found.items() if isinstance(entry, Mapping)}


def versions_below(versions: Versions | None, module: str) -> Versions | None:
    """The versions of a module and of what it contains, with names relative to it."""
    if versions is None:
        return None
    return {
        name[len(module) :].removeprefix("."): entry
        for name, entry in versions.items()
        if name == module or name.startswith(f"{module}.")
    }


def versions_above(versions: Versions | None, module: str) -> Versions:
    """The same with the names that they have in what contains the module."""
    return {f"{module}.{name}".removesuffix("."): entry for name, entry in (versions or {}).items()}


def with_versions(entries: Mapping[str, Any], versions: Versions | None) -> dict[str, Any]:
    """A state dict of the entries that ``load_state_dict`` takes for one of modules of these versions."""
    state = OrderedDict(entries)
    if versions is not None:
        vars(state)["_metadata"] = OrderedDict(versions)
    return state
