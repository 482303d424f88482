"""Options of the runner; each checks itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LoggerName = Literal["wandb", "csv", "tensorboard"]
TestedModels = Literal["all", "last"]
ArtifactName = Literal["experts", "importances", "merged", "adapted"]


@dataclass(frozen=True)
class WandbOptions:
    """Tracking in Weights & Biases, if it is among the loggers.

    Attributes:
        mode: ``offline`` writes to the run's folder and sends nothing; ``online`` sends; ``disabled`` does neither.
        project: Name of the project.
        entity: User or team, by default your own.
        group: What the runs of this call have in common, by default the benchmark and the name of the run's folder.
        artifacts: What is stored with the run: ``experts``, ``importances``, ``merged``; by default nothing.
        images_of: Users of whose images some are shown in the run; by default nobody's leave this machine.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "pl-personalize"
    entity: str | None = None
    group: str | None = None
    artifacts: Sequence[ArtifactName] = ()
    images_of: Sequence[str] = ()
