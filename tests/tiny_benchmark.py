"""Two tasks of two classes for two users, in no time: for tests of what a run does, not of what it finds."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pl_personalize.artifacts import TensorFile
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.datamodules.base import LabelledImages
from pl_personalize.models import TaskNetwork
from pl_personalize.runner import Experiment, TrainerOptions, TrainingOptions, run_experiment
from pl_personalize.runner.results import ResultRow
from pl_personalize.stages.run_folder import RunFolder, Stage


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


def experiment(
    folder: Path,
    *,
    data: TaskIncrementalDataModule | None = None,
    network: Callable[[int], TaskNetwork] = plain,
    **options: Any,
) -> Experiment:
    """An experiment with short training, by default of the plain mean, with one seed and without loggers."""
    defaults: dict[str, Any] = {
        "methods": ["mean-IMM"],
        "seeds": 1,
        "loggers": [],
        "training": TrainingOptions(epochs=1, lr=0.1),
        "trainer": TrainerOptions(accelerator="cpu"),
    }
    return Experiment("Tiny", data or Tiny(), network, "net", output_dir=folder, **(defaults | options))


def call(folder: Path, **options: Any) -> list[ResultRow]:
    """Run an :func:`experiment`; its figures are white."""
    with white_figures():
        return run_experiment(experiment(folder, **options))


@contextmanager
def white_figures() -> Iterator[None]:
    """Drawing takes longer than all else in a tiny experiment, so files of figures hold one white pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\xff")) + chunk(b"IEND", b"")
    with mock.patch.object(Figure, "savefig", lambda self, path, **options: Path(path).write_bytes(content)):
        yield


class KilledError(Exception):
    """Stands for a signal that ends the process."""


class Finished:
    """Notes the stages that are finished, in order; the process dies before or after one of them is.

    Args:
        monkeypatch: Undoes it.
        dies_before: End of the name of a stage that does everything but is not recorded as finished.
        dies_after: End of the name of the last stage to be finished.
    """

    def __init__(self, monkeypatch: Any, *, dies_before: str | None = None, dies_after: str | None = None) -> None:
        self.stages: list[str] = []
        finish = RunFolder.finish

        def spy(folder: RunFolder, stage: str, **options: Any) -> Stage:
            if dies_before is not None and stage.endswith(dies_before):
                raise KilledError
            self.stages.append(stage)
            done = finish(folder, stage, **options)
            if dies_after is not None and stage.endswith(dies_after):
                raise KilledError
            return done

        monkeypatch.setattr(RunFolder, "finish", spy)


def matrix(folder: Path, stage: str) -> list[list[float]]:
    """The accuracies that a test stage found, such as ``experts/seed1/test/mean-IMM/ann``."""
    found: list[list[float]] = json.loads((folder / "manifest.json").read_text())["stages"][stage]["result"]["matrix"]
    return found


def model(folder: Path, family: str, task: int) -> dict[str, Tensor]:
    """The trained model of a task, from 1; that of the first task is shared by all families."""
    family = "first" if task == 1 and family != "Joint" else family
    return TensorFile(folder / "checkpoints" / family / "seed1" / f"task{task}.safetensors", kind="expert").load()


def loaded(state: dict[str, Tensor], make: Callable[[int], TaskNetwork] = plain) -> TaskNetwork:
    """A network with the entries of a trained model."""
    network = make(2)
    network.load_state_dict({name: value for name, value in state.items() if not name.startswith("old_heads")})
    return network.eval()


def accuracy(network: TaskNetwork, split: LabelledImages) -> float:
    """Share of the images that a network predicts correctly."""
    with torch.no_grad():
        return float((network(split.images).argmax(1) == split.labels).float().mean())
