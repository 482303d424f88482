"""Requirements on a Trainer, and errors that name the callback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_trainer(callback: Callback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse strategies that shard parameters, and a Trainer or module of the ``pytorch_lightning`` package.

    ``pytorch_lightning`` has its own classes, so a callback would not recognize its checkpoints, loggers and
    strategies, and would run as if there were none.
    """
    name = type(callback).__name__
    for what, given in (("Trainer", trainer), ("module", pl_module)):
        if any(parent.__module__.partition(".")[0] == "pytorch_lightning" for parent in type(given).__mro__):
            raise MisconfigurationException(
                f"{name} needs `lightning.pytorch`, but the {what} is from `pytorch_lightning`, whose classes differ. "
                "Change `import pytorch_lightning as pl` to `import lightning.pytorch as pl`."
            )
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"{name} needs whole parameters on every device; the strategy {type(trainer.strategy).__name__} shards "
            "them. Use ddp or a single device."
        )


def is_resumed(trainer: pl.Trainer) -> bool:
    """Whether training resumes from a checkpoint with steps; valid in ``on_train_start``.

    The learning-rate finder also sets ``ckpt_path``, but restarts at step 0.
    """
    return trainer.ckpt_path is not None and trainer.global_step > 0


@contextmanager
def naming_errors(callback: Callback, pl_module: pl.LightningModule | None = None) -> Iterator[None]:
    """Convert a ``ValueError`` into a ``MisconfigurationException`` that names the callback and the module."""
    try:
        yield
    except ValueError as error:
        where = "" if pl_module is None else f" on {type(pl_module).__name__}"
        raise MisconfigurationException(f"{type(callback).__name__}{where}: {error}") from error
