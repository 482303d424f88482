"""Personalised digits: merge five experts for a user with a scanner and a user with a camera.

Compares MAS-RACL, FIM-RACL, MAS-IMM, FIM-IMM and mean-IMM on scikit-learn's handwritten digits. Nothing is downloaded.

    python experiments/digits.py
    python experiments/digits.py --seeds '[7]' --training.lr 0.02 --output_dir runs/mine
    python experiments/digits.py --config experiments/configs/digits.yaml --wandb.mode online
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize import ArtifactError
from pl_personalize.datamodules import DigitsDataModule
from pl_personalize.datamodules.digits import IMAGE_SHAPE
from pl_personalize.models import mlp
from pl_personalize.runner import (
    MERGES_AND_BOUNDS,
    BaselineOptions,
    ImportanceOptions,
    LoggerName,
    TrainerOptions,
    TrainingOptions,
    WandbOptions,
    run_experiment,
)

TRAINING = TrainingOptions(epochs=20, lr=0.01)
IMPORTANCE = ImportanceOptions()
BASELINES = BaselineOptions()
TRAINER = TrainerOptions(accelerator="cpu")
WANDB = WandbOptions()


def main(
    seeds: Sequence[int] | int = (1, 2, 3, 4),
    methods: Sequence[str] | str = MERGES_AND_BOUNDS,
    hidden: Sequence[PositiveInt] = (100, 100),
    batch_size: PositiveInt = 20,
    split_seed: int = 27,
    training: TrainingOptions = TRAINING,
    importance: ImportanceOptions = IMPORTANCE,
    baselines: BaselineOptions = BASELINES,
    trainer: TrainerOptions = TRAINER,
    loggers: Sequence[LoggerName] | LoggerName = ("wandb",),
    wandb: WandbOptions = WANDB,
    num_threads: PositiveInt = 1,
    output_dir: Path = Path("runs/digits"),
) -> None:
    """Merge five experts on handwritten digits, for a user with a scanner and a user with a camera.

    Args:
        seeds: One or several, of initial parameters and of the order of the data.
        methods: What is compared, one or several: the merges ``MAS-RACL``, ``FIM-RACL``, ``MAS-IMM``, ``FIM-IMM``,
            ``mean-IMM``; the others ``MAS``, ``EWC``, ``LwF``, ``Finetune``, ``FT``, ``Experts``, ``Joint``.
        hidden: Widths of the hidden layers.
        batch_size: For training.
        split_seed: Seed of the division of the images among server and users.
        training: How experts are trained.
        importance: How importances are estimated.
        baselines: Methods that do not merge: ``MAS``, ``EWC``, ``LwF``, ``FT``.
        trainer: For the Lightning Trainers.
        loggers: Who follows the runs: ``wandb``, ``csv``, ``tensorboard``; one, several, or none.
        wandb: Tracking in Weights & Biases.
        num_threads: Threads for PyTorch; more do not help networks this small.
        output_dir: Folder of the run. Run again, it goes on where it was.
    """
    if not hidden:
        raise MisconfigurationException(
            "hidden must have at least one width: without hidden layers, nothing is shared."
        )
    torch.set_num_threads(num_threads)
    run_experiment(
        "Digits",
        f"MLP {'-'.join(map(str, hidden))}",
        DigitsDataModule(batch_size=batch_size, split_seed=split_seed),
        lambda num_classes: mlp(IMAGE_SHAPE, num_classes, hidden),
        methods=methods,
        seeds=seeds,
        training=training,
        importance=importance,
        baselines=baselines,
        trainer=trainer,
        loggers=loggers,
        wandb=wandb,
        output_dir=output_dir,
        options={"batch_size": batch_size, "split_seed": split_seed},
    )


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except (ArtifactError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")
