"""Trackers of runs, and those that use Lightning's CSV and TensorBoard loggers."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

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


def log10_of_positive(values: Tensor) -> Tensor:
    """Decimal logarithms of the positive entries, flat, on the CPU and in float64."""
    return values[values > 0].double().log10().cpu()


class LoggerTracker:
    """Tracks a server method and seed with one Lightning logger per stage, so that every stage has its own step axis.

    A resumed run is logged again from its beginning, so the folder is emptied first. ``make_logger`` creates a logger
    from the folder and a name.
    """

    def __init__(self, folder: Path, make_logger: Callable[[Path, str], Logger]) -> None:
        self._folder, self._make_logger = folder, make_logger
        self._loggers: dict[str, Logger] = {}
        if folder.exists():
            shutil.rmtree(folder)

    def log(self, record: Record) -> None:
        """Log the metrics of a step; the name of its stage is relative to the run, such as ``train/task1``."""
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
            self._loggers[stage] = self._make_logger(self._folder, clean_name(stage.replace("/", "-"), r"\w.+-"))
        return self._loggers[stage]


def clean_name(name: str, kept: str = "a-zA-Z0-9_.-", limit: int = 128) -> str:
    """The name if it is short and has only the kept characters, else cleaned, shortened and with a hash added.

    Defaults are those of W&B's artifacts.

    Example:
        >>> clean_name("a b"), clean_name("a-b")
        ('a-b-c8687a08', 'a-b')
    """
    plain = re.sub(f"[^{kept}]+", "-", name)
    if plain == name and len(name) <= limit:
        return name
    return f"{plain[9 - limit :]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


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
