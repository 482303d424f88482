"""Training of one expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Accuracy
from typing_extensions import override

from pl_personalize.callbacks.parameter_penalty import ParameterPenalty
from pl_personalize.callbacks.penalty_sources import anchor_of
from pl_personalize.callbacks.plateau_schedule import PlateauSchedule
from pl_personalize.checks import check_option
from pl_personalize.functional.batches import as_input
from pl_personalize.functional.labels import class_labels
from pl_personalize.functional.objectives import IGNORE_INDEX
from pl_personalize.functional.penalties import add_l2_gradient_
from pl_personalize.functional.seeding import derive_seed, reseed
from pl_personalize.models import TaskNetwork


class TaskLearner(LightningModule):
    r"""Trains one expert: SGD on the cross-entropy of one task, pulled to the preceding expert.

    The protocol of De Lange et al., CVPR 2020: momentum SGD, the schedule of
    :class:`~pl_personalize.callbacks.PlateauSchedule`, and L2-transfer: the gradient of
    :math:`\lambda \|\theta - \theta_\mathrm{prev}\|^2` for the body is added before the optimiser's step.

    Randomness inside the network (dropout) is drawn from a seed that follows from ``seed``, ``task`` and the step, so a
    run that was stopped in the middle of an epoch and resumed equals the uninterrupted one, bit for bit.

    Labels may be of any type, also in a column, if they are whole numbers; one that is no class of the network is
    refused (in training, but for the −100 that PyTorch's cross-entropy passes over).

    Logs ``train/loss`` every ``log_every_n_steps`` of the Trainer, ``val/loss`` and ``val/acc`` (in [0, 1]).

    Args:
        network: Body and head. It is trained in place.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        l2_transfer: λ. Without ``anchor`` it has no effect.
        anchor: The preceding expert's body: its state dict, or the entries of its parameters.
        seed: Seed of the run.
        task: Number of the task, which the seeds of the steps depend on.
        lr_patience: See :class:`~pl_personalize.callbacks.PlateauSchedule`.
        stop_patience: See there.

    Attributes:
        penalty: The callback that adds L2-transfer's gradient; ``None`` without an anchor, or if λ is 0.

    Raises:
        MisconfigurationException: If the anchor does not fit the body, or a number is out of range.
    """

    def __init__(
        self,
        network: TaskNetwork,
        *,
        lr: float = 0.001,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        l2_transfer: float = 0.001,
        anchor: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        task: int = 0,
        lr_patience: int = 5,
        stop_patience: int = 11,
    ) -> None:
        super().__init__()
        if not isinstance(network, TaskNetwork):
            raise MisconfigurationException(
                f"network must be a TaskNetwork, with a body and a head; got a {type(network).__name__}. Make one with "
                "pl_personalize.models.split, or pl_personalize.models.backbone."
            )
        check_option("lr", lr, exclusive=True)
        check_option("l2_transfer", l2_transfer)
        # By name: what subclasses take besides, such as networks, would not load with weights_only.
        self.save_hyperparameters(
            "lr", "momentum", "weight_decay", "l2_transfer", "seed", "task", "lr_patience", "stop_patience"
        )
        self.network = network
        self.val_accuracy = Accuracy(task="multiclass", num_classes=network.num_classes, average="micro")
        self.penalty = None if anchor is None else self._pull_to(anchor, l2_transfer)

    def _pull_to(self, anchor: Mapping[str, Tensor], strength: float) -> ParameterPenalty | None:
        try:
            entries = anchor_of(dict(self.network.body.named_parameters()), anchor, None)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        return _L2Transfer(strength, anchor=entries, module="network.body", log_name=None) if strength else None

    def model_state(self) -> dict[str, Tensor]:
        """The entries of the trained model that are kept: ``body.…`` and ``head.…``."""
        return self.network.state_dict()

    @override
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    @override
    def configure_callbacks(self) -> list[Callback]:
        """The schedule, unless the Trainer has one, and L2-transfer."""
        trainer: Any = self.trainer
        # Those of an earlier run with this Trainer go. Lightning drops the Trainer's own penalties in favor of the
        # module's, so they are returned, too.
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, _L2Transfer)]
        callbacks: list[Callback] = []
        if self.penalty is not None:
            callbacks = [callback for callback in trainer.callbacks if type(callback) is ParameterPenalty]
            callbacks.append(self.penalty)
        if not any(isinstance(callback, PlateauSchedule) for callback in trainer.callbacks):
            options = {key: self.hparams[key] for key in ("lr_patience", "stop_patience")}
            callbacks.append(PlateauSchedule("val/acc", **options))
        return callbacks

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = {key: self.hparams[key] for key in ("lr", "momentum", "weight_decay")}
        return torch.optim.SGD([p for p in self.network.parameters() if p.requires_grad], **options)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Reseed, so that the step's randomness does not depend on what ran before it in this process."""
        run = self.hparams["seed"], self.hparams["task"]
        reseed(self.device, derive_seed(*run, self.current_epoch, batch_idx, self.global_rank))

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        # On an accelerator, a look at the labels waits for it: in the first epoch alone.
        if self.current_epoch == 0 or y.device.type == "cpu":
            y = self._class_labels(y, ignored=IGNORE_INDEX)
        loss = self.training_loss(x, y)
        # A logged value costs Lightning about as much as a small network's step: log only what is written.
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def _class_labels(self, labels: Tensor, *, ignored: int | None = None) -> Tensor:
        """Labels as losses and accuracies take them, or an error if one is no class of the network."""
        if labels.ndim == 2 and labels.shape[1] > 1:  # a probability of each class
            return labels
        try:
            return class_labels(labels, self.network.num_classes, ignored=ignored)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}, task {self.hparams['task']}: {error}") from error

    def training_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch of images and labels. Override for another one."""
        return F.cross_entropy(self(x), y)

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch[0], self._class_labels(batch[1])
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val/loss", F.cross_entropy(logits, y), sync_dist=True)
        self.log("val/acc", self.val_accuracy, prog_bar=True)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch[0], self._class_labels(batch[1])
        self.log("test/acc", (self(x).argmax(1) == y).float().mean(), batch_size=len(y), sync_dist=True)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The logits of images, which may come with labels."""
        logits: Tensor = self(as_input(batch))
        return logits


class _L2Transfer(ParameterPenalty):
    """L2-transfer of a :class:`TaskLearner`, by fused additions."""

    add_gradient_ = staticmethod(lambda params, anchors, _, strength: add_l2_gradient_(params, anchors, strength))
