"""The methods that an experiment compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pl_personalize.importance import Kind

MethodName = Literal["MAS-RACL", "FIM-RACL", "MAS-IMM", "FIM-IMM", "mean-IMM"]
BoundName = Literal["Experts", "Joint"]


@dataclass(frozen=True)
class MergeMethod:
    """How a method weighs the experts.

    Attributes:
        kind: Of the importances, or ``None`` for equal weights.
        source: Whose data they are from: each ``"user"``'s own (RACL) or the ``"server"``'s (IMM).
    """

    kind: Kind | None = None
    source: Literal["server", "user"] = "server"


MERGE_METHODS: dict[MethodName, MergeMethod] = {
    "MAS-RACL": MergeMethod("mas", "user"),
    "FIM-RACL": MergeMethod("fisher", "user"),
    "MAS-IMM": MergeMethod("mas", "server"),
    "FIM-IMM": MergeMethod("fisher", "server"),
    "mean-IMM": MergeMethod(),
}
BOUNDS: dict[BoundName, str] = {
    "Experts": "each task with its own unmerged expert",
    "Joint": "one model trained on all tasks at once",
}
