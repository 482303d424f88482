"""Personalised digits: merge five experts for a user with a scanner and a user with a camera.

Compares MAS-RACL, FIM-RACL, MAS-IMM, FIM-IMM and mean-IMM on scikit-learn's handwritten digits. Nothing is downloaded.

    python experiments/digits.py
    python experiments/digits.py --seeds '[7]' --training.lr 0.02 --output_dir runs/mine
    python experiments/digits.py --config experiments/configs/digits.yaml --wandb.mode online
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.datamodules import DigitsDataModule
from pl_personalize.datamodules.digits import IMAGE_SHAPE
from pl_personalize.models import mlp
from pl_personalize.runner import TrainerOptions, TrainingOptions, run_experiment
from pl_personalize.runner.command_line import errors_in_one_line

TRAINING = TrainingOptions(epochs=20, lr=0.01)
TRAINER = TrainerOptions(accelerator="cpu")


def main(
    hidden: Sequence[PositiveInt] = (100, 100),
    batch_size: PositiveInt = 20,
    split_seed: int = 27,
    seeds: Sequence[int] | int = (1, 2, 3, 4),
    training: TrainingOptions = TRAINING,
    trainer: TrainerOptions = TRAINER,
    num_threads: PositiveInt = 1,
    **options: Any,
) -> None:
    """Merge five experts on handwritten digits, for a user with a scanner and a user with a camera.

    Args:
        hidden: Widths of the hidden layers.
        batch_size: For training.
        split_seed: Seed of the division of the images among server and users.
        seeds: One or several, of initial parameters and of the order of the data.
        training: How models are trained.
        trainer: For the Lightning Trainers.
        num_threads: Threads for PyTorch; more do not help networks this small.
        **options: Of :func:`~pl_personalize.runner.run_experiment`.
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
        seeds=seeds,
        training=training,
        trainer=trainer,
        options={"batch_size": batch_size, "split_seed": split_seed},
        paper=None,
        paper_note=None,
        **options,
    )


if __name__ == "__main__":
    with errors_in_one_line():
        auto_cli(main, as_positional=False)
