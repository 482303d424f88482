"""Base class of callbacks that estimate something over data of the user's choice."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal
from uuid import uuid4

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader
from typing_extensions import override

from pl_personalize.callbacks.pass_over_data import (
    PassOverData,
    as_list,
    can_be_read_again,
    refuse_iterators,
    two_samples,
)
from pl_personalize.callbacks.requirements import check_trainer
from pl_personalize.callbacks.result_slot import ResultSlot

Stage = Literal["train", "val", "test", "predict"]
_SETUP_STAGES = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}
_RUNNING_STAGES = {
    "train": RunningStage.TRAINING,
    "val": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
    "predict": RunningStage.PREDICTING,
}
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class EstimationCallback(Callback):
    """Finds its data, and writes its result, which other processes can find; see the subclasses."""

    folder: ClassVar[str]
    """Where files are by default, below the logger's folder."""
    reads_again: ClassVar[bool] = False
    """Whether the data of a pass are read more than once, so that those of an iterator must be kept."""

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None,
        *,
        weights: Literal["best", "last"],
        module: str | None,
        forward: Any,
        dirpath: str | os.PathLike[str] | None,
        filename: str | None,
    ) -> None:
        super().__init__()
        self._stages = _stages(dataloader)
        if unknown := [stage for stage in self._stages if stage not in _SETUP_STAGES]:
            raise MisconfigurationException(
                f"dataloader must be an iterable of batches or one of {', '.join(_SETUP_STAGES)}; got {unknown[0]!r}."
            )
        if isinstance(dataloader, CombinedLoader) and dataloader._mode != "sequential":
            raise MisconfigurationException(
                f"dataloader=CombinedLoader(mode={dataloader._mode!r}) yields batches of several loaders at once, and "
                "a pass reads one loader at a time. Pass a list of the loaders, or mode='sequential'."
            )
        if weights not in ("best", "last"):
            raise MisconfigurationException(f"weights must be 'best' or 'last'; got {weights!r}.")
        self.dataloader, self.weights, self.module, self.forward = dataloader, weights, module, forward
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.filename = filename
        self._slot = ResultSlot()
        self._result: Any = None
        self._mark: str | None = None  # of the run that the result is of

    @property
    def path(self) -> str | None:
        """File of the last result; ``None`` if none was written."""
        return self._slot.path

    @property
    def default_filename(self) -> str:
        """Name of the file, without ending, where none was given."""
        raise NotImplementedError

    @property
    def target(self) -> tuple[Path | None, str]:
        """Folder and name of the file."""
        return self.dirpath, self.filename or self.default_filename

    def should_estimate(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether to estimate now. Override to decide otherwise."""
        return True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any training."""
        check_trainer(self, trainer, pl_module)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is not self and isinstance(other, EstimationCallback) and self._same_file(other):
                raise MisconfigurationException(
                    f"{type(self).__name__} and {type(other).__name__} would write the same file, "
                    f"{self.target[1]}.safetensors. Set filename= or dirpath= for one."
                )
        if stage == "fit":
            for name in self._stages:
                self._hook_owner(trainer, pl_module, name)
            no_data = self.dataloader is None and trainer.limit_train_batches == 0
            if no_data and self.should_estimate(trainer, pl_module):
                raise MisconfigurationException(
                    f"{type(self).__name__} has no data: limit_train_batches=0. Pass them, dataloader=."
                )

    # For subclasses

    def pass_over(
        self,
        trainer: Trainer,
        loaders: Sequence[Iterable[Any]],
        limits: Sequence[float] | None = None,
        stages: Sequence[RunningStage] | None = None,
    ) -> PassOverData:
        """The batches of the loaders, divided among processes."""
        limits = trial_limits(trainer, loaders) if limits is None else limits
        try:
            return PassOverData(trainer, loaders, limits, again=self.reads_again, stages=stages)
        except MisconfigurationException as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    def fit_pass(self, trainer: Trainer, pl_module: LightningModule) -> PassOverData:
        """The data that were chosen; the training's if none were."""
        if self.dataloader is None:
            loaders = as_list(trainer.train_dataloader)
            limits = train_limits(trainer, loaders)
            is_endless = any(sized_len(loader) is None and n == inf for loader, n in zip(loaders, limits, strict=True))
            if is_endless and trainer.fit_loop.total_batch_idx < 0:
                raise MisconfigurationException(
                    f"{type(self).__name__}: the fit makes no step, and its train data do not say where they end. Set "
                    "limit_train_batches, or pass the data, dataloader=."
                )
            return self.run_pass(trainer, loaders, limits)
        return self.chosen_pass(trainer, pl_module)

    def run_pass(self, trainer: Trainer, loaders: Sequence[Iterable[Any]], limits: Sequence[float]) -> PassOverData:
        """The batches of the run's own loaders.

        Raises:
            MisconfigurationException: If they can be read once alone, or cannot be divided among processes.
        """
        try:
            refuse_iterators(loaders)
        except MisconfigurationException as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        return self.pass_over(trainer, loaders, limits)

    def try_out(
        self, trainer: Trainer, pl_module: LightningModule, estimate: Callable[[Iterable[Any]], object]
    ) -> None:
        """Estimate over two samples of each loader, so that what cannot work fails before the training.

        Raises:
            MisconfigurationException: If it does not work, or the data are not such as the pass will see.
        """
        # Of a named stage nothing is set up yet: two training samples have to do.
        loaders = self.given_dataloaders() if self.is_given else as_list(trainer.train_dataloader)
        if self.dataloader is None:
            self.run_pass(trainer, loaders, trial_limits(trainer, loaders))
        elif self.is_given:
            self.pass_over(trainer, loaders)
        if self.dataloader is None and len(loaders) > 1:
            self._refuse_hooks_of_combined_batches(trainer, pl_module)
        self.refuse_unwritable(trainer)
        loaders = [loader for loader in loaders if can_be_read_again(loader)]
        # A hook or forward= for the batches of a named stage need not fit those of several train loaders.
        if not loaders or (self._stages and len(loaders) > 1):
            return
        try:
            with warnings.catch_warnings():  # of two samples they say little; the pass itself gives them
                warnings.simplefilter("ignore")
                estimate(two_samples(PassOverData(trainer, loaders, [1] * len(loaders))))
        except Exception as error:  # whatever a module's forward makes of data that are not its own
            what = str(error)
            if not isinstance(error, ValueError):
                what = (
                    f"{type(error).__name__}: {error}. Say what is computed of a batch: forward=lambda module, batch: …"
                )
            each = " Each of the dataloaders is read by itself: a batch is of one of them." if len(loaders) > 1 else ""
            raise MisconfigurationException(
                f"{type(self).__name__} on {type(pl_module).__name__}: {what}{each}"
            ) from error

    def chosen_pass(self, trainer: Trainer, pl_module: LightningModule) -> PassOverData:
        """The data that were passed or named."""
        if self.is_given:
            return self.pass_over(trainer, self.given_dataloaders())
        loaders: list[Iterable[Any]] = []
        limits: list[float] = []
        running: list[RunningStage] = []
        for stage in self._stages:
            if stage == "train" and trainer.train_dataloader is not None:  # those that were trained on
                found = as_list(trainer.train_dataloader)
                limits += train_limits(trainer, found)
            else:
                owner = self._hook_owner(trainer, pl_module, stage)
                if isinstance(owner, LightningDataModule):
                    owner.setup(_SETUP_STAGES[stage])
                found = as_list(getattr(owner, f"{stage}_dataloader")())
                limit = getattr(trainer, f"limit_{stage}_batches")
                limits += stream_limits(trainer, found, limit if isinstance(limit, int) else inf)
            loaders += found
            running += [_RUNNING_STAGES[stage]] * len(found)
        return self.pass_over(trainer, loaders, limits, running)

    @property
    def is_given(self) -> bool:
        """Whether the data themselves were passed."""
        return self.dataloader is not None and not self._stages

    def given_dataloaders(self) -> list[Iterable[Any]]:
        """The data that were passed: one iterable of batches, or several DataLoaders."""
        given: Any = self.dataloader
        several = (
            isinstance(given, list | tuple)
            and len(given) > 0
            and all(isinstance(loader, DataLoader) for loader in given)
        )
        return as_list(given) if several or isinstance(given, CombinedLoader) else [given]

    def result(self, load: Callable[[str], Any]) -> Any:
        """The last result, read from its file where another process made it; ``None`` before the first."""
        if self._mark != self._slot.mark and self.path is not None:
            self._result, self._mark = load(self.path), self._slot.mark
        return self._result

    def finish(self, trainer: Trainer, result: Any) -> None:
        """Keep a result and write its file, but for a trial run (``fast_dev_run``), which leaves no file behind.

        Raises:
            MisconfigurationException: If the file cannot be written.
        """
        self._result, problem = result, ""
        if is_trial(trainer):
            rank_zero_info(f"{type(self).__name__} writes no file in a trial run (fast_dev_run).")
            self._mark = uuid4().hex
            self._slot.write(self._mark, None)
            return
        mark, path = trainer.strategy.broadcast((uuid4().hex, str(self.resolve_path(trainer))))
        if trainer.is_global_zero:
            try:
                result.save(path)
            except OSError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot write {path} ({problem}). The result is in memory, as an attribute of "
                "the callback, whose save() writes it elsewhere; for the next run set dirpath=."
            )
        self._mark = mark
        self._slot.write(mark, path)

    def resolve_path(self, trainer: Trainer) -> Path:
        """Where the file is written; the same on all ranks once rank zero's is broadcast."""
        folder = self.dirpath
        if folder is None:
            folder = Path(trainer.default_root_dir)
            if trainer.loggers and (save_dir := trainer.loggers[0].save_dir) is not None:
                logger = trainer.loggers[0]
                version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
                folder = Path(save_dir, str(logger.name), version)
            folder = folder / self.folder
        return folder / f"{self.target[1]}.safetensors"

    def refuse_unwritable(self, trainer: Trainer) -> None:
        """Refuse a file that cannot be written, before there is anything to write.

        Raises:
            MisconfigurationException: If its folder cannot be made or written to.
        """
        if is_trial(trainer):
            return
        problem = ""
        if trainer.is_global_zero:
            path = self.resolve_path(trainer)
            there = next(parent for parent in path.parents if os.path.exists(parent))
            if not os.path.isdir(there):
                problem = f"{path}: {there} is no folder"
            elif os.path.isdir(path) or not os.access(there, os.W_OK | os.X_OK):
                problem = f"{path}: {'it is a folder' if os.path.isdir(path) else f'{there} is not writable'}"
        if problem := trainer.strategy.broadcast(problem):
            raise MisconfigurationException(f"{type(self).__name__} cannot write {problem}. Set dirpath=.")

    def _refuse_hooks_of_combined_batches(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for owner in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
            for hook in _TRANSFER_HOOKS:
                if owner is not None and is_overridden(hook, owner):
                    raise MisconfigurationException(
                        f"In training {type(owner).__name__}.{hook} sees batches of several dataloaders at once; "
                        f"{type(self).__name__} reads one dataloader after the other. Say which data it takes, "
                        "dataloader=."
                    )

    def _same_file(self, other: EstimationCallback) -> bool:
        same_folder = self.dirpath == other.dirpath and (self.dirpath is not None or self.folder == other.folder)
        return same_folder and self.target[1] == other.target[1]

    def _hook_owner(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> LightningDataModule | LightningModule:
        """Who provides the dataloader of a stage."""
        hook = f"{stage}_dataloader"
        datamodule: LightningDataModule | None = getattr(trainer, "datamodule", None)
        if datamodule is not None and is_overridden(hook, datamodule):
            return datamodule
        if is_overridden(hook, pl_module):
            return pl_module
        raise MisconfigurationException(
            f"{type(self).__name__}(dataloader={stage!r}) needs a datamodule or a module with {hook}(); "
            + (
                f"there is no datamodule, and {type(pl_module).__name__} has none"
                if datamodule is None
                else f"neither {type(datamodule).__name__} nor {type(pl_module).__name__} has one"
            )
            + ". Pass the dataloader itself to the callback, too."
        )


def _stages(dataloader: Any) -> list[str]:
    """The stages that are named instead of data."""
    if isinstance(dataloader, str):
        return [dataloader]
    several = isinstance(dataloader, list | tuple) and all(isinstance(item, str) for item in dataloader)
    return list(dataloader) if several else []


def is_trial(trainer: Trainer) -> bool:
    """Whether the Trainer only tries its code out (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))


def trial_limits(trainer: Trainer, loaders: Sequence[Iterable[Any]]) -> list[float]:
    """All batches of each loader, but for a trial run (``fast_dev_run``)."""
    return [int(getattr(trainer, "fast_dev_run", False)) or inf] * len(loaders)


def train_limits(trainer: Trainer, loaders: Sequence[Iterable[Any]]) -> list[float]:
    """As many batches of each train loader as an epoch has, ``limit_train_batches`` included.

    Of one without a length, which may be endless, no more than the whole training takes.
    """
    steps = inf if trainer.max_steps < 0 else trainer.max_steps * trainer.accumulate_grad_batches
    taken = trainer.fit_loop.total_batch_idx + 1
    share = trainer.limit_train_batches
    limits = stream_limits(trainer, loaders, min(trainer.num_training_batches, steps, taken or inf))
    for k, loader in enumerate(loaders):
        if (length := sized_len(loader)) is not None:
            limits[k] = min(limits[k], share if isinstance(share, int) else int(length * share))
    return limits


def stream_limits(trainer: Trainer, loaders: Sequence[Iterable[Any]], limit: float) -> list[float]:
    """All batches of each loader; of one without a length at most ``limit``."""
    return [
        min(trial, limit) if sized_len(loader) is None else trial
        for loader, trial in zip(loaders, trial_limits(trainer, loaders), strict=True)
    ]
