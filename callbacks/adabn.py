"""AdaBN: batch-norm statistics re-estimated on unlabelled data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from pl_personalize.adaptation import check_adaptation, estimate_batchnorm
from pl_personalize.artifacts import tensor_checksum
from pl_personalize.batchnorm import BatchNormStatistics, batchnorm_layers
from pl_personalize.callbacks.data_source import Stage
from pl_personalize.callbacks.estimation_callback import EstimationCallback
from pl_personalize.callbacks.module_contexts import (
    best_checkpoint,
    best_weights,
    on_its_device,
    pass_options,
    silent_and_synchronized,
)
from pl_personalize.callbacks.pass_over_data import refuse_dropped_samplers
from pl_personalize.callbacks.requirements import naming_errors


class AdaBN(EstimationCallback):
    """Re-estimates batch-norm statistics on unlabelled data (AdaBN, Li et al., 2016); no parameter changes.

    At the end of ``fit``::

        trainer = Trainer(callbacks=[AdaBN("predict")])  # the user's unlabelled images
        trainer.fit(model, datamodule=datamodule)  # the model in memory is adapted; callback.path
        trainer.test(model, datamodule=datamodule, ckpt_path="best")  # adapted, too

    or without training::

        Trainer(callbacks=[AdaBN()]).predict(model, images)

    Checkpoints are saved earlier, with the statistics of the training. So the estimated statistics are written to a
    file (:class:`~pl_personalize.BatchNormStatistics`) with a fingerprint of the weights that they belong to.

    ``dataloader`` is the only source of statistics. Its default depends on the run:

    ======================  ======================================================================
    ``fit``                 the train loaders
    ``predict``             the images that are predicted
    ``validate``, ``test``  no estimate: the statistics that ``fit`` estimated for these weights, in
                            memory or in the file; refused if there are none
    ======================  ======================================================================

    With ``dataloader``, a run after ``fit`` with the same weights applies the statistics of ``fit``; any other run
    estimates when it starts. One callback is for one user; give each user a file (``filename``).

    The batches are those that the loaders yield; under DDP each process reads a share, and all end with the same
    statistics (docs/passes.md). Autocast is off.

    Args:
        dataloader: An iterable of batches, or a sequence of DataLoaders; or the name of a stage (``"train"``,
            ``"val"``, ``"predict"``, ``"test"``) or several, whose dataloaders the datamodule (after ``setup``) or else
            the module provides; ``None``: see above. Labels are ignored. ``"test"`` adapts to the tested images
            (transductive): report it.
        exact: See :func:`~pl_personalize.adapt_batchnorm`.
        prior_samples: See :func:`~pl_personalize.adapt_batchnorm`.
        weights: Weights whose statistics ``fit`` writes: those of the ``"best"`` checkpoint of a ModelCheckpoint that
            monitors a metric, if there is one, or the ``"last"``. The model in memory is adapted in either case.
        module: Only adapt batch norm below this submodule; names are relative to it.
        forward: ``(module, batch) -> anything``, if calling the module on the input is not enough.
        dirpath: Folder of the file; by default ``batchnorm`` in the first logger's folder, else in the Trainer's
            ``default_root_dir``.
        filename: Name of the file without extension; by default ``adabn``.
        max_scratch_mb: See :func:`~pl_personalize.adapt_batchnorm`.

    Attributes:
        statistics: The statistics written or applied last; ``None`` before.
        path: Their file; ``None`` after a trial run (``fast_dev_run``), which writes none.

    Raises:
        MisconfigurationException: In ``setup``, for a Trainer of ``pytorch_lightning``, a strategy that shards
            parameters (FSDP, DeepSpeed), an unknown module, a layer with ``track_running_stats=False``, or, in ``fit``,
            a stage without dataloader; before the first step, for data or a folder that cannot be used; when a test
            starts, if there are no statistics for its weights.
    """

    folder = "batchnorm"
    default_filename = "adabn"
    reads_again = True  # for the last weights, the best ones, and layer by layer

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None = None,
        *,
        exact: bool = False,
        prior_samples: float = 0,
        max_scratch_mb: float = 256,
        **options: Any,
    ) -> None:
        super().__init__(dataloader, **options)
        with naming_errors(self):
            check_adaptation(prior_samples, max_scratch_mb)
        self._options = {"exact": exact, "prior_samples": prior_samples, "max_scratch_mb": max_scratch_mb}
        self._fitted: dict[str, BatchNormStatistics] = {}  # results of fit, by fingerprint of the weights
        self._before: dict[str, BatchNormStatistics] = {}  # unadapted statistics, by fingerprint: the prior
        self._of_last_weights: BatchNormStatistics | None = None

    @property
    def statistics(self) -> BatchNormStatistics | None:
        """The statistics written or applied last; ``None`` before."""
        found: BatchNormStatistics | None = self.result(BatchNormStatistics.load)
        return found

    @override
    def check_module(self, pl_module: LightningModule) -> bool:
        """Whether the module has batch norm; warns if it has none."""
        with naming_errors(self, pl_module):
            found = bool(batchnorm_layers(pl_module, self.module))
        if not found:
            rank_zero_warn(f"{type(pl_module).__name__} has no batch-norm layers: {type(self).__name__} does nothing.")
        return found

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse invalid options before any training."""
        super().setup(trainer, pl_module, stage)
        if self.dataloader == "test":
            rank_zero_info("AdaBN adapts to the test images themselves: the results are transductive.")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the statistics of the last and of the best weights, and write those of ``weights``.

        Runs after every ``on_train_end`` of the module and the strategy, where weights may be averaged.
        """
        if not self.should_estimate(trainer, pl_module) or not self.check_module(pl_module):
            return
        with on_its_device(trainer, pl_module), naming_errors(self, pl_module):
            data = self.data(trainer, pl_module, "train")
            self._of_last_weights = statistics = self.estimate(trainer, pl_module, data)
            self._fitted = {str(statistics.fingerprint): statistics}
            if self.weights == "best" and best_checkpoint(trainer):
                with best_weights(trainer, pl_module):
                    fitted = self._fitted.get(_fingerprint(pl_module))
                    statistics = fitted or self.estimate(trainer, pl_module, data)
                self._fitted[str(statistics.fingerprint)] = statistics
        self._write(trainer, statistics)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adapt the model in memory, after all checkpoints are written and all other callbacks have run."""
        if stage == "fit" and self._of_last_weights is not None:
            self._of_last_weights.apply(pl_module.get_submodule(self.module or ""))
        self._of_last_weights = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adapt the model in a ``validate`` run, but not in the validation of a ``fit``."""
        if trainer.state.fn == "validate":
            self._adapt(trainer, pl_module, "val")

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adapt the model, whose weights may come from a checkpoint."""
        self._adapt(trainer, pl_module, "test")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adapt the model, by default to the images that are predicted."""
        self._adapt(trainer, pl_module, "predict")

    def _adapt(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        if not self.should_estimate(trainer, pl_module) or not self.check_module(pl_module):
            return
        reads_run = stage in self.source.stages or (self.dataloader is None and stage == "predict")
        fitted = self._fitted.get(_fingerprint(pl_module))
        if fitted is not None and (self.dataloader is not None or stage != "predict"):
            found = fitted
        elif self.dataloader is None and stage != "predict":
            found = self._read_file(trainer, pl_module)
        else:
            with naming_errors(self, pl_module):
                if reads_run and stage == "predict":
                    refuse_dropped_samplers(trainer)
                data = self.data(trainer, pl_module, stage)
                self.refuse_unwritable(trainer)
                found = self.estimate(trainer, pl_module, data)
            self._write(trainer, found)
        self._result, self._mark = found, self._slot.mark
        found.apply(pl_module.get_submodule(self.module or ""))

    @override
    def estimate(
        self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], *, trial: bool = False
    ) -> BatchNormStatistics:
        """Estimate statistics over batches on this process."""
        fingerprint, part = _fingerprint(pl_module), pl_module.get_submodule(self.module or "")
        options: dict[str, Any] = self._options | ({"exact": False, "prior_samples": 1} if trial else {})
        with silent_and_synchronized(trainer, pl_module):
            self._before.setdefault(fingerprint, BatchNormStatistics.of(part)).apply(part)  # undo an earlier run's
            found = estimate_batchnorm(
                pl_module, batches, module=self.module, forward=self.forward, **pass_options(trainer), **options
            )
        found.fingerprint = fingerprint
        return found

    def _write(self, trainer: Trainer, statistics: BatchNormStatistics) -> None:
        self.finish(trainer, statistics)
        trainer.strategy.barrier("batchnorm")

    def _read_file(self, trainer: Trainer, pl_module: LightningModule) -> BatchNormStatistics:
        """Read the statistics that another process, or an earlier run, has written for these weights."""
        path = trainer.strategy.broadcast(self.path or str(self.resolve_path(trainer)))
        problem = "does not exist"
        if trainer.strategy.broadcast(Path(path).is_file()):
            found = BatchNormStatistics.load(path)
            layers = batchnorm_layers(pl_module, self.module)
            if found.fingerprint == _fingerprint(pl_module) and set(found.layers) <= set(layers):
                rank_zero_info(f"AdaBN applies the statistics in {path}, which belong to these weights.")
                return found
            problem = "belongs to other weights"
        raise MisconfigurationException(
            f"AdaBN has no statistics for the weights at hand: {path} {problem}. Test the weights whose statistics fit "
            "wrote (weights='best': ckpt_path='best'), set dirpath= and filename= to their file, or pass data to adapt "
            "to, AdaBN(dataloader)."
        )


def _fingerprint(pl_module: LightningModule) -> str:
    return tensor_checksum(dict(pl_module.named_parameters()))
