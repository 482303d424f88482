"""Checkpoints of a training stage while it runs."""

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
    """Load a checkpoint of a stage, on the CPU.

    Raises:
        ArtifactError: If it is damaged.
        OSError: If it is missing or cannot be read.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except OSError:
        raise  # names the file and the error
    except Exception as error:  # PyTorch does not document its errors for damaged files
        raise ArtifactError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}). Remove {path.parent} to restart "
            "the stage."
        ) from error


def resume_path(folder: Path) -> Path:
    """The checkpoint to resume from, in a folder of checkpoints."""
    return folder / "last.ckpt"


class Checkpoints(ModelCheckpoint):
    """Saves the model with the best validation accuracy, and regularly a checkpoint to resume from.

    The latter is never saved at the last step of an epoch, from which Lightning would resume without validation.

    Args:
        folder: Folder of the checkpoints.
        seconds: Seconds between two checkpoints to resume from.
    """

    def __init__(self, folder: Path, seconds: float = 30) -> None:
        super().__init__(folder, "best", monitor="val/acc", mode="max", enable_version_counter=False)
        self.resume, self._seconds, self._saved = resume_path(folder), seconds, time.monotonic()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._saved >= self._seconds and not trainer.is_last_batch:
            trainer.save_checkpoint(self.resume)
            self._saved = time.monotonic()
