"""Options of the runner, validated on construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pl_personalize.checks import check_choice

LoggerName = Literal["wandb", "csv", "tensorboard"]
TestedModels = Literal["all", "last"]
ArtifactName = Literal["experts", "importances", "merged", "adapted"]


@dataclass(frozen=True)
class WandbOptions:
    """Tracking in Weights & Biases, if it is among the loggers.

    Attributes:
        mode: ``offline`` writes to the run's folder and sends nothing; ``online`` sends; ``disabled`` does neither.
        project: Name of the W&B project.
        entity: User or team; by default your own.
        group: Group of the runs of this call; by default the benchmark and the name of the run's folder.
        artifacts: Files that are uploaded with the run: ``experts``, ``importances``, ``merged``, ``adapted``; by
            default none.
        images_of: Users of whom some images are logged; by default none, so that no image leaves this machine.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "pl-personalize"
    entity: str | None = None
    group: str | None = None
    artifacts: Sequence[ArtifactName] = ()
    images_of: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("wandb.mode", self.mode, ("offline", "online", "disabled"))
