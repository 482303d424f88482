"""What callbacks that read or change whole parameters cannot work with."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def refuse_sharded_parameters(callback: Callback, trainer: Trainer) -> None:
    """Refuse strategies under which a process does not hold whole parameters.

    Raises:
        MisconfigurationException: For FSDP, DeepSpeed and ModelParallel.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"{type(callback).__name__} needs whole parameters on every device; the strategy "
            f"{type(trainer.strategy).__name__} shards them. Use ddp or a single device."
        )
