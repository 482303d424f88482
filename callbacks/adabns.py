"""Batch norm adapted to a user's labelled data: γ and β trained, all other parameters fixed."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from pl_personalize.adaptation import adapt_batchnorm, check_adaptation
from pl_personalize.batchnorm import batchnorm_layers
from pl_personalize.callbacks.estimation_callback import train_limits
from pl_personalize.callbacks.module_contexts import all_reduce_of, without_logging
from pl_personalize.callbacks.pass_over_data import PassOverData, as_list, refuse_iterators
from pl_personalize.callbacks.requirements import check_trainer, is_resumed
from pl_personalize.functional.batches import Forward


class AdaBNS(BaseFinetuning):
    """Trains the scales and shifts (γ and β) of batch-norm layers alone: AdaBN-S of De Lange et al., CVPR 2020.

    For a user who has a few labelled images::

        Trainer(max_epochs=5, callbacks=[AdaBNS()]).fit(model, labelled_images)

    Loss, optimiser and labels are the module's own; all other parameters need no gradient while ``fit`` runs, and are
    after it as they were. Before the first step the running statistics are re-estimated on the training images, as
    :func:`~pl_personalize.adapt_batchnorm` does, and then fixed: γ and β are trained for the statistics that are used
    afterwards, and a last batch of one image does no harm.

    Args:
        statistics: ``"adapt"``, see above; ``"keep"`` fixes those that the model has; ``"batch"`` is what training
            usually does, and what the published code did: each step normalises by its batch, and the running statistics
            move along by the layer's momentum.
        module: Only batch norm below this submodule.
        exact: For ``"adapt"``, see :func:`~pl_personalize.adapt_batchnorm`.
        prior_samples: For ``"adapt"``, see there.
        forward: For ``"adapt"``: ``(module, batch) -> anything`` where calling the module on the input is not enough.

    Raises:
        MisconfigurationException: In ``setup``, for an unknown option, a strategy that shards parameters, a module that
            does not exist, or a layer with ``track_running_stats=False``. Without batch-norm layers, or if none has γ
            and β, there is a warning, and the callback does nothing.
    """

    def __init__(
        self,
        statistics: Literal["adapt", "keep", "batch"] = "adapt",
        *,
        module: str | None = None,
        exact: bool = False,
        prior_samples: float = 0,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        if statistics not in ("adapt", "keep", "batch"):
            raise MisconfigurationException(f"statistics must be 'adapt', 'keep' or 'batch'; got {statistics!r}.")
        try:
            check_adaptation(prior_samples, max_scratch_mb=1)
        except ValueError as error:
            raise MisconfigurationException(f"AdaBNS: {error}") from error
        self.statistics, self.module = statistics, module
        self._options: dict[str, Any] = {"exact": exact, "prior_samples": prior_samples, "forward": forward}
        self._layers: list[_BatchNorm] = []
        self._before: list[tuple[nn.Parameter, bool]] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(statistics=self.statistics, module=self.module)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, then freeze."""
        check_trainer(self, trainer, pl_module)
        others = [c for c in trainer.callbacks if isinstance(c, BaseFinetuning) and c is not self]  # type: ignore[attr-defined]
        if stage == "fit" and others:
            raise MisconfigurationException(
                f"AdaBNS and {type(others[0]).__name__} in one Trainer would each freeze what the other trains. Use "
                "one of them; a single AdaBNS trains the batch-norm layers of a part, module=, or of the whole."
            )
        if stage == "fit" and not is_overridden("configure_model", pl_module):  # else there may be no layers yet
            super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze a module that ``configure_model`` has made."""
        if is_overridden("configure_model", pl_module):
            if trainer.world_size > 1:  # DDP was told before which parameters need a gradient
                raise MisconfigurationException(
                    "AdaBNS in several processes needs the layers before configure_model: make them in __init__."
                )
            self.freeze_before_training(pl_module)
        super().on_fit_start(trainer, pl_module)

    @override
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Let γ and β of the chosen layers need a gradient, and nothing else."""
        try:
            layers = list(batchnorm_layers(pl_module, self.module).values())
        except ValueError as error:
            raise MisconfigurationException(f"AdaBNS on {type(pl_module).__name__}: {error}") from error
        affine = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        if not affine:
            rank_zero_warn(
                f"{type(pl_module).__name__} has no batch-norm layers with γ and β: AdaBNS does nothing, and all "
                "parameters are trained."
            )
            return
        self._layers = layers
        self._before = [(p, p.requires_grad) for p in pl_module.parameters()]
        self._modes = [(layer, layer.training) for layer in pl_module.modules() if isinstance(layer, _BatchNorm)]
        # Not by Lightning's freeze(): that would switch off the running statistics of layers that are not trained.
        for parameter in pl_module.parameters():
            parameter.requires_grad_(False)
        for parameter in affine:
            parameter.requires_grad_(True)

    @override
    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Nothing is unfrozen on the way."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adapt the statistics; a run that is resumed has them from its checkpoint."""
        self._fix()  # a run that is resumed within an epoch does not come to its start
        if not self._layers or self.statistics != "adapt" or is_resumed(trainer):
            return
        loaders = as_list(trainer.train_dataloader)
        refuse_iterators(loaders)
        try:
            with without_logging(pl_module):
                adapt_batchnorm(
                    pl_module,
                    PassOverData(trainer, loaders, train_limits(trainer, loaders)),
                    module=self.module,
                    all_reduce=all_reduce_of(trainer),
                    **self._options,
                )
        except ValueError as error:
            raise MisconfigurationException(f"AdaBNS on {type(pl_module).__name__}: {error}") from error

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the statistics fixed, unless they move along."""
        super().on_train_epoch_start(trainer, pl_module)
        self._fix()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let every parameter need a gradient, and every layer be in the mode, as before."""
        self._restore()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same when the training was interrupted."""
        self._restore()

    def _fix(self) -> None:
        """Layers whose statistics do not move, those that are not trained among them, are in eval mode."""
        for layer, _ in self._modes:
            if self.statistics != "batch" or layer not in self._layers:
                layer.eval()

    def _restore(self) -> None:
        for parameter, needs_grad in self._before:
            parameter.requires_grad_(needs_grad)
        for layer, training in self._modes:
            layer.training = training
        self._layers, self._before, self._modes = [], [], []
