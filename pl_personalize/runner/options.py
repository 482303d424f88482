"""Options that every experiment has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LoggerName = Literal["wandb", "csv", "tensorboard"]
TestedModels = Literal["all", "last"]
ArtifactName = Literal["experts", "importances", "merged"]


@dataclass
class TrainingOptions:
    """How an expert is trained.

    Attributes:
        epochs: Epochs for each task.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        l2_transfer: λ of the pull to the preceding expert. ``reference``: as in the published code, where λ is 1, the
            second task has none, and from the third on the new head is pulled to its initial values, too.
        lr_patience: Epochs without better validation accuracy before the learning rate drops.
        stop_patience: Epochs without better validation accuracy before training stops.
    """

    epochs: int = 10
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0
    l2_transfer: float | Literal["reference"] = 0.001
    lr_patience: int = 5
    stop_patience: int = 11


@dataclass
class ImportanceOptions:
    """How importances are estimated.

    Attributes:
        reduction: ``sample``: exact, per sample; ``batch``: for comparison, as the published code does: its estimate,
            which depends on the batch size and the order; for ``FIM-IMM`` the sum of those of train and val; 0 for
            entries that are important to no expert; and for ``EWC`` the scale that its strength belongs to.
        fisher_draws: Labels drawn for each sample in a Fisher information, or ``all`` for the exact expectation over
            the classes. It has no meaning for ``batch``, which draws one.
    """

    reduction: Literal["sample", "batch"] = "sample"
    fisher_draws: int | Literal["all"] = "all"


@dataclass
class BaselineOptions:
    """Methods that do not merge.

    Attributes:
        mas_strength: λ of the penalty of ``MAS``, without a factor 1/2.
        ewc_strength: λ of the penalty of ``EWC``, without a factor 1/2 (it is 2λ in papers that write λ/2).
        lwf_strength: λ of the distillation of ``LwF``.
        lwf_temperature: T of the distillation.
        ft_epochs: For ``FT``, epochs over the user's labelled images.
        ft_lr: For ``FT``, the learning rate.
    """

    mas_strength: float = 1.0
    ewc_strength: float = 400.0
    lwf_strength: float = 1.0
    lwf_temperature: float = 2.0
    ft_epochs: int = 10
    ft_lr: float = 0.0005


@dataclass
class AdaptationOptions:
    """How batch norm is re-estimated (``recalibrate``, ``AdaBN``, ``AdaBN-S``), for networks that have it.

    Attributes:
        exact: Statistics do not depend on the batch size, see :func:`~pl_personalize.adapt_batchnorm`.
        prior_samples: How many images the statistics before count as; for merges, those are the experts' average.
        epochs: For ``AdaBN-S``, epochs over the user's labelled images.
        lr: For ``AdaBN-S``, the learning rate of SGD with momentum 0.9.
    """

    exact: bool = False
    prior_samples: float = 0.0
    epochs: int = 5
    lr: float = 0.001


@dataclass
class TrainerOptions:
    """What is passed on to the Lightning Trainer of every stage.

    Attributes:
        accelerator: Such as ``cpu``, ``gpu`` or ``auto``.
        precision: Such as ``32-true`` or ``bf16-mixed``.
        enable_progress_bar: Lightning's own bars in every stage, besides the one over all stages.
        log_every_n_steps: Steps between two values of the training loss.
    """

    accelerator: str = "auto"
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"] = "32-true"
    enable_progress_bar: bool = False
    log_every_n_steps: int = 50


@dataclass
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
