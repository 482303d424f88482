"""What ``numbers.py`` runs; see there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize import ArtifactError
from pl_personalize.datamodules import NumbersDataModule
from pl_personalize.datamodules.numbers import IMAGE_SHAPE
from pl_personalize.models import cnn_bn, mlp
from pl_personalize.runner import (
    METHODS,
    AdaptationName,
    AdaptationOptions,
    ImportanceOptions,
    LoggerName,
    MethodName,
    TrainerOptions,
    TrainingOptions,
    WandbOptions,
    paper_results,
    run_experiment,
)

PAPER_SOURCES = ("svhn", "mnist")
PAPER_HIDDEN = (100, 100)
TRAINING = TrainingOptions()
IMPORTANCE = ImportanceOptions()
ADAPTATION = AdaptationOptions()
TRAINER = TrainerOptions(accelerator="cpu")
WANDB = WandbOptions()


def main(
    data_dir: Path = Path("data"),
    sources: Sequence[str] = PAPER_SOURCES,
    download: bool = False,
    max_per_source: PositiveInt | None = 10_000,
    split_seed: int = 27,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    methods: Sequence[MethodName] = tuple(METHODS),
    backbone: Literal["mlp", "cnn_bn"] = "mlp",
    hidden: Sequence[PositiveInt] = PAPER_HIDDEN,
    adaptations: Sequence[AdaptationName] | None = None,
    adaptation: AdaptationOptions = ADAPTATION,
    batch_size: PositiveInt = 20,
    eval_batch_size: PositiveInt = 1000,
    training: TrainingOptions = TRAINING,
    importance: ImportanceOptions = IMPORTANCE,
    trainer: TrainerOptions = TRAINER,
    loggers: Sequence[LoggerName] = ("wandb",),
    wandb: WandbOptions = WANDB,
    num_threads: PositiveInt = 1,
    output_dir: Path = Path("runs/numbers"),
) -> None:
    """Train, merge and test on Numbers, for a user of each source.

    Args:
        data_dir: Folder of the collections that have names.
        sources: Names (``svhn``, ``mnist``, ``usps``) or folders with ``{train,test}/<digit>/*``; each is one user.
        download: Fetch collections that are missing.
        max_per_source: Cap on the server's images of a task and source; null for all.
        split_seed: Seed of the choice and the division of the images.
        seeds: Seeds of initial parameters and of the order of the data.
        methods: What is compared.
        backbone: ``mlp``, the paper's, or ``cnn_bn``: four blocks of convolution and batch norm.
        hidden: Widths of the hidden layers of ``mlp``.
        adaptations: Of batch norm, for ``cnn_bn``, under which methods are tested: ``last``, ``average``, ``expert``,
            ``reference``, ``recalibrate``, ``AdaBN``, ``AdaBN-S``; by default ``AdaBN``.
        adaptation: How batch norm is adapted.
        batch_size: For training.
        eval_batch_size: For importances, adaptation and tests; it matters for ``--importance.reduction batch`` and for
            batch norm that is not adapted with ``--adaptation.exact true``.
        training: How models are trained.
        importance: How importances are estimated.
        trainer: For the Lightning Trainers.
        loggers: Who follows the runs: ``wandb``, ``csv``, ``tensorboard``; several, or none.
        wandb: Tracking in Weights & Biases.
        num_threads: Threads for PyTorch; more do not help networks this small.
        output_dir: Folder of the run. Run again, it goes on where it was.
    """
    torch.set_num_threads(num_threads)
    data = NumbersDataModule(
        data_dir,
        sources,
        download=download,
        max_per_source=max_per_source,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        split_seed=split_seed,
    )
    if backbone != "mlp" and tuple(hidden) != PAPER_HIDDEN:
        raise MisconfigurationException(f"hidden is for the backbone mlp alone; got {list(hidden)} with {backbone}.")
    same = set(sources) == set(PAPER_SOURCES)
    different = "" if same else f", here {', '.join(data.users)}: compare methods, not levels"
    with_paper = backbone == "mlp" and tuple(hidden) == PAPER_HIDDEN
    run_experiment(
        "Numbers",
        "CNN-BN" if backbone == "cnn_bn" else f"MLP {'-'.join(map(str, hidden))}",
        data,
        lambda n: cnn_bn(IMAGE_SHAPE, n) if backbone == "cnn_bn" else mlp(IMAGE_SHAPE, n, hidden),
        methods=methods,
        seeds=seeds,
        output_dir=output_dir,
        training=training,
        importance=importance,
        trainer=trainer,
        adaptations=adaptations,
        adaptation=adaptation,
        loggers=loggers,
        wandb=wandb,
        options={
            "data_dir": str(data_dir.expanduser().resolve()),
            "sources": list(sources),
            "max_per_source": max_per_source,
            "split_seed": split_seed,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
        },
        paper=paper_results("Numbers", "MLP") if with_paper else None,
        paper_note=f"In the paper, the users are svhn and mnist{different}.",
    )


def run() -> None:
    """Take the options of the command line."""
    try:
        auto_cli(main, as_positional=False)
    except (ArtifactError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")
