"""Base class of the importance callbacks."""

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

from pl_personalize.callbacks.estimation_callback import EstimationCallback, Stage
from pl_personalize.callbacks.module_contexts import (
    all_reduce_of,
    best_weights,
    buffers_of_rank_zero,
    on_its_device,
    without_logging,
)
from pl_personalize.callbacks.pass_over_data import PassOverData, as_list, refuse_dropped_samplers
from pl_personalize.estimation import check_options, estimate_importance, select_parameters
from pl_personalize.functional.batches import Forward
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
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None = None,
        *,
        weights: Literal["best", "last"] = "best",
        module: str | None = None,
        exclude: Sequence[str] = (),
        forward: Forward | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        reduction: Literal["sample", "batch"] = "sample",
        max_scratch_mb: float = 256,
        generator: torch.Generator | int | None = None,
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
        self._own_generator: torch.Generator | None = None
        self._predicts = False  # whether this predict run has batches

    @property
    def importance(self) -> Importance:
        """The last result.

        Raises:
            MisconfigurationException: If there is none yet.
        """
        found: Importance | None = self.result(Importance.load)
        if found is None:
            raise MisconfigurationException(
                f"{type(self).__name__} has no importances yet: they are estimated when fit ends, or over the data of "
                "a predict run. A trial run (fast_dev_run) in spawned processes leaves none."
            )
        return found

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
            if self.is_given:
                self.pass_over(trainer, self.given_dataloaders())
            else:
                refuse_dropped_samplers(trainer)
                self.run_pass(trainer, as_list(trainer.predict_dataloaders), trainer.num_predict_batches)
            self.refuse_unwritable(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate over two samples, so that what cannot work fails now and not after the training."""
        if self.should_estimate(trainer, pl_module):
            self.try_out(
                trainer, pl_module, lambda batches: self._estimate(trainer, pl_module, batches, {"generator": None})
            )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate with the best or the last weights, and write the file.

        After every ``on_train_end``, those of the module and the strategy included: weights may be averaged there. A
        run without a step, such as one that is resumed after its end, comes here, too.
        """
        if not self.should_estimate(trainer, pl_module):
            return
        with (
            on_its_device(trainer, pl_module),
            best_weights(trainer, pl_module, wanted=self.weights == "best"),
        ):
            self._estimate_and_write(trainer, pl_module, self.fit_pass(trainer, pl_module))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate over the data that was predicted, with the weights that predicted it, and write the file."""
        if self.should_estimate(trainer, pl_module):
            limits = None if self.is_given else trainer.num_predict_batches
            data = self.pass_over(trainer, self._predicted(trainer), limits)
            self._estimate_and_write(trainer, pl_module, data)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a ``predict`` run without a batch, of which no other hook hears."""
        is_empty = stage == "predict" and not self._predicts and not any(trainer.num_predict_batches)
        if is_empty and self.should_estimate(trainer, pl_module):
            raise MisconfigurationException(
                f"{type(self).__name__}: the predict run has no batches (empty dataloaders, or "
                "limit_predict_batches=0); importances need at least one sample."
            )

    def _predicted(self, trainer: Trainer) -> list[Iterable[Any]]:
        """The data of a ``predict`` run, unless others were passed."""
        return self.given_dataloaders() if self.is_given else as_list(trainer.predict_dataloaders)

    def _generator(self, trainer: Trainer, pl_module: LightningModule) -> torch.Generator | None:
        """Source of this process's labels: independent of those of other processes, which have other samples."""
        given: torch.Generator | int | None = self._options["generator"]
        if isinstance(given, int):  # a seed, with which each estimate draws the same
            given, self._own_generator = torch.Generator().manual_seed(given), None
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
        batches: Iterable[Any],
        changed: dict[str, Any],
        *,
        progress: bool = False,
    ) -> Importance:
        with buffers_of_rank_zero(trainer, pl_module), without_logging(pl_module):
            return estimate_importance(
                pl_module,
                batches,
                self.kind,
                module=self.module,
                forward=self.forward,
                progress=progress,
                all_reduce=all_reduce_of(trainer),
                **self._options | changed,
            )

    def _estimate_and_write(self, trainer: Trainer, pl_module: LightningModule, data: PassOverData) -> None:
        generator = self._generator(trainer, pl_module)
        progress = trainer.progress_bar_callback is not None and trainer.is_global_zero
        try:
            importance = self._estimate(trainer, pl_module, data, {"generator": generator}, progress=progress)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} on {type(pl_module).__name__}: {error}") from error
        self.finish(trainer, importance)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                _log_summary(logger, importance, trainer.global_step)
        trainer.strategy.barrier("importance")


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
