"""Who follows an experiment: Weights & Biases, TensorBoard, CSV files, several of them, or nobody."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_personalize.importance import Importance
from pl_personalize.runner.metrics_log import Record
from pl_personalize.runner.results import ResultRow, results_table


@dataclass(frozen=True)
class RunResults:
    """What a server method's run with one seed came to.

    Attributes:
        rows: The rows of the results, with means over users.
        matrices: The accuracies, model by task, in [0, 1], by method (with its adaptation) and user.
        val_acc: The best validation accuracy of each trained model, in [0, 1], by its stage, such as ``task1``.
        figures: Drawings of accuracies (never an image of a user).
    """

    rows: Sequence[ResultRow]
    matrices: Mapping[tuple[str, str], Tensor]
    val_acc: Mapping[str, float]
    figures: Sequence[Path]


class Tracker(Protocol):
    """Somebody who follows a run: one server method with one seed."""

    def log(self, record: Record) -> None:
        """Take the metrics of a step; its stage is named relative to the run, such as ``train/task1``."""

    def log_importance(self, owner: str, task: int, importance: Importance) -> None:
        """Take an owner's importances for a task's expert (task from 1)."""

    def log_results(self, results: RunResults) -> None:
        """Take the results."""

    def finish(self) -> None:
        """The run is over, or was interrupted."""


class LoggerTracker:
    """Passes a run on to Lightning loggers, one for each stage, so that every stage has its own step axis.

    A run that goes on is passed on again from its beginning, so the folder is emptied first.

    Args:
        folder: What the loggers write below; emptied.
        make_logger: Makes the logger of a folder and a name.
    """

    def __init__(self, folder: Path, make_logger: Callable[[Path, str], Logger]) -> None:
        self._folder, self._make_logger = folder, make_logger
        self._loggers: dict[str, Logger] = {}
        if folder.exists():
            shutil.rmtree(folder)

    def log(self, record: Record) -> None:
        """Log the metrics of a step."""
        self._logger(record.stage).log_metrics(record.metrics, record.step)

    def log_importance(self, owner: str, task: int, importance: Importance) -> None:
        """Log the distribution of the values, to loggers that can."""
        logger = self._logger(f"importance/{owner}/{importance.kind}/task{task}")
        if isinstance(logger, TensorBoardLogger):
            for name, value in importance.items():
                if (positive := value[value > 0]).numel():
                    logger.experiment.add_histogram(f"importance/log10/{name}", positive.double().log10())

    def log_results(self, results: RunResults) -> None:
        """Log average accuracy and forgetting of each method and user."""
        logger = self._logger("results")
        values = {f"{row.label}/{row.user}/avg_acc": row.avg_acc for row in results.rows}
        values |= {f"{r.label}/{r.user}/forgetting": r.forgetting for r in results.rows if r.forgetting is not None}
        logger.log_metrics(values, 0)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("results", results_table(results.rows))

    def finish(self) -> None:
        """Close the files."""
        for logger in self._loggers.values():
            logger.finalize("success")

    def _logger(self, stage: str) -> Logger:
        if stage not in self._loggers:
            self._loggers[stage] = self._make_logger(self._folder, _as_name(stage))
        return self._loggers[stage]


def _as_name(stage: str) -> str:
    """A stage's name as that of a folder; names that differ in other characters alone stay different."""
    name = stage.replace("/", "-")
    plain = re.sub(r"[^\w.+-]+", "-", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(stage.encode()).hexdigest()[:6]}"


def csv_tracker(folder: Path) -> LoggerTracker:
    """A ``metrics.csv`` for each stage."""
    return LoggerTracker(folder, lambda place, name: CSVLogger(place.parent, place.name, name))


def tensorboard_tracker(folder: Path) -> LoggerTracker:
    """An event file for each stage, which TensorBoard shows as runs side by side.

    Raises:
        MisconfigurationException: If TensorBoard is not installed.
    """
    if not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise MisconfigurationException("The logger 'tensorboard' needs a package: pip install tensorboard")
    return LoggerTracker(folder, lambda place, name: TensorBoardLogger(place.parent, place.name, name))
