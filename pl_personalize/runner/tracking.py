"""Trackers of runs, and those that use Lightning's CSV and TensorBoard loggers."""

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
from pl_personalize.runner.results import ResultRow, results_table
from pl_personalize.stages.metrics_log import Record


@dataclass(frozen=True)
class RunResults:
    """Results of one server method and seed.

    Attributes:
        rows: Rows of the table of results, including means over users.
        matrices: Accuracy matrices (model × task, in [0, 1]) by label and user.
        val_acc: Best validation accuracy of each trained model, in [0, 1], by its stage, such as ``task1``.
        figures: Figures of accuracies; they contain no images of users.
    """

    rows: Sequence[ResultRow]
    matrices: Mapping[tuple[str, str], Tensor]
    val_acc: Mapping[str, float]
    figures: Sequence[Path]

    def by_name(self) -> dict[str, float]:
        """Average accuracies and forgetting as ``<label>/<user>/avg_acc`` and ``<label>/<user>/forgetting``."""
        values = {
            f"{r.label}/{r.user}/{name}": getattr(r, name) for r in self.rows for name in ("avg_acc", "forgetting")
        }
        return {name: value for name, value in values.items() if value is not None}


class Tracker(Protocol):
    """Tracks a run, that is, one server method with one seed."""

    def log(self, record: Record) -> None:
        """Log the metrics of a step; the name of its stage is relative to the run, such as ``train/task1``."""

    def log_importance(self, owner: str, task: int, importance: Importance) -> None:
        """Log an owner's importances for the expert of a task (counted from 1)."""

    def log_results(self, results: RunResults) -> None:
        """Log the results."""

    def finish(self) -> None:
        """Close the tracker after the run has finished or was interrupted."""


def log10_of_positive(values: Tensor) -> Tensor:
    """Decimal logarithms of the positive entries, flat, on the CPU and in float64."""
    return values[values > 0].double().log10().cpu()


class LoggerTracker:
    """Tracks a run with one Lightning logger per stage, so that every stage has its own step axis.

    A resumed run is logged again from its beginning, so the folder is emptied first.

    Args:
        folder: Folder that the loggers write to; emptied.
        make_logger: Function that creates the logger from a folder and a name.
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
        """Log a histogram of each parameter, if the logger is TensorBoard's."""
        logger = self._logger(f"importance/{owner}/{importance.kind}/task{task}")
        if isinstance(logger, TensorBoardLogger):
            for name, value in importance.items():
                if len(logs := log10_of_positive(value)):
                    logger.experiment.add_histogram(f"importance/log10/{name}", logs)

    def log_results(self, results: RunResults) -> None:
        """Log average accuracy and forgetting of each method and user."""
        logger = self._logger("results")
        logger.log_metrics(results.by_name(), 0)
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
    """Folder name of a stage, with a hash if characters had to be replaced, so that it stays unique."""
    name = stage.replace("/", "-")
    plain = re.sub(r"[^\w.+-]+", "-", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(stage.encode()).hexdigest()[:6]}"


def csv_tracker(folder: Path) -> LoggerTracker:
    """Tracker that writes a ``metrics.csv`` for each stage."""
    return LoggerTracker(folder, lambda place, name: CSVLogger(place.parent, place.name, name))


def tensorboard_tracker(folder: Path) -> LoggerTracker:
    """Tracker that writes an event file for each stage; TensorBoard shows the stages as runs.

    Raises:
        MisconfigurationException: If TensorBoard is not installed.
    """
    if not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise MisconfigurationException("The logger 'tensorboard' requires TensorBoard: pip install tensorboard")
    return LoggerTracker(folder, lambda place, name: TensorBoardLogger(place.parent, place.name, name))
