"""The methods that an experiment compares, and what the server trains for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pl_personalize.importance import Kind
from pl_personalize.modules.batchnorm_policy import BNPolicy

MethodName = Literal[
    "MAS-RACL",
    "FIM-RACL",
    "MAS-IMM",
    "FIM-IMM",
    "mean-IMM",
    "MAS",
    "EWC",
    "LwF",
    "Finetune",
    "FT",
    "Experts",
    "Joint",
]
ServerMethod = Literal["IMM", "MAS", "EWC", "LwF", "Finetune", "Joint"]


@dataclass(frozen=True)
class Method:
    """What is tested.

    Attributes:
        server: How the server trains for it: ``"IMM"``, one expert after the other, each pulled to the one before;
            ``"MAS"``, ``"EWC"``, ``"LwF"``, one model through all tasks, which is kept from forgetting; ``"Finetune"``,
            the same without; ``"Joint"``, one model on the data of all tasks.
        merges: Whether the experts are merged.
        kind: Of the importances that they are weighted by, or ``None`` for equal weights.
        source: Whose data the importances are from: each ``"user"``'s own (RACL) or the ``"server"``'s (IMM).
        tunes: Whether the experts are trained further on each user's labelled images.
        one_each: Whether each task has a model of its own, so that nothing can be forgotten.
        bound: What it is, if it is no competitor but something to compare with.
    """

    server: ServerMethod = "IMM"
    merges: bool = False
    kind: Kind | None = None
    source: Literal["server", "user"] = "server"
    tunes: bool = False
    one_each: bool = False
    bound: str | None = None

    @property
    def personal(self) -> bool:
        """Whether each user has models of his own."""
        return self.tunes or self.source == "user"

    @property
    def needs_importances(self) -> bool:
        """Whether importances of the body's parameters are estimated for it."""
        return self.kind is not None or self.server in ("MAS", "EWC")


METHODS: dict[MethodName, Method] = {
    "MAS-RACL": Method(merges=True, kind="mas", source="user"),
    "FIM-RACL": Method(merges=True, kind="fisher", source="user"),
    "MAS-IMM": Method(merges=True, kind="mas"),
    "FIM-IMM": Method(merges=True, kind="fisher"),
    "mean-IMM": Method(merges=True),
    "MAS": Method("MAS"),
    "EWC": Method("EWC"),
    "LwF": Method("LwF"),
    "Finetune": Method("Finetune", bound="one model, trained on one task after the other"),
    "FT": Method(
        tunes=True, one_each=True, bound="each task with its expert, trained further on the user's labelled images"
    ),
    "Experts": Method(one_each=True, bound="each task with its own unmerged expert"),
    "Joint": Method("Joint", bound="one model trained on all tasks at once"),
}
# What the demonstration compares: everything that the same experts give, and one model on all data.
MERGES_AND_BOUNDS: tuple[MethodName, ...] = (
    *(name for name, method in METHODS.items() if method.merges),
    "Experts",
    "Joint",
)
MERGING_METHODS: tuple[MethodName, ...] = tuple(name for name, method in METHODS.items() if method.merges)


AdaptationName = Literal["none", "last", "average", "expert", "recalibrate", "reference", "AdaBN", "AdaBN-S"]


@dataclass(frozen=True)
class Adaptation:
    """How batch norm is set when a model is tested on a task.

    Attributes:
        policy: Where its statistics come from, see :class:`~pl_personalize.MergeModule`.
        trains: Whether γ and β are trained then, on the user's labelled images.
        merges_only: Whether it has a meaning for merges alone.
        text: What it is.
    """

    policy: BNPolicy
    text: str
    trains: bool = False
    merges_only: bool = False


ADAPTATIONS: dict[AdaptationName, Adaptation] = {
    "none": Adaptation("last", "no batch norm"),
    "last": Adaptation("last", "statistics of the model's last expert (of an unmerged model, its own)"),
    "average": Adaptation("average", "of the mixture of its experts", merges_only=True),
    "expert": Adaptation("expert", "of the task's expert", merges_only=True),
    "reference": Adaptation("reference", "as the published code, γ and β of the task's model", merges_only=True),
    "recalibrate": Adaptation("recalibrate", "re-estimated on the server's images of the task"),
    "AdaBN": Adaptation("adapt", "re-estimated on the user's unlabelled images of the task"),
    "AdaBN-S": Adaptation("adapt", "the same, then γ and β trained on the user's labelled images", trains=True),
}


class Variant(NamedTuple):
    """A method under an adaptation of batch norm."""

    method: MethodName
    adaptation: AdaptationName = "none"

    @property
    def label(self) -> str:
        """Its name in stages, tables and figures."""
        return variant_label(*self)


def variant_label(method: str, adaptation: str) -> str:
    """``FIM-RACL``, or ``FIM-RACL+AdaBN`` where batch norm is adapted."""
    return method if adaptation == "none" else f"{method}+{adaptation}"


def variants(methods: Iterable[MethodName], adaptations: Iterable[AdaptationName]) -> list[Variant]:
    """Each method under each adaptation that has a meaning for it."""
    chosen = list(adaptations)
    return [Variant(m, a) for m in methods for a in chosen if METHODS[m].merges or not ADAPTATIONS[a].merges_only]


def by_server(methods: Iterable[MethodName]) -> dict[ServerMethod, list[MethodName]]:
    """The methods by what the server trains for them, in the order of :data:`METHODS`."""
    wanted = set(methods)
    groups: dict[ServerMethod, list[MethodName]] = {}
    for name, method in METHODS.items():
        if name in wanted:
            groups.setdefault(method.server, []).append(name)
    return groups
