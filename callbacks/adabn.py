"""Batch norm adapted to a user's unlabelled data, without training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from pl_personalize.adaptation import check_adaptation, estimate_batchnorm
from pl_personalize.artifacts import tensor_checksum
from pl_personalize.batchnorm import BatchNormStatistics, batchnorm_layers
from pl_personalize.callbacks.estimation_callback import EstimationCallback, Stage
from pl_personalize.callbacks.module_contexts import (
    all_reduce_of,
    best_checkpoint,
    best_weights,
    buffers_of_rank_zero,
    on_its_device,
    without_logging,
)
from pl_personalize.callbacks.pass_over_data import as_list, refuse_dropped_samplers
from pl_personalize.functional.batches import Forward


class AdaBN(EstimationCallback):
    """Re-estimates batch-norm statistics on unlabelled data (AdaBN, Li et al., 2016); no parameter changes.

    When ``fit`` ends::

        trainer = Trainer(callbacks=[AdaBN("predict")])  # the user's unlabelled images
        trainer.fit(model, datamodule=datamodule)  # afterwards the model in memory is adapted; callback.path
        trainer.test(model, datamodule=datamodule, ckpt_path="best")  # with the adapted statistics, too

    A checkpoint was saved before, and holds the statistics of the training. So those that were estimated are written to
    a file of their own (:class:`~pl_personalize.BatchNormStatistics`), and are applied again when a ``validate``,
    ``test`` or ``predict`` run of this callback starts with the weights that they were estimated for. Without a ``fit``
    before, they are estimated then, on the data that were passed or named; a ``predict`` run without any adapts to the
    images that it predicts, and a ``validate`` or ``test`` run without any looks below ``dirpath`` for the file of an
    earlier run that fits the weights. One callback is for one user; several users need files of their own
    (``filename``)::

        Trainer(callbacks=[AdaBN()]).predict(model, images)

    The batches are those that the loaders yield; under DDP each process takes a part of them, without repetition, and
    all end with the same statistics (docs/passes.md). Autocast is off.

    Args:
        dataloader: The data: an iterable of batches; the name of a stage (``"train"``, ``"val"``, ``"predict"``,
            ``"test"``), or several, whose dataloaders the datamodule (after ``setup`` for it) or the module provides;
            or ``None``: after ``fit`` what the train loader yields in an epoch. Labels are not looked at.
            ``"test"`` adapts to the very images that are tested (transductive): say so where you report it.
        exact: See :func:`~pl_personalize.adapt_batchnorm`.
        prior_samples: See there.
        weights: For ``fit``: whose statistics are written: of the ``"best"`` checkpoint of a ModelCheckpoint that
            monitors a metric, where there is one, or of the ``"last"`` weights. The model in memory is adapted anyway.
        module: Only batch norm below this submodule; names are relative to it.
        forward: ``(module, batch) -> anything`` where calling the module on the input is not enough.
        dirpath: Folder of the file; by default ``batchnorm`` in the first logger's folder, else in the Trainer's
            ``default_root_dir``.
        filename: Name of the file without ending; by default ``adabn``.
        max_scratch_mb: See :func:`~pl_personalize.adapt_batchnorm`.

    Attributes:
        statistics: What was written, or used last; ``None`` before.
        path: Its file; ``None`` after a trial run (``fast_dev_run``), which leaves none.

    Raises:
        MisconfigurationException: In ``setup``, for a Trainer of ``pytorch_lightning``, a strategy that shards
            parameters (FSDP, DeepSpeed), a module that does not exist, a layer with ``track_running_stats=False``, or,
            for ``fit``, a stage without dataloader; before the first step, for what two samples or the folder show.
    """

    folder = "batchnorm"
    reads_again = True  # for the last weights, the best ones, and layer by layer

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None = None,
        *,
        exact: bool = False,
        prior_samples: float = 0,
        weights: Literal["best", "last"] = "best",
        module: str | None = None,
        forward: Forward | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        max_scratch_mb: float = 256,
    ) -> None:
        super().__init__(
            dataloader, weights=weights, module=module, forward=forward, dirpath=dirpath, filename=filename
        )
        try:
            check_adaptation(prior_samples, max_scratch_mb)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        self._options: dict[str, Any] = {
            "exact": exact,
            "prior_samples": prior_samples,
            "max_scratch_mb": max_scratch_mb,
        }
        self._known: dict[str, BatchNormStatistics] = {}  # what fit found, by the weights that it belongs to
        self._before: dict[str, BatchNormStatistics] = {}  # what there was before, which a prior means
        self._of_last_weights: BatchNormStatistics | None = None

    @property
    def statistics(self) -> BatchNormStatistics | None:
        """The statistics that were written, or used last; ``None`` before."""
        found: BatchNormStatistics | None = self.result(BatchNormStatistics.load)
        return found

    @property
    @override
    def default_filename(self) -> str:
        return "adabn"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any training."""
        super().setup(trainer, pl_module, stage)
        if not is_overridden("configure_model", pl_module):  # else there may be no layers yet
            self._has_layers(pl_module)
        if self.dataloader == "test":
            rank_zero_info("AdaBN adapts to the test images themselves: the results are transductive.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate over two samples, so that what cannot work fails now and not after the training."""
        if self.should_estimate(trainer, pl_module) and self._has_layers(pl_module):
            few = {"exact": False, "prior_samples": 1}
            self.try_out(trainer, pl_module, lambda batches: self._estimate(trainer, pl_module, batches, few))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the statistics of the present and of the best weights, and write those that were asked for.

        After every ``on_train_end``, those of the module and the strategy included: weights may be averaged there.
        """
        if not self.should_estimate(trainer, pl_module) or not self._has_layers(pl_module):
            return
        with on_its_device(trainer, pl_module):
            data = self.fit_pass(trainer, pl_module)
            self._of_last_weights = statistics = self._estimate(trainer, pl_module, data)
            self._known = {str(statistics.fingerprint): statistics}
            if self.weights == "best" and best_checkpoint(trainer):
                with best_weights(trainer, pl_module, wanted=True):
                    known = self._known.get(self._fingerprint(pl_module))
                    statistics = known or self._estimate(trainer, pl_module, data)
                self._known[str(statistics.fingerprint)] = statistics
        self._write(trainer, statistics)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt the model in memory, now that every checkpoint is written and every other callback has seen it."""
        if stage == "fit" and self._of_last_weights is not None:
            self._of_last_weights.apply(self._part(pl_module))
        self._of_last_weights = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for ``test``, in a run of ``validate``; not in the validation of a ``fit``."""
        if trainer.state.fn == "validate":
            self._adapt(trainer, pl_module, "val")

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the statistics that belong to the weights at hand, which a checkpoint may have brought."""
        self._adapt(trainer, pl_module, "test")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the statistics that belong to the weights at hand, or adapt to what is predicted."""
        self._adapt(trainer, pl_module, "predict")

    def _adapt(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        if not self.should_estimate(trainer, pl_module) or not self._has_layers(pl_module):
            return
        found = self._known.get(self._fingerprint(pl_module)) or self._estimate_in(trainer, pl_module, stage)
        if found is None:
            rank_zero_warn(
                "AdaBN has no statistics for the weights at hand, so they are used as they are. Statistics of the "
                "best checkpoint fit test(ckpt_path='best'); with data to adapt to, AdaBN(dataloader), they are "
                "estimated when a test starts; those of an earlier run are found below its dirpath=."
            )
            return
        self._result, self._mark = found, self._slot.mark
        found.apply(self._part(pl_module))

    def _estimate_in(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> BatchNormStatistics | None:
        """Statistics of the data of the running stage or of those that were chosen, else those of an earlier run."""
        if self.dataloader == stage or (self.dataloader is None and stage == "predict"):
            if stage == "predict":
                refuse_dropped_samplers(trainer)
            loaders = as_list(getattr(trainer, f"{stage}_dataloaders"))
            data = self.run_pass(trainer, loaders, getattr(trainer, f"num_{stage}_batches"))
        elif self.dataloader is None:
            return self._written(trainer, pl_module)
        else:
            data = self.chosen_pass(trainer, pl_module)
        self.refuse_unwritable(trainer)
        found = self._estimate(trainer, pl_module, data)
        self._write(trainer, found)
        return found

    def _estimate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        data: Iterable[Any],
        changed: Mapping[str, Any] = MappingProxyType({}),
    ) -> BatchNormStatistics:
        fingerprint = self._fingerprint(pl_module)
        try:
            with buffers_of_rank_zero(trainer, pl_module), without_logging(pl_module):
                before = self._before.setdefault(fingerprint, BatchNormStatistics.of(self._part(pl_module)))
                before.apply(self._part(pl_module))  # not what an earlier run has adapted
                found = estimate_batchnorm(
                    pl_module,
                    data,
                    module=self.module,
                    forward=self.forward,
                    progress=trainer.progress_bar_callback is not None and trainer.is_global_zero,
                    all_reduce=all_reduce_of(trainer),
                    **self._options | dict(changed),
                )
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} on {type(pl_module).__name__}: {error}") from error
        found.fingerprint = fingerprint
        return found

    def _write(self, trainer: Trainer, statistics: BatchNormStatistics) -> None:
        self.finish(trainer, statistics)
        trainer.strategy.barrier("batchnorm")

    def _written(self, trainer: Trainer, pl_module: LightningModule) -> BatchNormStatistics | None:
        """The statistics that another process, or an earlier run, has written for these weights."""
        path = trainer.strategy.broadcast(self.path or str(self.resolve_path(trainer)))
        if not trainer.strategy.broadcast(Path(path).is_file()):
            return None
        found = BatchNormStatistics.load(path)
        layers = batchnorm_layers(pl_module, self.module)
        if found.fingerprint != self._fingerprint(pl_module) or not set(found.layers) <= set(layers):
            return None
        rank_zero_info(f"AdaBN applies the statistics in {path}, which belong to these weights.")
        return found

    def _part(self, pl_module: LightningModule) -> torch.nn.Module:
        return pl_module if self.module is None else pl_module.get_submodule(self.module)

    def _fingerprint(self, pl_module: LightningModule) -> str:
        return tensor_checksum(dict(pl_module.named_parameters()))

    def _has_layers(self, pl_module: LightningModule) -> bool:
        try:
            found = bool(batchnorm_layers(pl_module, self.module))
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} on {type(pl_module).__name__}: {error}") from error
        if not found:
            rank_zero_warn(f"{type(pl_module).__name__} has no batch-norm layers: {type(self).__name__} does nothing.")
        return found
