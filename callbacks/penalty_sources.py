"""Importances and anchors of a penalty, read from files or memory into tensors by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pl_personalize.artifacts import ArtifactError, read_state_dict
from pl_personalize.functional.merging import check_importance
from pl_personalize.functional.names import prefix_hint
from pl_personalize.importance import Importance

TaskImportance: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
Anchor: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]

SHARED_PARAMETERS = (
    "Tasks must share the parameters: estimate importances with the same module=, or exclude what differs, such as a "
    "head, with exclude=."
)


def sum_of_importances(
    given: Sequence[TaskImportance] | TaskImportance | None, is_excluded: Callable[[str], bool]
) -> dict[str, Tensor] | None:
    """Sum of Ω over tasks, on the CPU; ``None`` if none were given."""
    if given is None:
        return None
    tasks: list[Any] = [given] if isinstance(given, str | os.PathLike | Mapping) else list(given)
    total: dict[str, Tensor] = {}
    kinds: set[tuple[str, str]] = set()
    for k, source in enumerate(tasks):
        if not isinstance(source, str | os.PathLike | Mapping):
            what = "None: has it been estimated?" if source is None else f"a {type(source).__name__}."
            raise ValueError(f"importances[{k}] is {what} Pass a mapping of names to tensors, or the path of a file.")
        task = source if isinstance(source, Mapping) else Importance.load(source)
        if isinstance(task, Importance):
            kinds.add((task.kind, task.reduction))
        for name, value in task.items():
            if is_excluded(name):
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"importances[{k}] has a {type(value).__name__} for {name!r}: pass a tensor.")
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
            f"importances of different kinds, {sorted(kinds)}, differ in scale. Estimate all in the same way, or use "
            "one callback per kind."
        )
    return total


def copied(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy the tensors of a state dict."""
    return {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, Tensor)}


def read_anchor(anchor: Anchor | None) -> dict[str, Tensor]:
    """Tensors of a state dict or its file, see :func:`~pl_personalize.artifacts.read_state_dict`."""
    if anchor is None:
        return {}
    if isinstance(anchor, Mapping):
        return {name: value for name, value in anchor.items() if isinstance(value, Tensor)}
    try:
        return {name: value for name, value in read_state_dict(anchor).items() if isinstance(value, Tensor)}
    except ArtifactError as error:
        raise ValueError(f"the anchor {error}") from error


def anchor_of(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], module: str | None) -> dict[str, Tensor]:
    """The anchor's entry for each parameter."""
    whole = {name: f"{module}.{name}" for name in parameters}
    relative = module is None or not all(name in anchor for name in whole.values())
    entries: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        value = anchor.get(name if relative else whole[name])
        if value is None or value.shape != parameter.shape:
            found = "nothing" if value is None else tuple(value.shape)
            raise ValueError(
                f"the anchor has {found} for the parameter {name!r}, which is {tuple(parameter.shape)}. Pass the "
                "state dict of such a module, or exclude parameters with exclude=."
                + ("" if value is not None else prefix_hint([name], anchor))
            )
        if value.is_complex() and not parameter.is_complex():
            raise ValueError(f"the anchor of {name!r} is {value.dtype}, and the parameter {parameter.dtype}.")
        if not bool(value.isfinite().all()):
            raise ValueError(f"the anchor of {name!r} is not finite.")
        entries[name] = value
    return entries
