"""The methods that an experiment compares, and what the server trains for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pl_personalize.importance import Kind

MethodName = Literal["MAS-RACL", "FIM-RACL", "MAS-IMM", "FIM-IMM", "mean-IMM", "Experts", "Joint"]
ServerMethod = Literal["IMM", "Joint"]


@dataclass(frozen=True)
class Method:
    """What is tested.

    Attributes:
        server: How the server trains for it: ``"IMM"``, one expert after the other, each pulled to the one before;
            ``"Joint"``, one model on the data of all tasks.
        merges: Whether the experts are merged.
        kind: Of the importances that they are weighted by, or ``None`` for equal weights.
        source: Whose data the importances are from: each ``"user"``'s own (RACL) or the ``"server"``'s (IMM).
        bound: What it is, if it is no competitor but something to compare with.
    """

    server: ServerMethod = "IMM"
    merges: bool = False
    kind: Kind | None = None
    source: Literal["server", "user"] = "server"
    bound: str | None = None


METHODS: dict[MethodName, Method] = {
    "MAS-RACL": Method(merges=True, kind="mas", source="user"),
    "FIM-RACL": Method(merges=True, kind="fisher", source="user"),
    "MAS-IMM": Method(merges=True, kind="mas"),
    "FIM-IMM": Method(merges=True, kind="fisher"),
    "mean-IMM": Method(merges=True),
    "Experts": Method(bound="each task with its own unmerged expert"),
    "Joint": Method("Joint", bound="one model trained on all tasks at once"),
}
MERGING_METHODS: tuple[MethodName, ...] = tuple(name for name, method in METHODS.items() if method.merges)


def by_server(methods: Iterable[MethodName]) -> dict[ServerMethod, list[MethodName]]:
    """The methods by what the server trains for them, in the order of :data:`METHODS`."""
    wanted = set(methods)
    groups: dict[ServerMethod, list[MethodName]] = {}
    for name, method in METHODS.items():
        if name in wanted:
            groups.setdefault(method.server, []).append(name)
    return groups
