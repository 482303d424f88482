"""What the runs of a call have in common, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.models import TaskNetwork
from pl_personalize.runner.methods import AdaptationName
from pl_personalize.runner.options import (
    AdaptationOptions,
    ArtifactName,
    BaselineOptions,
    ImportanceOptions,
    TestedModels,
    TrainerOptions,
    TrainingOptions,
)
from pl_personalize.runner.run_folder import RunFolder, Stage


@dataclass(frozen=True)
class Setting:
    """What the runs of a call have in common.

    Attributes:
        folder: Where results go.
        data: The benchmark.
        make_network: Makes the network for a number of classes; called with the global generator seeded.
        training: How models are trained.
        importance: How importances are estimated.
        trainer: Passed on to Trainers.
        adaptations: Of batch norm, under which every method is tested.
        adaptation: How batch norm is adapted.
        baselines: Methods that do not merge.
        models: What is tested of a sequence of models.
    """

    folder: RunFolder
    data: TaskIncrementalDataModule
    make_network: Callable[[int], TaskNetwork]
    training: TrainingOptions
    importance: ImportanceOptions
    trainer: TrainerOptions
    adaptations: Sequence[AdaptationName]
    adaptation: AdaptationOptions
    baselines: BaselineOptions
    models: TestedModels = "all"


class RunFile(NamedTuple):
    """A file that a run made: what it is, where, and the run's files that it was made of."""

    what: ArtifactName
    path: Path
    sources: Sequence[Path]


class Work(NamedTuple):
    """A stage that may have to be done: its name, and what does it."""

    name: str
    run: Callable[[], Stage]

    @property
    def kind(self) -> str:
        """``train``, ``importance``, ``tune``, ``merge`` or ``test``."""
        return self.name.split("/")[2]
