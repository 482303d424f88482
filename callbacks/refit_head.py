"""The head refitted to its features on the server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from pl_personalize.callbacks.data_source import DataSource, Stage
from pl_personalize.callbacks.head_callback import HeadCallback
from pl_personalize.callbacks.module_contexts import on_its_device, silent_and_synchronized
from pl_personalize.callbacks.requirements import naming_errors
from pl_personalize.functional.batches import Labels
from pl_personalize.heads import HeadReference, refit_head
from pl_personalize.heads.cameras import Camera
from pl_personalize.heads.refit import check_refit_options, try_refit


class RefitHead(HeadCallback):
    """Refits the last layer to its features on the server's data, see :func:`~pl_personalize.refit_head`.

    At the end of ``fit``, of the weights in memory::

        trainer = Trainer(callbacks=[RefitHead()])
        trainer.fit(model, datamodule=datamodule)  # the head in memory is refitted; callback.reference, callback.path
        trainer.save_checkpoint("refitted.ckpt")

    or without training, such as of a merged model or of the best checkpoint; the validation then shows the result::

        Trainer(callbacks=[RefitHead()]).validate(model, datamodule=datamodule)

    Checkpoints of the training are saved earlier, with the trained head.

    Args:
        dataloader: The training samples with labels: an iterable of batches, a sequence of DataLoaders, or the names of
            stages whose dataloaders the datamodule or the module provides; by default the train loaders, with their
            augmentation.
        val: The validation samples, which no weight was trained on, likewise; by default the val loaders.
        head: Name of the last layer, see :func:`~pl_personalize.refit_head`.
        labels: Labels in a batch, see :func:`~pl_personalize.refit_head`.
        cameras: See :func:`~pl_personalize.refit_head`.
        directions: See :func:`~pl_personalize.refit_head`.
        forward: ``(module, batch) -> logits``, if calling the module on the input is not enough.
        dirpath: Folder of the file with the reference; by default ``heads`` in the first logger's folder, else in the
            Trainer's ``default_root_dir``.
        filename: Name of the file without extension; by default ``head-reference``.

    Attributes:
        reference: What a device needs to adapt the head; ``None`` before.
        path: Its file; ``None`` after a trial run (``fast_dev_run``), which reads one batch and refits nothing.

    Raises:
        MisconfigurationException: Before the first step, for options, training data, labels, a head or a folder that
            cannot be used. Validation samples and missing classes are known at the end of ``fit`` only.
    """

    default_filename = "head-reference"

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None = None,
        val: Iterable[Any] | Stage | Sequence[Stage] = "val",
        *,
        head: str | None = None,
        labels: Labels | None = None,
        cameras: int | Sequence[Camera] = 0,
        directions: int = 40,
        **options: Any,
    ) -> None:
        super().__init__("train" if dataloader is None else dataloader, head=head, **options)
        with naming_errors(self):
            self._val = DataSource(val)
            check_refit_options(directions, cameras)
        self._labels = labels
        self._options: dict[str, Any] = {"cameras": cameras, "directions": directions}

    @property
    def reference(self) -> HeadReference | None:
        """The last reference, which a device needs to adapt the head; ``None`` before."""
        found: HeadReference | None = self.result(HeadReference.load)
        return found

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse invalid options before any training."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            with naming_errors(self):
                self._val.check(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refit the head in memory, after all checkpoints are written."""
        if self.should_estimate(trainer, pl_module):
            with on_its_device(trainer, pl_module):
                self._refit(trainer, pl_module, "train")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refit the head in a ``validate`` run, but not in the validation of a ``fit``."""
        if trainer.state.fn == "validate" and self.should_estimate(trainer, pl_module):
            self._refit(trainer, pl_module, "val")

    def _refit(self, trainer: Trainer, pl_module: LightningModule, running: Stage) -> None:
        self.check_module(pl_module)
        self.refuse_unwritable(trainer)
        data = self.data(trainer, pl_module, running)
        with naming_errors(self, pl_module):
            self._val_data = self._val.read(trainer, pl_module, running, again=False)
            reference = self.estimate(trainer, pl_module, data)
        self.finish(trainer, reference)
        trainer.strategy.barrier("head")

    @override
    def estimate(
        self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], *, trial: bool = False
    ) -> HeadReference | None:
        """Refit the head; in a trial, only check batches."""
        with silent_and_synchronized(trainer, pl_module):
            if trial or trainer.fast_dev_run:  # type: ignore[attr-defined]
                try_refit(pl_module, batches, self._head, self.forward, self._labels, self._options["cameras"])
                return None
            return refit_head(
                pl_module,
                batches,
                self._val_data,
                labels=self._labels,
                **self._options,
                **self.head_options(trainer),
            )
