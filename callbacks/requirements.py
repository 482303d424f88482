"""What the callbacks ask of a Trainer."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_trainer(callback: Callback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse a Trainer or a module of another package, and strategies under which no process has whole parameters.

    ``pytorch_lightning`` has classes of its own: its checkpoints, loggers and strategies are none of
    ``lightning.pytorch``, so that a callback would take them for absent and go on without.

    Raises:
        MisconfigurationException: For ``pytorch_lightning``, FSDP, DeepSpeed and ModelParallel.
    """
    name = type(callback).__name__
    for what, given in (("Trainer", trainer), ("module", pl_module)):
        if any(parent.__module__.partition(".")[0] == "pytorch_lightning" for parent in type(given).__mro__):
            raise MisconfigurationException(
                f"{name} is made for `lightning.pytorch`; the {what} is from `pytorch_lightning`, whose classes are "
                "not the same. Change `import pytorch_lightning as pl` to `import lightning.pytorch as pl`."
            )
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"{name} needs whole parameters on every device; the strategy {type(trainer.strategy).__name__} shards "
            "them. Use ddp or a single device."
        )


def is_resumed(trainer: pl.Trainer) -> bool:
    """Whether a training that begins goes on from a checkpoint with steps; asked in ``on_train_start``.

    A search for a learning rate sets ``ckpt_path``, too, and goes back to step 0.
    """
    return trainer.ckpt_path is not None and trainer.global_step > 0
