"""The head adapted to a user's unlabelled images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from pl_personalize.callbacks.data_source import Stage
from pl_personalize.callbacks.head_callback import HeadCallback
from pl_personalize.callbacks.module_contexts import silent_and_synchronized
from pl_personalize.callbacks.pass_over_data import refuse_dropped_samplers
from pl_personalize.callbacks.requirements import naming_errors
from pl_personalize.heads import HeadAdaptation, HeadReference, adapt_head
from pl_personalize.heads.adapt import Estimator, Shift, check_estimator, check_shift


class AdaptHead(HeadCallback):
    """Adapts a refitted head to a user's unlabelled images, see :func:`~pl_personalize.adapt_head`.

    In a ``predict`` run::

        Trainer(callbacks=[AdaptHead("head-reference.safetensors")]).predict(model, images)

    The model in memory is adapted before the first prediction. A later run first undoes an earlier adaptation of this
    callback. The outcome, which describes the user, is written to a file on this machine that only its owner can read,
    and never logged.

    Args:
        reference: What :func:`~pl_personalize.refit_head` or :class:`RefitHead` found on the server, or its file.
        dataloader: The user's images: an iterable of batches, a sequence of DataLoaders, or the names of stages; by
            default the images that are predicted. Labels are ignored.
        head: Name of the last layer, see :func:`~pl_personalize.adapt_head`.
        shift: The shift to correct, if it is known; by default it is tested.
        estimator: How class priors are estimated, see :func:`~pl_personalize.adapt_head`.
        forward: ``(module, batch) -> logits``, if calling the module on the input is not enough.
        dirpath: Folder of the file; by default ``heads`` in the Trainer's ``default_root_dir``. A logger's folder may
            be uploaded.
        filename: Name of the file without extension; by default ``head-adaptation``.

    Attributes:
        outcome: What was found and changed; ``None`` before.
        path: Its file; ``None`` after a trial run (``fast_dev_run``), which writes none.

    Raises:
        ArtifactError: If the file of the reference cannot be read.
        MisconfigurationException: When the prediction starts, if the reference belongs to another head, or data or
            folder cannot be used. The model is then unchanged.
    """

    default_filename = "head-adaptation"

    def __init__(
        self,
        reference: HeadReference | str | os.PathLike[str],
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None = None,
        *,
        head: str | None = None,
        shift: Shift | None = None,
        estimator: Estimator = "em",
        **options: Any,
    ) -> None:
        super().__init__(dataloader, head=head, **options)
        self.reference = reference if isinstance(reference, HeadReference) else HeadReference.load(reference)
        with naming_errors(self):
            check_shift(shift)
            check_estimator(estimator)
        self._shift, self._estimator = shift, estimator

    @property
    def outcome(self) -> HeadAdaptation | None:
        """The last outcome; ``None`` before."""
        found: HeadAdaptation | None = self.result(HeadAdaptation.load)
        return found

    @override
    def resolve_path(self, trainer: Trainer) -> Path:
        """Path of the file."""
        folder = Path(trainer.default_root_dir, self.folder) if self.dirpath is None else self.dirpath
        return folder / f"{self.filename}.safetensors"

    @override
    def should_estimate(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Only in ``predict`` runs."""
        return trainer.state.fn == "predict"

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adapt the head before the first prediction."""
        if not self.should_estimate(trainer, pl_module) or not self.check_module(pl_module):
            return
        with naming_errors(self, pl_module):
            if self.dataloader is None or "predict" in self.source.stages:
                refuse_dropped_samplers(trainer)
            data = self.data(trainer, pl_module, "predict")
            self.refuse_unwritable(trainer)
            outcome = self.estimate(trainer, pl_module, data)
        self.finish(trainer, outcome)
        trainer.strategy.barrier("head")

    @override
    def estimate(
        self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], *, trial: bool = False
    ) -> HeadAdaptation:
        """Adapt the head to batches on this process."""
        before = self.outcome
        if before is not None and before.is_applied(pl_module):
            before.undo(pl_module)
            try:
                return self._adapt(trainer, pl_module, batches)
            except BaseException:
                before.apply(pl_module)
                raise
        return self._adapt(trainer, pl_module, batches)

    def _adapt(self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any]) -> HeadAdaptation:
        with silent_and_synchronized(trainer, pl_module):
            options = self.head_options(trainer)
            options |= {"shift": self._shift, "estimator": self._estimator}
            return adapt_head(pl_module, batches, self.reference, **options)
