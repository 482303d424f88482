"""Base class for callbacks that estimate something on data."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal
from uuid import uuid4

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

from pl_personalize.callbacks.data_source import DataSource, Stage
from pl_personalize.callbacks.pass_over_data import (
    PassOverData,
    can_be_tried_out,
    parts_of_batch,
    two_samples,
)
from pl_personalize.callbacks.requirements import check_trainer, naming_errors
from pl_personalize.callbacks.result_slot import ResultSlot


class EstimationCallback(Callback, ABC):
    """Reads data, estimates something and writes the result to a file that other processes can find.

    Subclasses define :attr:`folder`, :attr:`default_filename`, :meth:`check_module` and :meth:`estimate`.
    """

    folder: ClassVar[str]
    """Default folder of the files, below the logger's folder."""
    default_filename: str
    """Default name of the file, without extension."""
    reads_again: ClassVar[bool] = False
    """Whether the data of a pass are read more than once, so that the batches of an iterator must be kept."""

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None = None,
        *,
        weights: Literal["best", "last"] = "best",
        module: str | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
    ) -> None:
        super().__init__()
        with naming_errors(self):
            self.source = DataSource(dataloader)
        if weights not in ("best", "last"):
            raise MisconfigurationException(f"weights must be 'best' or 'last'; got {weights!r}.")
        self.dataloader, self.weights, self.module, self.forward = dataloader, weights, module, forward
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.filename = filename or self.default_filename
        self._slot = ResultSlot()
        self._result: Any = None
        self._mark: str | None = None  # the run that produced the result
        self._awaits_batch = False  # whether the first training batch is to be tried out

    @property
    def path(self) -> str | None:
        """File of the last result; ``None`` if none was written."""
        return self._slot.path

    def should_estimate(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether to estimate now. Override to decide otherwise."""
        return True

    @abstractmethod
    def check_module(self, pl_module: LightningModule) -> bool:
        """Whether there is anything to estimate; raises ``MisconfigurationException`` for options that do not fit."""

    @abstractmethod
    def estimate(
        self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], *, trial: bool = False
    ) -> Any:
        """Estimate over batches on this process; ``trial``: over two samples, whose result is discarded."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse invalid options before any training."""
        check_trainer(self, trainer, pl_module)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is not self and isinstance(other, EstimationCallback) and self._same_file(other):
                raise MisconfigurationException(
                    f"{type(self).__name__} and {type(other).__name__} would write the same file, "
                    f"{self.filename}.safetensors. Set filename= or dirpath= for one."
                )
        if stage == "fit":
            with naming_errors(self):
                self.source.check(trainer, pl_module)
            no_data = self.dataloader is None and trainer.limit_train_batches == 0
            if no_data and self.should_estimate(trainer, pl_module):
                raise MisconfigurationException(
                    f"{type(self).__name__} has no data: limit_train_batches=0. Pass data with dataloader=."
                )
        if not is_overridden("configure_model", pl_module):  # else the layers may not exist yet
            self.check_module(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data and a folder that cannot be used, and estimate over two samples of loaders that were passed."""
        if not self.should_estimate(trainer, pl_module) or not self.check_module(pl_module):
            return
        with naming_errors(self):
            self.source.check_loaders(trainer, pl_module)
        self.refuse_unwritable(trainer)
        self._awaits_batch = self.source.loaders is None
        loaders = [loader for loader in self.source.loaders or [] if can_be_tried_out(loader)]
        if loaders:
            with naming_errors(self):
                batches = PassOverData(trainer, loaders, [1] * len(loaders))
            self._try_out(trainer, pl_module, batches, len(loaders))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Estimate over two samples of the first training batch, so that errors surface before the first step.

        Reading the train loaders instead would change what loaders with a state of their own yield to the training.
        """
        if not self._awaits_batch or batch is None:
            return
        self._awaits_batch = False
        is_sequential = trainer.fit_loop._combined_loader._mode == "sequential"  # type: ignore[union-attr]
        parts = [batch] if is_sequential else parts_of_batch(trainer.train_dataloader, batch)
        if self.source.reads_train:
            self._try_out(trainer, pl_module, parts, len(parts))
        elif len(parts) == 1:  # hooks or forward= for another stage need not fit those of several train loaders
            try:
                self._try_out(trainer, pl_module, parts, 1)
            except MisconfigurationException as error:
                rank_zero_warn(
                    f"A trial on a training batch failed: {error} The estimate after the training will fail, too, "
                    f"unless the batches of dataloader={self.dataloader!r} have another form."
                )

    def _try_out(self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], num_loaders: int) -> None:
        """Estimate over two samples of each batch."""
        try:
            with warnings.catch_warnings():  # the pass itself gives them
                warnings.simplefilter("ignore")
                self.estimate(trainer, pl_module, two_samples(batches), trial=True)
        except Exception as error:  # the module's forward may raise anything
            what = str(error)
            if not isinstance(error, ValueError):
                what = (
                    f"{type(error).__name__}: {error}. Define the output for a batch: forward=lambda module, batch: …"
                )
            each = " Each of the dataloaders is read by itself: a batch comes from one of them."
            raise MisconfigurationException(
                f"{type(self).__name__} on {type(pl_module).__name__}: {what}{each if num_loaders > 1 else ''}"
            ) from error

    # For subclasses

    def data(self, trainer: Trainer, pl_module: LightningModule, running: Stage) -> PassOverData:
        """The data that were passed or named, or else those of the running stage."""
        with naming_errors(self):
            return self.source.read(trainer, pl_module, running, again=self.reads_again)

    def result(self, load: Callable[[str], Any]) -> Any:
        """The last result, read from its file if another process produced it; ``None`` before the first."""
        if self._mark != self._slot.mark and self.path is not None:
            self._result, self._mark = load(self.path), self._slot.mark
        return self._result

    def finish(self, trainer: Trainer, result: Any) -> None:
        """Keep a result and write its file, except in a trial run (``fast_dev_run``)."""
        self._result, problem, path = result, "", None
        mark = uuid4().hex
        if _is_trial(trainer):
            rank_zero_info(f"{type(self).__name__} writes no file in a trial run (fast_dev_run).")
        else:
            mark, path = trainer.strategy.broadcast((mark, str(self.resolve_path(trainer))))
            if trainer.is_global_zero:
                try:
                    result.save(path)
                except OSError as error:
                    problem = str(error)
            if problem := trainer.strategy.broadcast(problem):
                raise MisconfigurationException(
                    f"{type(self).__name__} cannot write {path} ({problem}). The result is in memory, as an attribute "
                    "of the callback: save it elsewhere with its save(), and set dirpath= for the next run."
                )
        self._mark = mark
        self._slot.write(mark, path)

    def resolve_path(self, trainer: Trainer) -> Path:
        """Path of the file; the same on all ranks once rank zero's is broadcast."""
        folder = self.dirpath
        if folder is None:
            folder = Path(trainer.default_root_dir)
            if trainer.loggers and (save_dir := trainer.loggers[0].save_dir) is not None:
                logger = trainer.loggers[0]
                version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
                folder = Path(save_dir, str(logger.name), version)
            folder = folder / self.folder
        return folder / f"{self.filename}.safetensors"

    def refuse_unwritable(self, trainer: Trainer) -> None:
        """Refuse a file that cannot be written, before the estimate."""
        if _is_trial(trainer):
            return
        problem = ""
        if trainer.is_global_zero:
            path = self.resolve_path(trainer)
            there = next(parent for parent in path.parents if os.path.exists(parent))
            if os.path.isdir(path):
                problem = f"{path}: it is a folder"
            elif not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
                problem = f"{path}: {there} is not a writable folder"
        if problem := trainer.strategy.broadcast(problem):
            raise MisconfigurationException(f"{type(self).__name__} cannot write {problem}. Set dirpath=.")

    def _same_file(self, other: EstimationCallback) -> bool:
        same_folder = self.dirpath == other.dirpath and (self.dirpath is not None or self.folder == other.folder)
        return same_folder and self.filename == other.filename


def _is_trial(trainer: Trainer) -> bool:
    """Whether this is a trial run (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))
