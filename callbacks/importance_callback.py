"""What the importance callbacks have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from pl_personalize.callbacks.estimation_callback import (
    EstimationCallback,
    Stage,
    as_list,
    best_weights,
    buffers_of_rank_zero,
    sum_over_ranks,
)
from pl_personalize.callbacks.pass_over_data import PassOverData, can_be_read_again, two_samples
from pl_personalize.estimation import check_options, estimate_importance, select_parameters
from pl_personalize.functional.per_sample import Forward
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.importance import Importance, Kind


class ImportanceCallback(EstimationCallback):
    """Estimates importances when ``fit`` ends, or over the data of a ``predict`` run; see the subclasses.

    Subclasses set :attr:`kind`. Override :meth:`should_estimate` to decide when it runs.
    """

    kind: Kind
    folder = "importances"

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
        super().__init__(
            dataloader, weights=weights, module=module, forward=forward, dirpath=dirpath, filename=filename
        )
        self._options: dict[str, Any] = {
            "exclude": tuple(exclude),
            "reduction": reduction,
            "max_scratch_mb": max_scratch_mb,
            "generator": generator,
            "draws": draws,
        }
        self.importance: Importance | None = None
        self._own_generator: torch.Generator | None = None
        self._predicts = False  # whether this predict run has batches

    @property
    @override
    def default_filename(self) -> str:
        return self.kind

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any training."""
        super().setup(trainer, pl_module, stage)
        self._predicts = False
        if not is_overridden("configure_model", pl_module):  # else there may be no parameters yet
            self._check_options(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work with a module that ``configure_model`` has made."""
        self._check_options(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work with a module that ``configure_model`` has made, or with these data."""
        self._predicts = True
        self._check_options(pl_module)
        if self.should_estimate(trainer, pl_module):
            self.pass_over(trainer, self._predicted(trainer))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate over two samples, so that what cannot work fails now and not after the training."""
        if not self.should_estimate(trainer, pl_module):
            return
        # Of a named stage nothing is set up yet: two training samples have to do.
        loaders = self.given_dataloaders() if self._is_given else as_list(trainer.train_dataloader)
        if not isinstance(self.dataloader, str):
            self.pass_over(trainer, loaders)
        if not loaders or not can_be_read_again(loaders[0]):
            return
        try:
            estimate_importance(
                pl_module,
                two_samples(PassOverData(trainer, loaders[:1], [1])),
                self.kind,
                module=self.module,
                forward=self.forward,
                all_reduce=None if trainer.world_size == 1 else lambda total: sum_over_ranks(trainer, total),
                **self._options | {"generator": None},
            )
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} on {type(pl_module).__name__}: {error}") from error

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate with the best or the last weights, and write the file."""
        if not self.should_estimate(trainer, pl_module):
            return
        loaders = self.fit_dataloaders(trainer, pl_module)
        with best_weights(trainer, pl_module, wanted=self.weights == "best"):
            self._estimate(trainer, pl_module, loaders)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate over the data that was predicted, with the weights that predicted it, and write the file."""
        if not self.should_estimate(trainer, pl_module):
            return
        limits = None if self._is_given else trainer.num_predict_batches
        self._estimate(trainer, pl_module, self._predicted(trainer), limits)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a ``predict`` run without a batch, of which no other hook hears."""
        if stage == "predict" and not self._predicts and self.should_estimate(trainer, pl_module):
            raise MisconfigurationException(
                f"{type(self).__name__}: the predict run has no batches (empty dataloaders, or "
                "limit_predict_batches=0); importances need at least one sample."
            )

    @property
    def _is_given(self) -> bool:
        """Whether the data themselves were passed."""
        return self.dataloader is not None and not isinstance(self.dataloader, str)

    def _predicted(self, trainer: Trainer) -> list[Iterable[Any]]:
        """The data of a ``predict`` run, unless others were passed."""
        return self.given_dataloaders() if self._is_given else as_list(trainer.predict_dataloaders)

    def _generator(self, trainer: Trainer, pl_module: LightningModule) -> torch.Generator | None:
        """Source of this process's labels: independent of those of other processes, which have other samples."""
        given: torch.Generator | None = self._options["generator"]
        if trainer.global_rank == 0:
            return given
        if self._own_generator is None or given is None:  # one that was given moves on from estimate to estimate
            state = (torch.default_generator if given is None else given).get_state()
            seed = derive_seed(bytes(state.tolist()).hex(), trainer.global_rank)
            self._own_generator = torch.Generator(pl_module.device).manual_seed(seed)
        return self._own_generator

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
        data = self.pass_over(trainer, loaders, limits)
        with buffers_of_rank_zero(trainer, pl_module):
            importance = estimate_importance(
                pl_module,
                data,
                self.kind,
                module=self.module,
                forward=self.forward,
                progress=trainer.progress_bar_callback is not None and trainer.is_global_zero,
                all_reduce=None if trainer.world_size == 1 else lambda total: sum_over_ranks(trainer, total),
                **self._options | {"generator": self._generator(trainer, pl_module)},
            )
        self.importance = importance
        path = self.resolve_path(trainer)
        self.path = str(strategy.broadcast(str(path)))
        if trainer.is_global_zero:
            importance.save(self.path)
            for logger in trainer.loggers:
                _log_summary(logger, importance, trainer.global_step)
        strategy.barrier("importance")


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
