"""What callbacks have in common that estimate something over data of their choice."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from pl_personalize.callbacks.pass_over_data import PassOverData
from pl_personalize.callbacks.sharding import refuse_sharded_parameters

Stage = Literal["train", "val", "test", "predict"]
_SETUP_STAGES = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}


class EstimationCallback(Callback):
    """Finds its data and the weights to use, and says where the result is written; see the subclasses."""

    folder: ClassVar[str]
    """Where files are by default, below the logger's folder."""

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | None,
        *,
        weights: Literal["best", "last"],
        module: str | None,
        forward: Any,
        dirpath: str | os.PathLike[str] | None,
        filename: str | None,
    ) -> None:
        super().__init__()
        if isinstance(dataloader, str) and dataloader not in _SETUP_STAGES:
            raise MisconfigurationException(
                f"dataloader must be an iterable of batches or one of {', '.join(_SETUP_STAGES)}; got {dataloader!r}."
            )
        if weights not in ("best", "last"):
            raise MisconfigurationException(f"weights must be 'best' or 'last'; got {weights!r}.")
        self.dataloader, self.weights, self.module, self.forward = dataloader, weights, module, forward
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.filename = filename
        self.path: str | None = None

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
        refuse_sharded_parameters(self, trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is not self and isinstance(other, EstimationCallback) and self._same_file(other):
                raise MisconfigurationException(
                    f"Two callbacks would write the same file, {self.target[1]}.safetensors. Set filename= for one."
                )
        if isinstance(self.dataloader, str) and stage == "fit":
            self._hook_owner(trainer, pl_module, self.dataloader)

    # For subclasses

    def pass_over(
        self, trainer: Trainer, loaders: Sequence[Iterable[Any]], limits: Sequence[float] | None = None
    ) -> PassOverData:
        """The data, in order, each sample once, divided among processes."""
        try:
            return PassOverData(trainer, loaders, no_limits(trainer, loaders) if limits is None else limits)
        except MisconfigurationException as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    def fit_dataloaders(self, trainer: Trainer, pl_module: LightningModule) -> list[Iterable[Any]]:
        """The data that were chosen; those of the training if none were."""
        if self.dataloader is None:
            return as_list(trainer.train_dataloader)
        return self.chosen_dataloaders(trainer, pl_module)

    def chosen_dataloaders(self, trainer: Trainer, pl_module: LightningModule) -> list[Iterable[Any]]:
        """The data that were passed or named."""
        if not isinstance(self.dataloader, str):
            return self.given_dataloaders()
        owner = self._hook_owner(trainer, pl_module, self.dataloader)
        if isinstance(owner, LightningDataModule):
            owner.setup(_SETUP_STAGES[self.dataloader])
        return as_list(getattr(owner, f"{self.dataloader}_dataloader")())

    def given_dataloaders(self) -> list[Iterable[Any]]:
        """What was passed: one iterable of batches, or several DataLoaders."""
        given: Any = self.dataloader
        several = (
            isinstance(given, list | tuple)
            and len(given) > 0
            and all(isinstance(loader, DataLoader) for loader in given)
        )
        return list(given) if several else [given]

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
            f"{type(self).__name__}(dataloader={stage!r}) needs a datamodule or a module with {hook}(); neither "
            f"{type(datamodule).__name__} nor {type(pl_module).__name__} has one. Pass the dataloader itself."
        )


def as_list(loaders: Any) -> list[Iterable[Any]]:
    """One or several dataloaders as a list."""
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def no_limits(trainer: Trainer, loaders: Sequence[Iterable[Any]]) -> list[float]:
    """All batches of each loader, but for a trial run (``fast_dev_run``)."""
    return [int(getattr(trainer, "fast_dev_run", False)) or inf] * len(loaders)


def sum_over_ranks(trainer: Trainer, total: Tensor) -> Tensor:
    """The sum over processes, on each of them."""
    summed: Tensor = trainer.strategy.reduce(total, reduce_op="sum")
    return summed


@contextmanager
def buffers_of_rank_zero(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The same buffers on all ranks inside: DDP synchronises batch-norm statistics only when a forward starts."""
    buffers = list(pl_module.buffers()) if trainer.world_size > 1 else []
    with kept(buffers):
        with torch.no_grad():
            for buffer in buffers:
                buffer.copy_(trainer.strategy.broadcast(buffer))
        yield


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """What the tensors hold is put back at the end."""
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


@contextmanager
def best_weights(trainer: Trainer, pl_module: LightningModule, *, wanted: bool) -> Iterator[None]:
    """The weights of the best checkpoint inside, the present ones after."""
    path = best_checkpoint(trainer) if wanted else ""
    if not path:
        yield
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # after training, a file that cannot be read must not cost the whole result
        rank_zero_warn(f"The best checkpoint {path} cannot be loaded ({error}); the result is of the last weights.")
        yield
        return
    with kept([*pl_module.parameters(), *pl_module.buffers()]):
        pl_module.load_state_dict(state, strict=pl_module.strict_loading)
        yield


def best_checkpoint(trainer: Trainer) -> str:
    """The best checkpoint of a ModelCheckpoint that monitors a metric; empty if there is none."""
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    return next((c.best_model_path for c in checkpoints if c.best_model_path), "")
