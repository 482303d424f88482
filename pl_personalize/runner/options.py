"""Options that every experiment has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class TrainingOptions:
    """How an expert is trained.

    Attributes:
        epochs: Epochs for each task.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        l2_transfer: λ of the pull to the preceding expert.
        drop_after: Epochs without better validation accuracy before the learning rate drops.
        stop_after: Epochs without better validation accuracy before training stops.
    """

    epochs: int = 10
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0
    l2_transfer: float = 0.001
    drop_after: int = 5
    stop_after: int = 11


@dataclass
class TrainerOptions:
    """What is passed on to the Lightning Trainer of every stage.

    Attributes:
        accelerator: Such as ``cpu``, ``gpu`` or ``auto``.
        precision: Such as ``32-true`` or ``bf16-mixed``.
        enable_progress_bar: Lightning's own bars in every stage, besides the one over all stages.
    """

    accelerator: str = "auto"
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"] = "32-true"
    enable_progress_bar: bool = False


@dataclass
class WandbOptions:
    """Tracking in Weights & Biases.

    Attributes:
        mode: ``offline`` writes to the run's folder and sends nothing; ``online`` sends; ``disabled`` does neither.
        project: Name of the project.
        entity: User or team, by default your own.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "pl-personalize"
    entity: str | None = None
