"""MAS and EWC: one model through all tasks, whose important parameters are kept where they are."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from pl_personalize.checks import check_option
from pl_personalize.methods.method import Method
from pl_personalize.methods.sequence import PenaltyFamily


@dataclass(frozen=True)
class MASOptions:
    """Memory Aware Synapses.

    Attributes:
        strength: λ of the penalty, without a factor 1/2.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_option("method.mas.strength", self.strength)


@dataclass(frozen=True)
class EWCOptions:
    """Elastic weight consolidation.

    Attributes:
        strength: λ of the penalty, without a factor 1/2 (2λ in papers that write λ/2).
    """

    strength: float = 400.0

    def __post_init__(self) -> None:
        check_option("method.ewc.strength", self.strength)


class MASFamily(PenaltyFamily):
    """Memory Aware Synapses (Aljundi et al., ECCV 2018)."""

    name, kind, Options = "MAS", "mas", MASOptions

    @property
    @override
    def strength(self) -> float:
        strength: float = self.options.strength
        return strength


class EWCFamily(PenaltyFamily):
    """Elastic weight consolidation (Kirkpatrick et al., PNAS 2017)."""

    name, kind, Options = "EWC", "empirical_fisher", EWCOptions

    @property
    @override
    def strength(self) -> float:
        """λ; the published code squares a batch's *summed* gradient, where ``reduction="batch"`` has the mean."""
        strength: float = self.options.strength
        return strength * (self.data.batch_size if self.workspace.importance.reduction == "batch" else 1)


_TEXT = "one model through all tasks, its important parameters kept by a penalty"
MAS = Method("MAS", MASFamily, _TEXT, "Aljundi et al., ECCV 2018", needs_importances=True)
EWC = Method("EWC", EWCFamily, _TEXT, "Kirkpatrick et al., PNAS 2017", needs_importances=True)
