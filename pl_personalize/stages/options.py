"""Training and importance options, validated on construction."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.checks import check_choice, check_option


@dataclass(frozen=True)
class TrainingOptions:
    """Training of an expert.

    Attributes:
        epochs: Epochs for each task.
        lr: Learning rate.
        momentum: SGD momentum.
        weight_decay: SGD weight decay.
        l2_transfer: λ of the L2 penalty to the preceding expert. ``reference``: as in the published code, λ is 1, the
            second task has no penalty, and from the third task on the new head is pulled to its initial values as well.
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

    def __post_init__(self) -> None:
        check_option("training.epochs", self.epochs, least=1)
        check_option("training.lr", self.lr, exclusive=True)
        check_option("training.weight_decay", self.weight_decay)
        check_option("training.lr_patience", self.lr_patience, least=1)
        check_option("training.stop_patience", self.stop_patience, least=1)
        if not 0 <= self.momentum < 1:
            raise MisconfigurationException(f"training.momentum must be in [0, 1); got {self.momentum}.")
        if self.l2_transfer != "reference":
            check_option("training.l2_transfer (a number, or 'reference')", self.l2_transfer)


@dataclass(frozen=True)
class ImportanceOptions:
    """Estimation of importances.

    Attributes:
        reduction: ``sample``: exact, per sample. ``batch``: as in the published code, for comparison: its estimate
            depends on the batch size and the order of the data; ``FIM-IMM`` adds the estimates of train and val;
            entries that are important to no expert become 0; ``EWC`` multiplies its strength by the batch size.
        fisher_draws: Labels drawn per sample for the Fisher information, or ``all`` for the exact expectation over the
            classes. Ignored by ``batch``, which draws one.
    """

    reduction: Literal["sample", "batch"] = "sample"
    fisher_draws: int | Literal["all"] = "all"

    def __post_init__(self) -> None:
        check_choice("importance.reduction", self.reduction, ("sample", "batch"))
        if self.fisher_draws != "all":
            check_option("importance.fisher_draws (a number, or 'all')", self.fisher_draws, least=1)


@dataclass(frozen=True)
class TrainerOptions:
    """Options of the Lightning Trainer of every stage.

    Attributes:
        accelerator: Accelerator, such as ``cpu``, ``gpu`` or ``auto``.
        precision: Precision, such as ``32-true`` or ``bf16-mixed``.
        enable_progress_bar: Show Lightning's progress bar in each stage, in addition to the overall one.
        log_every_n_steps: Steps between two logged values of the training loss.
    """

    accelerator: str = "auto"
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"] = "32-true"
    enable_progress_bar: bool = False
    log_every_n_steps: int = 50

    def __post_init__(self) -> None:
        check_option("trainer.log_every_n_steps", self.log_every_n_steps, least=1)

    def trainer(self, **options: Any) -> Trainer:
        """A Trainer with these options on one device.

        Raises:
            MisconfigurationException: If this machine or Lightning does not support them.
        """
        try:
            return Trainer(**asdict(self) | options, devices=1, enable_model_summary=False)
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(f"trainer: {error}") from error
