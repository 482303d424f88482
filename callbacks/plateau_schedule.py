"""Learning-rate drop and early stopping on a plateau."""

from __future__ import annotations

from math import inf
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override


class PlateauSchedule(Callback):
    """Drops the learning rate once per plateau of a metric, and stops training on a longer one.

    The schedule of De Lange et al., CVPR 2020. After ``lr_patience`` consecutive validation runs without improvement
    the learning rate is multiplied by ``factor``; after ``stop_patience`` runs training stops. Each plateau drops the
    rate once (``ReduceLROnPlateau`` would drop it repeatedly), and the rate never rises again.

    Args:
        monitor: Name of a logged metric.
        mode: ``"max"`` if larger is better, else ``"min"``.
        lr_patience: Validation runs without improvement before the learning rate drops.
        stop_patience: Validation runs without improvement before training stops.
        factor: Factor for the learning rate of every parameter group.

    Raises:
        MisconfigurationException: If an argument is out of range, or the metric is not logged.

    Example:
        >>> schedule = PlateauSchedule(monitor="val/acc")
        >>> schedule.stagnant
        0
    """

    def __init__(
        self,
        monitor: str = "val/acc",
        mode: Literal["min", "max"] = "max",
        lr_patience: int = 5,
        stop_patience: int = 11,
        factor: float = 0.1,
    ) -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"mode must be 'min' or 'max'; got {mode!r}.")
        if not (lr_patience >= 1 and stop_patience >= 1):
            raise MisconfigurationException(
                f"lr_patience and stop_patience must be at least 1; got {lr_patience} and {stop_patience}."
            )
        if not 0 < factor < 1:
            raise MisconfigurationException(f"factor must be between 0 and 1; got {factor}.")
        self.monitor, self.mode, self.factor = monitor, mode, factor
        self.lr_patience, self.stop_patience = lr_patience, stop_patience
        self.best: float | None = None
        self.stagnant = 0

    @property
    @override
    def state_key(self) -> str:
        names = ("monitor", "mode", "lr_patience", "stop_patience")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state; a resumed run restores it from its checkpoint afterwards."""
        if stage == "fit":
            self.best, self.stagnant = None, 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the length of the current plateau."""
        return {"best": self.best, "stagnant": self.stagnant}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value and the length of the current plateau."""
        self.best, self.stagnant = state_dict["best"], state_dict["stagnant"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a resumed run that had already stopped."""
        trainer.should_stop = trainer.should_stop or self.stagnant >= self.stop_patience

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the metric with the best value; drop the learning rate or stop."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"PlateauSchedule monitors {self.monitor!r}, which was not logged; logged metrics: "
                f"{sorted(trainer.callback_metrics)}."
            )
        # The mean over processes: a metric logged without sync_dist must not make them diverge.
        logged = trainer.callback_metrics[self.monitor].to(pl_module.device)
        value = float(trainer.strategy.reduce(logged, reduce_op="mean"))
        best = self.best if self.best is not None else (-inf if self.mode == "max" else inf)
        if value > best if self.mode == "max" else value < best:
            self.best, self.stagnant = value, 0
            return
        self.stagnant += 1
        if self.stagnant == self.lr_patience:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= self.factor
        if self.stagnant >= self.stop_patience:
            trainer.should_stop = True
