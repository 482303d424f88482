"""Cost of a training step of Numbers, and where it comes from: loops that take turns in one process.

python experiments/bench_training.py
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_tools import take_turns
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize import TaskLearner
from pl_personalize.datamodules.loader import tensor_loader
from pl_personalize.datamodules.numbers import IMAGE_SHAPE
from pl_personalize.models import mlp
from pl_personalize.runner.command_line import run_script
from pl_personalize.runner.results import markdown_table
from pl_personalize.stages.checkpoints import Checkpoints
from pl_personalize.stages.metrics_log import MetricsLog, StageLogger

BATCH = 20


class Bare(LightningModule):
    """Minimal module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(IMAGE_SHAPE, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)


def fit(module: LightningModule, images: Tensor, labels: Tensor, folder: Path | None = None) -> None:
    """Train for one epoch; with a folder, as in the runner: with checkpoints, schedule and a log."""
    callbacks = [] if folder is None else [Checkpoints(folder)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False if folder is None else StageLogger(MetricsLog(folder / "metrics.jsonl"), "train/task1"),
        callbacks=[*callbacks],
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    val = None if folder is None else tensor_loader(images[:BATCH], labels[:BATCH], batch_size=BATCH)
    trainer.fit(module, tensor_loader(images, labels, batch_size=BATCH, shuffle=True, repeat=True), val)


def loop(batches: Callable[[], DataLoader[list[Tensor]]]) -> None:
    """Train for one epoch in plain PyTorch."""
    network = mlp(IMAGE_SHAPE, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()


def main(rounds: PositiveInt = 7, steps: PositiveInt = 400, num_threads: PositiveInt = 1) -> None:
    """Time loops that take turns.

    Args:
        rounds: Turns of each loop; the median counts.
        steps: Training steps per turn.
        num_threads: Threads for PyTorch.
    """
    torch.set_num_threads(num_threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    images, labels = torch.randn(steps * BATCH, *IMAGE_SHAPE), torch.randint(0, 2, (steps * BATCH,))
    anchor = mlp(IMAGE_SHAPE, 2).body.state_dict()
    with tempfile.TemporaryDirectory() as scratch:
        loops: dict[str, Callable[[], None]] = {
            "plain PyTorch, our loader": lambda: loop(lambda: tensor_loader(images, labels, batch_size=BATCH)),
            "plain PyTorch, DataLoader of samples": lambda: loop(
                lambda: DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True)
            ),
            "Lightning, minimal module": lambda: fit(Bare(), images, labels),
            "TaskLearner, nothing else": lambda: fit(TaskLearner(mlp(IMAGE_SHAPE, 2)), images, labels),
            "TaskLearner with L2-transfer, checkpoints and log": lambda: fit(
                TaskLearner(mlp(IMAGE_SHAPE, 2), anchor=anchor), images, labels, Path(scratch)
            ),
        }
        seconds = take_turns(loops, rounds, warm_up=1)
    base = seconds["plain PyTorch, our loader"]
    lines = [[name, f"{1000 * found / steps:.2f}", f"{found / base:.2f}"] for name, found in seconds.items()]
    print(markdown_table([["loop", "ms per step", "ratio"], *lines]))
    print(f"\nMedian of {rounds} turns of {steps} steps; MLP 100-100, batches of {BATCH}, {num_threads} thread(s).")


if __name__ == "__main__":
    run_script(main)
