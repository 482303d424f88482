"""Two tasks of two classes for two users, in no time: for what a run does, not for what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.datamodules.base import LabelledImages
from pl_personalize.models import TaskNetwork
from pl_personalize.runner import Experiment, ImportanceOptions, TrainerOptions, TrainingOptions, run_experiment
from pl_personalize.runner.results import ResultRow


class Tiny(TaskIncrementalDataModule):
    """Each split is drawn by a seed of its own."""

    def __init__(self, users: Sequence[str] = ("ann", "bob"), images: int = 12, tasks: int = 2) -> None:
        super().__init__(["a", "b", "c"][:tasks], [("x", "y")] * tasks, list(users), batch_size=4)
        self.images = images

    def split(self, seed: int) -> LabelledImages:
        """Labels shift the images."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(2, (self.images,), generator=generator)
        return LabelledImages(torch.randn(self.images, 4, generator=generator) + labels[:, None], labels)

    def load_server(self, task: int) -> tuple[LabelledImages, LabelledImages]:
        return self.split(task), self.split(10 + task)

    def load_user(self, user: int, task: int) -> tuple[LabelledImages, LabelledImages]:
        return self.split(20 + 3 * user + task), self.split(40 + 3 * user + task)


def plain(classes: int) -> TaskNetwork:
    """Without batch norm."""
    return TaskNetwork(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, classes))


def with_norm(classes: int) -> TaskNetwork:
    """With batch norm."""
    return TaskNetwork(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU()), nn.Linear(5, classes))


def call(
    folder: Path,
    *,
    data: TaskIncrementalDataModule | None = None,
    network: Any = plain,
    methods: Sequence[Any] = ("mean-IMM",),
    seeds: Sequence[int] = (1,),
    loggers: Sequence[Any] = (),
    **options: Any,
) -> list[ResultRow]:
    """An experiment with short training."""
    return run_experiment(
        "Tiny",
        "net",
        data or Tiny(),
        network,
        methods=list(methods),
        seeds=list(seeds),
        output_dir=folder,
        training=options.pop("training", TrainingOptions(epochs=1, lr=0.1)),
        importance=options.pop("importance", ImportanceOptions()),
        trainer=options.pop("trainer", TrainerOptions(accelerator="cpu")),
        loggers=list(loggers),
        **options,
    )
