"""What the importance callbacks have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from pl_personalize.callbacks.pass_over_data import PassOverData, can_be_read_again
from pl_personalize.estimation import check_options, estimate_importance, select_parameters
from pl_personalize.functional.batches import batch_size, slice_batch
from pl_personalize.functional.per_sample import Forward
from pl_personalize.importance import Importance, Kind

Stage = Literal["train", "val", "test", "predict"]
_SETUP_STAGES = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}


class ImportanceCallback(Callback):
    """Estimates importances when ``fit`` ends, or over the data of a ``predict`` run; see the subclasses.

    Subclasses set :attr:`kind`. Override :meth:`should_estimate` to decide when it runs.
    """

    kind: Kind

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | None = None,
        *,
        weights: Literal["best", "last"] = "best",
        module: str | None = None,
        exclude: Sequence[str] = (),
        forward: Forward | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        reduction: Literal["sample", "batch"] = "sample",
        max_scratch_mb: float = 256,
        generator: torch.Generator | None = None,
        draws: int | Literal["all"] = 1,
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
        self._options: dict[str, Any] = {
            "exclude": tuple(exclude),
            "reduction": reduction,
            "max_scratch_mb": max_scratch_mb,
            "generator": generator,
            "draws": draws,
        }
        self.importance: Importance | None = None
        self.path: str | None = None

    @property
    def _target(self) -> tuple[Path | None, str]:
        return self.dirpath, self.filename or self.kind

    def should_estimate(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether to estimate now, at the end of ``fit`` or ``predict``. Override to decide otherwise."""
        return True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any training."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise MisconfigurationException(
                f"{type(self).__name__} needs whole parameters on every device; the strategy "
                f"{type(trainer.strategy).__name__} shards them. Use ddp or a single device."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is not self and isinstance(other, ImportanceCallback) and other._target == self._target:
                raise MisconfigurationException(
                    f"Two callbacks would write the same file, {self._target[1]}.safetensors. Set filename= for one."
                )
        if not is_overridden("configure_model", pl_module):  # else there may be no parameters yet
            self._check_options(pl_module)
        if isinstance(self.dataloader, str) and stage == "fit":
            self._hook_owner(trainer, pl_module, self.dataloader)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work with a module that ``configure_model`` has made."""
        self._check_options(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work with a module that ``configure_model`` has made."""
        self._check_options(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate over two samples, so that what cannot work fails now and not after the training."""
        if not self.should_estimate(trainer, pl_module):
            return
        given = self.dataloader is not None and not isinstance(self.dataloader, str)
        # Of a named stage nothing is set up yet: two training samples have to do.
        loaders = self._given_dataloaders() if given else _as_list(trainer.train_dataloader)
        if not loaders or not can_be_read_again(loaders[0]):
            return
        try:
            estimate_importance(
                pl_module,
                _two_samples(PassOverData(trainer, loaders[:1], [1])),
                self.kind,
                module=self.module,
                forward=self.forward,
                all_reduce=None if trainer.world_size == 1 else lambda total: _sum_over_ranks(trainer, total),
                **self._options | {"generator": None},
            )
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} on {type(pl_module).__name__}: {error}") from error

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate with the best or the last weights, and write the file."""
        if not self.should_estimate(trainer, pl_module):
            return
        loaders = self._fit_dataloaders(trainer, pl_module)
        with _best_weights(trainer, pl_module, wanted=self.weights == "best"):
            self._estimate(trainer, pl_module, loaders)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate over the data that was predicted, with the weights that predicted it, and write the file."""
        if not self.should_estimate(trainer, pl_module):
            return
        if self.dataloader is not None and not isinstance(self.dataloader, str):
            self._estimate(trainer, pl_module, self._given_dataloaders())
        else:
            loaders = _as_list(trainer.predict_dataloaders)
            self._estimate(trainer, pl_module, loaders, limits=trainer.num_predict_batches)

    def _check_options(self, pl_module: LightningModule) -> None:
        try:
            check_options(self.kind, *(self._options[key] for key in ("reduction", "draws", "max_scratch_mb")))
            select_parameters(pl_module, self.module, self._options["exclude"])
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} on {type(pl_module).__name__}: {error}") from error

    def _estimate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        loaders: Sequence[Iterable[Any]],
        limits: Sequence[float] | None = None,
    ) -> None:
        strategy = trainer.strategy
        if limits is None:
            limits = [int(getattr(trainer, "fast_dev_run", False)) or inf] * len(loaders)
        data = PassOverData(trainer, loaders, limits)
        with _buffers_of_rank_zero(trainer, pl_module):
            importance = estimate_importance(
                pl_module,
                data,
                self.kind,
                module=self.module,
                forward=self.forward,
                progress=trainer.progress_bar_callback is not None and trainer.is_global_zero,
                all_reduce=None if trainer.world_size == 1 else lambda total: _sum_over_ranks(trainer, total),
                **self._options,
            )
        self.importance = importance
        path = self._resolve_path(trainer)
        self.path = str(strategy.broadcast(str(path)))
        if trainer.is_global_zero:
            importance.save(self.path)
            for logger in trainer.loggers:
                _log_summary(logger, importance, trainer.global_step)
        strategy.barrier("importance")

    def _fit_dataloaders(self, trainer: Trainer, pl_module: LightningModule) -> list[Iterable[Any]]:
        if self.dataloader is None:
            return _as_list(trainer.train_dataloader)
        if not isinstance(self.dataloader, str):
            return self._given_dataloaders()
        owner = self._hook_owner(trainer, pl_module, self.dataloader)
        if isinstance(owner, LightningDataModule):
            owner.setup(_SETUP_STAGES[self.dataloader])
        return _as_list(getattr(owner, f"{self.dataloader}_dataloader")())

    def _given_dataloaders(self) -> list[Iterable[Any]]:
        """What was passed: one iterable of batches, or several DataLoaders."""
        given: Any = self.dataloader
        several = (
            isinstance(given, list | tuple)
            and len(given) > 0
            and all(isinstance(loader, DataLoader) for loader in given)
        )
        return list(given) if several else [given]

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

    def _resolve_path(self, trainer: Trainer) -> Path:
        folder = self.dirpath
        if folder is None:
            folder = Path(trainer.default_root_dir)
            if trainer.loggers and (save_dir := trainer.loggers[0].save_dir) is not None:
                logger = trainer.loggers[0]
                version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
                folder = Path(save_dir, str(logger.name), version)
            folder = folder / "importances"
        return folder / f"{self._target[1]}.safetensors"


def _two_samples(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        count = batch_size(batch)
        yield slice_batch(batch, count, slice(0, 2))


def _as_list(loaders: Any) -> list[Iterable[Any]]:
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def _sum_over_ranks(trainer: Trainer, total: Tensor) -> Tensor:
    summed: Tensor = trainer.strategy.reduce(total, reduce_op="sum")
    return summed


@contextmanager
def _buffers_of_rank_zero(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The same buffers on all ranks inside: DDP synchronises batch-norm statistics only when a forward starts."""
    buffers = list(pl_module.buffers()) if trainer.world_size > 1 else []
    with _kept(buffers):
        with torch.no_grad():
            for buffer in buffers:
                buffer.copy_(trainer.strategy.broadcast(buffer))
        yield


@contextmanager
def _kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """What the tensors hold is put back at the end."""
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


@contextmanager
def _best_weights(trainer: Trainer, pl_module: LightningModule, *, wanted: bool) -> Iterator[None]:
    """The weights of the best checkpoint inside, the present ones after."""
    path = _best_checkpoint(trainer) if wanted else ""
    if not path:
        yield
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # after training, a file that cannot be read must not cost the whole result
        rank_zero_warn(f"The best checkpoint {path} cannot be loaded ({error}); importances use the last weights.")
        yield
        return
    with _kept([*pl_module.parameters(), *pl_module.buffers()]):
        pl_module.load_state_dict(state, strict=pl_module.strict_loading)
        yield


def _best_checkpoint(trainer: Trainer) -> str:
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    return next((c.best_model_path for c in checkpoints if c.best_model_path), "")


def _log_summary(logger: Logger, importance: Importance, step: int) -> None:
    """Norm and share of zeros of each parameter, and histograms where the logger can."""
    prefix = f"importance/{importance.kind}"
    logger.log_metrics(
        {f"{prefix}/{what}/{name}": v for name, values in importance.summary().items() for what, v in values.items()},
        step=step,
    )
    nonzero = {name: value[value > 0].log10().flatten().cpu() for name, value in importance.items()}
    nonzero = {f"{prefix}/log10/{name}": value.float() for name, value in nonzero.items() if value.numel()}
    if isinstance(logger, TensorBoardLogger):
        for name, value in nonzero.items():
            logger.experiment.add_histogram(name, value, global_step=step)
    elif isinstance(logger, WandbLogger):
        import wandb

        histograms = {name: wandb.Histogram(np_histogram=_histogram(value)) for name, value in nonzero.items()}
        logger.experiment.log(histograms)


def _histogram(values: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Counts and edges of 64 bins, also where all values are (almost) the same."""
    array = values.double().numpy()
    low, high = float(array.min()), float(array.max())
    margin = 0.5 if high - low < 1e-6 else 0.0
    return np.histogram(array, bins=64, range=(low - margin, high + margin))
