"""Lower the learning rate once, then stop, while a metric stagnates."""

from __future__ import annotations

from math import inf
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override


class PlateauSchedule(Callback):
    """Multiplies the learning rate by ``factor`` after ``drop_after`` checks without improvement, once per streak.

    Training stops after ``stop_after`` checks without improvement. A check is a validation run. This is the schedule of
    De Lange et al., CVPR 2020: with the defaults the rate drops after five epochs without improvement and training
    stops after eleven; a new streak may drop it again, and it is never raised. (``ReduceLROnPlateau`` would drop it
    again within a streak.)

    Args:
        monitor: Name of a logged metric.
        mode: ``"max"`` if larger is better, else ``"min"``.
        drop_after: Checks without improvement before the rate drops.
        stop_after: Checks without improvement before training stops.
        factor: What the rate of every parameter group is multiplied by.

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
        drop_after: int = 5,
        stop_after: int = 11,
        factor: float = 0.1,
    ) -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"mode must be 'min' or 'max'; got {mode!r}.")
        if not (drop_after >= 1 and stop_after >= 1):
            raise MisconfigurationException(
                f"drop_after and stop_after must be at least 1; got {drop_after} and {stop_after}."
            )
        if not 0 < factor < 1:
            raise MisconfigurationException(f"factor must be between 0 and 1; got {factor}.")
        self.monitor, self.mode, self.drop_after, self.stop_after, self.factor = (
            monitor,
            mode,
            drop_after,
            stop_after,
            factor,
        )
        self.best: float | None = None
        self.stagnant = 0

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            monitor=self.monitor, mode=self.mode, drop_after=self.drop_after, stop_after=self.stop_after
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; the streak of a run that is resumed comes from its checkpoint."""
        if stage == "fit":
            self.best, self.stagnant = None, 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """The best value so far and the length of the present streak."""
        return {"best": self.best, "stagnant": self.stagnant}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a streak from a checkpoint."""
        self.best, self.stagnant = state_dict["best"], state_dict["stagnant"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not go on with a run that had stopped."""
        trainer.should_stop = trainer.should_stop or self.stagnant >= self.stop_after

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the metric with the best, and drop the rate or stop."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"PlateauSchedule monitors {self.monitor!r}, which was not logged; logged were "
                f"{sorted(trainer.callback_metrics)}."
            )
        # The mean over processes: a metric that was logged without sync_dist must not let them part.
        logged = trainer.callback_metrics[self.monitor].to(pl_module.device)
        value = float(trainer.strategy.reduce(logged, reduce_op="mean"))
        best = self.best if self.best is not None else (-inf if self.mode == "max" else inf)
        if value > best if self.mode == "max" else value < best:
            self.best, self.stagnant = value, 0
            return
        self.stagnant += 1
        if self.stagnant == self.drop_after:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= self.factor
        if self.stagnant >= self.stop_after:
            trainer.should_stop = True
