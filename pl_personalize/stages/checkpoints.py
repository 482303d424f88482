"""What a training stage keeps on disk while it runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from pl_personalize.artifacts import ArtifactError


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a stage, on the CPU.

    Raises:
        ArtifactError: If it is damaged or missing.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except OSError:
        raise  # says which file, and what is wrong
    except Exception as error:  # what PyTorch raises at a damaged file is not documented
        raise ArtifactError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}). Remove {path.parent}, and the stage "
            "begins anew."
        ) from error


class Checkpoints(ModelCheckpoint):
    """The model with the best validation accuracy, and now and then a checkpoint to resume from.

    The latter within an epoch, but not at its last step, from where Lightning would go on without its validation.

    Args:
        folder: Where they are.
        seconds: Between two checkpoints to resume from.
    """

    def __init__(self, folder: Path, seconds: float = 30) -> None:
        super().__init__(folder, "best", monitor="val/acc", mode="max", enable_version_counter=False)
        self.resume, self._seconds, self._saved = folder / "last.ckpt", seconds, time.monotonic()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._saved >= self._seconds and not trainer.is_last_batch:
            trainer.save_checkpoint(self.resume)
            self._saved = time.monotonic()
