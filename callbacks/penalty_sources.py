"""What a penalty is given, importances of tasks and an anchor, read from files or memory into tensors by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

from pl_personalize.functional.merging import check_importance
from pl_personalize.functional.names import prefix_hint
from pl_personalize.importance import Importance

TaskImportance: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
Anchor: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]

SHARED_PARAMETERS = (
    "Importances are of the parameters that tasks share: estimate them with the same module=, or leave out what "
    "differs, such as a head, with exclude=."
)


def sum_of_importances(
    given: Sequence[TaskImportance] | TaskImportance | None, is_excluded: Callable[[str], bool]
) -> dict[str, Tensor] | None:
    """Ω summed over tasks, on the CPU; ``None`` if none were given.

    Args:
        given: Of one task or of several.
        is_excluded: Which names have no part in it.

    Raises:
        ValueError: If a file cannot be read, or importances are no importances or cannot be added.
    """
    if given is None:
        return None
    tasks = [given] if isinstance(given, str | os.PathLike | Mapping) else list(given)
    total: dict[str, Tensor] = {}
    kinds: set[tuple[str, str]] = set()
    for source in tasks:
        task = source if isinstance(source, Mapping) else Importance.load(source)
        if isinstance(task, Importance):
            kinds.add((task.kind, task.reduction))
        for name, value in task.items():
            if is_excluded(name):
                continue
            check_importance(name, value)
            value = value.detach().to("cpu", torch.promote_types(value.dtype, torch.float32))
            if name in total and value.shape != total[name].shape:
                raise ValueError(
                    f"the importances of {name!r} are {tuple(total[name].shape)} for one task and "
                    f"{tuple(value.shape)} for another, and cannot be added. {SHARED_PARAMETERS}"
                )
            total[name] = total[name] + value if name in total else value
    if len(kinds) > 1:
        raise ValueError(
            f"importances of different kinds, {sorted(kinds)}, are not on one scale. Estimate all in the same way, "
            "or give each kind a callback of its own."
        )
    return total


def copied(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, which no longer move with what it is of."""
    return {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, Tensor)}


def read_anchor(anchor: Anchor | None) -> dict[str, Tensor]:
    """The entries of a state dict, or of a file that has one.

    Raises:
        ValueError: If the file cannot be read.
    """
    if anchor is None:
        return {}
    if isinstance(anchor, Mapping):
        return dict(anchor)
    try:
        if Path(anchor).suffix == ".safetensors":
            return dict(load_file(anchor))
        loaded: Any = torch.load(anchor, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises whatever a broken file makes it do
        raise ValueError(f"the anchor {anchor} cannot be read: {error}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError(f"the anchor {anchor} holds no state dict but {type(loaded).__name__}.")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def anchor_of(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], module: str | None) -> dict[str, Tensor]:
    """The anchor's entry for each parameter.

    Args:
        parameters: By names relative to ``module``.
        anchor: By names of the whole, or relative to ``module``.
        module: Name of the submodule that the parameters are of.

    Raises:
        ValueError: If one is missing, not finite or of another shape.
    """
    whole = {name: f"{module}.{name}" for name in parameters}
    relative = module is None or not all(name in anchor for name in whole.values())
    entries: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        value = anchor.get(name if relative else whole[name])
        if value is None or value.shape != parameter.shape:
            found = "nothing" if value is None else tuple(value.shape)
            raise ValueError(
                f"the anchor has {found} for the parameter {name!r}, which is {tuple(parameter.shape)}. Pass the "
                "state dict of a module like this one, or leave parameters out with exclude=."
                + ("" if value is not None else prefix_hint([name], anchor))
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"the anchor of {name!r} is not finite.")
        entries[name] = value
    return entries
