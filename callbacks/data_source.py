"""The data that a callback's pass reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from pl_personalize.callbacks.pass_over_data import PassOverData, as_list, refuse_iterators
from pl_personalize.per_sample.module_state import random_state_kept

Stage = Literal["train", "val", "test", "predict"]
_SETUP_STAGES = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class DataSource:
    """Data of a callback's pass: batches that were passed, named stages, or the loaders of the run itself."""

    def __init__(self, given: Iterable[Any] | Stage | Sequence[Stage] | None) -> None:
        items: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
        is_named = all(isinstance(item, str) for item in items) and len(items) > 0
        self.stages: list[Any] = items if is_named else []
        self.loaders: list[Iterable[Any]] | None = None
        if unknown := [stage for stage in self.stages if stage not in get_args(Stage)]:
            raise ValueError(
                f"dataloader must be an iterable of batches or one of {', '.join(get_args(Stage))}; got {unknown[0]!r}."
            )
        if isinstance(given, CombinedLoader) and given._mode != "sequential":
            raise ValueError(
                f"dataloader=CombinedLoader(mode={given._mode!r}) yields batches of several loaders at once, and a "
                "pass reads one loader at a time. Pass a list of the loaders, or mode='sequential'."
            )
        if given is not None and not is_named:
            several = len(items) > 0 and all(isinstance(item, DataLoader) for item in items)
            self.loaders = as_list(given) if several or isinstance(given, CombinedLoader) else [given]

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a named stage that has no dataloader."""
        for stage in self.stages:
            if _passed(trainer, stage) is None:
                _owner(trainer, pl_module, stage)

    @property
    def reads_train(self) -> bool:
        """Whether a pass after ``fit`` reads the train loaders."""
        return self.loaders is None and (not self.stages or "train" in self.stages)

    def check_loaders(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse loaders that a pass after ``fit`` could not read, before the training."""
        if self.loaders is not None:
            PassOverData(trainer, self.loaders, trial_limits(trainer, self.loaders))  # refuses what it cannot divide
        if self.reads_train:
            check_train_loaders(trainer, pl_module)
        for stage in self.stages:
            refuse_iterators(_passed(trainer, stage) or [])

    def read(self, trainer: Trainer, pl_module: LightningModule, running: Stage, *, again: bool) -> PassOverData:
        """Make a pass over the data."""
        if self.loaders is not None:
            return PassOverData(trainer, self.loaders, trial_limits(trainer, self.loaders), again=again)
        loaders: list[Iterable[Any]] = []
        limits: list[float] = []
        stages: list[RunningStage] = []
        for stage in self.stages or [running]:
            if stage == running:
                found, most = _loaders_of_the_run(trainer, stage)
            else:
                found = _loaders_of_stage(trainer, pl_module, stage)
                limit = getattr(trainer, f"limit_{stage}_batches")
                most = _stream_limits(trainer, found, limit if isinstance(limit, int) else inf)
            loaders += found
            limits += most
            stages += [RunningStage("validate" if stage == "val" else stage)] * len(found)
        return PassOverData(trainer, loaders, limits, again=again, stages=stages)


def _loaders_of_the_run(trainer: Trainer, stage: Stage) -> tuple[list[Iterable[Any]], list[float]]:
    if stage != "train":
        loaders, limits = as_list(getattr(trainer, f"{stage}_dataloaders")), getattr(trainer, f"num_{stage}_batches")
    else:
        loaders = as_list(trainer.train_dataloader)
        limits = train_limits(trainer, loaders)
        is_endless = any(sized_len(loader) is None and n == inf for loader, n in zip(loaders, limits, strict=True))
        if is_endless and trainer.fit_loop.total_batch_idx < 0:
            raise ValueError(
                "the fit makes no step, and its train data have no length. Set limit_train_batches, or pass the data "
                "with dataloader=."
            )
    refuse_iterators(loaders)
    return loaders, list(limits)


def _loaders_of_stage(trainer: Trainer, pl_module: LightningModule, stage: Stage) -> list[Iterable[Any]]:
    """Loaders of a stage that is not running: those passed to the Trainer, or else those of a hook."""
    if (passed := _passed(trainer, stage)) is not None:
        refuse_iterators(passed)
        return passed
    owner = _owner(trainer, pl_module, stage)
    with random_state_kept(torch.device("cpu")):  # hooks may draw, such as a split of the data
        if isinstance(owner, LightningDataModule):
            owner.setup(_SETUP_STAGES[stage])
        return as_list(getattr(owner, f"{stage}_dataloader")())


def _passed(trainer: Trainer, stage: Stage) -> list[Iterable[Any]] | None:
    """Loaders of a stage that were passed to ``fit``, ``validate``, ``test`` or ``predict``; ``None`` if none were."""
    source = getattr(trainer, f"{_SETUP_STAGES[stage]}_loop")._data_source
    return None if source.instance is None or source.is_module() else as_list(source.instance)


def check_train_loaders(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse train loaders that a pass could not read as the training does."""
    loaders = as_list(trainer.train_dataloader)
    refuse_iterators(loaders)
    PassOverData(trainer, loaders, trial_limits(trainer, loaders))  # refuses what it cannot divide
    for owner in (getattr(trainer, "datamodule", None), pl_module) if len(loaders) > 1 else ():
        for hook in _TRANSFER_HOOKS:
            if owner is not None and is_overridden(hook, owner):
                raise ValueError(
                    f"in training {type(owner).__name__}.{hook} sees batches of several dataloaders at once; a pass "
                    "reads one dataloader after the other. Callbacks with dataloader= can read other data."
                )


def _owner(trainer: Trainer, pl_module: LightningModule, stage: Stage) -> LightningDataModule | LightningModule:
    """The datamodule or else the module that provides the dataloader of a stage."""
    hook = f"{stage}_dataloader"
    for owner in (getattr(trainer, "datamodule", None), pl_module):
        if owner is not None and is_overridden(hook, owner):
            found: LightningDataModule | LightningModule = owner
            return found
    raise ValueError(
        f"dataloader={stage!r} needs a datamodule or a module with {hook}(). Pass the dataloader itself to the "
        "callback instead."
    )


def trial_limits(trainer: Trainer, loaders: Sequence[Iterable[Any]]) -> list[float]:
    """All batches of each loader, or those of a trial run (``fast_dev_run``)."""
    return [int(getattr(trainer, "fast_dev_run", False)) or inf] * len(loaders)


def train_limits(trainer: Trainer, loaders: Sequence[Iterable[Any]]) -> list[float]:
    """As many batches of each train loader as an epoch has, ``limit_train_batches`` included.

    A loader without a length may be endless: it is limited to the batches of the whole training.
    """
    steps = inf if trainer.max_steps < 0 else trainer.max_steps * trainer.accumulate_grad_batches
    taken = trainer.fit_loop.total_batch_idx + 1
    share = trainer.limit_train_batches
    limits = _stream_limits(trainer, loaders, min(trainer.num_training_batches, steps, taken or inf))
    for k, loader in enumerate(loaders):
        if (length := sized_len(loader)) is not None:
            limits[k] = min(limits[k], share if isinstance(share, int) else int(length * share))
    return limits


def _stream_limits(trainer: Trainer, loaders: Sequence[Iterable[Any]], limit: float) -> list[float]:
    """All batches of each loader; at most ``limit`` of one without a length."""
    return [
        min(trial, limit) if sized_len(loader) is None else trial
        for loader, trial in zip(loaders, trial_limits(trainer, loaders), strict=True)
    ]
