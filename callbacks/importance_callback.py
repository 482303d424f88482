"""Base class for importance callbacks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from pl_personalize.callbacks.data_source import DataSource, Stage
from pl_personalize.callbacks.estimation_callback import EstimationCallback
from pl_personalize.callbacks.module_contexts import (
    best_weights,
    on_its_device,
    pass_options,
    silent_and_synchronized,
)
from pl_personalize.callbacks.pass_over_data import PassOverData, refuse_dropped_samplers
from pl_personalize.callbacks.requirements import naming_errors
from pl_personalize.estimation import check_options, estimate_importance, select_parameters
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.importance import Importance, Kind


class ImportanceCallback(EstimationCallback):
    """Estimates importances at the end of ``fit``, or on the data of a ``predict`` run.

    Subclasses set :attr:`kind`. Override :meth:`should_estimate` to decide when it runs.
    """

    kind: Kind
    folder = "importances"

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None = None,
        *,
        exclude: Sequence[str] = (),
        reduction: Literal["sample", "batch"] = "sample",
        max_scratch_mb: float = 256,
        **options: Any,
    ) -> None:
        self.default_filename = self.kind
        super().__init__(dataloader, **options)
        self._options: dict[str, Any] = {
            "exclude": tuple(exclude),
            "reduction": reduction,
            "max_scratch_mb": max_scratch_mb,
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
                f"{type(self).__name__} has no importances yet: they are estimated at the end of fit, or on the data "
                "of a predict run. A trial run (fast_dev_run) in spawned processes leaves none."
            )
        return found

    def check_options(self) -> None:
        """Raise ``ValueError`` for options that are out of range or do not fit together."""
        options = {"draws": 1} | self._options
        del options["exclude"]
        check_options(self.kind, forward=self.forward, **options)

    @override
    def check_module(self, pl_module: LightningModule) -> bool:
        """Refuse invalid options, and names that the module does not have."""
        with naming_errors(self, pl_module):
            self.check_options()
            select_parameters(pl_module, self.module, self._options["exclude"])
        return True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse invalid options before any training."""
        super().setup(trainer, pl_module, stage)
        self._predicts = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a module that ``configure_model`` has made."""
        self.check_module(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a module that ``configure_model`` has made, and the data."""
        self._predicts = True
        self.check_module(pl_module)
        if self.should_estimate(trainer, pl_module):
            with naming_errors(self):
                self._predicted(trainer, pl_module)
                if self.source.loaders is None:
                    refuse_dropped_samplers(trainer)
            self.refuse_unwritable(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate with the best or the last weights, and write the file.

        Runs after every ``on_train_end`` of the module and the strategy, where weights may be averaged, and also if no
        step is made, as when a finished run is resumed.
        """
        if not self.should_estimate(trainer, pl_module):
            return
        with (
            on_its_device(trainer, pl_module),
            best_weights(trainer, pl_module, wanted=self.weights == "best"),
        ):
            self._estimate_and_write(trainer, pl_module, self.data(trainer, pl_module, "train"))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate on the predicted data with the weights that predicted them, and write the file."""
        if self.should_estimate(trainer, pl_module):
            with naming_errors(self):
                data = self._predicted(trainer, pl_module)
            self._estimate_and_write(trainer, pl_module, data)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a ``predict`` run without a batch, for which Lightning calls no other hook."""
        is_empty = stage == "predict" and not self._predicts and not any(trainer.num_predict_batches)
        if is_empty and self.should_estimate(trainer, pl_module):
            raise MisconfigurationException(
                f"{type(self).__name__}: the predict run has no batches (empty dataloaders, or "
                "limit_predict_batches=0); importances need at least one sample."
            )

    def _predicted(self, trainer: Trainer, pl_module: LightningModule) -> PassOverData:
        """The data of a ``predict`` run, unless data were passed; a named stage applies to ``fit``."""
        source = self.source if self.source.loaders is not None else DataSource(None)
        return source.read(trainer, pl_module, "predict", again=self.reads_again)

    def _generator(self, trainer: Trainer, pl_module: LightningModule) -> torch.Generator | None:
        """Generator of this process's labels, independent of those of other processes, which read other samples."""
        given: torch.Generator | int | None = self._options.get("generator")
        if isinstance(given, int):  # each estimate with a seed draws the same
            given, self._own_generator = torch.Generator().manual_seed(given), None
        if trainer.global_rank == 0:
            return given
        if self._own_generator is None or given is None:  # a generator advances from estimate to estimate
            state = (torch.default_generator if given is None else given).get_state()
            seed = derive_seed(bytes(state.tolist()).hex(), trainer.global_rank)
            self._own_generator = torch.Generator(pl_module.device).manual_seed(seed)
        return self._own_generator

    @override
    def estimate(
        self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], *, trial: bool = False
    ) -> Importance:
        """Estimate importances over batches on this process."""
        generator = None if trial else self._generator(trainer, pl_module)
        with silent_and_synchronized(trainer, pl_module):
            return estimate_importance(
                pl_module,
                batches,
                self.kind,
                module=self.module,
                forward=self.forward,
                **pass_options(trainer),
                **self._options | {"generator": generator},
            )

    def _estimate_and_write(self, trainer: Trainer, pl_module: LightningModule, data: PassOverData) -> None:
        with naming_errors(self, pl_module):
            importance = self.estimate(trainer, pl_module, data)
        self.finish(trainer, importance)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                _log_summary(logger, importance, trainer.global_step)
        trainer.strategy.barrier("importance")


def _log_summary(logger: Logger, importance: Importance, step: int) -> None:
    """Log the norm and the share of zeros of each parameter, and histograms if the logger supports them."""
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
    """Counts and edges of 64 bins, also for (almost) equal values."""
    array = values.double().numpy()
    low, high = float(array.min()), float(array.max())
    margin = 0.5 if high - low < 1e-6 else 0.0
    return np.histogram(array, bins=64, range=(low - margin, high + margin))
