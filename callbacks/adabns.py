"""AdaBN-S: batch-norm scales and shifts trained on labelled data."""

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

from pl_personalize.adaptation import check_adaptation, estimate_batchnorm
from pl_personalize.batchnorm import batchnorm_layers
from pl_personalize.callbacks.data_source import check_train_loaders, train_limits
from pl_personalize.callbacks.module_contexts import pass_options, silent_and_synchronized
from pl_personalize.callbacks.pass_over_data import PassOverData, as_list
from pl_personalize.callbacks.requirements import check_trainer, is_resumed, naming_errors
from pl_personalize.functional.batches import Forward


class AdaBNS(BaseFinetuning):
    """Trains only the scales and shifts (γ and β) of batch norm: AdaBN-S of De Lange et al., CVPR 2020.

    For a user with a few labelled images::

        Trainer(max_epochs=5, callbacks=[AdaBNS()]).fit(model, labelled_images)

    Loss, optimizer and labels are the module's. All other parameters are frozen during ``fit``, and thawed afterwards.
    By default the running statistics are re-estimated once, on the train loaders, before the first step, and then
    fixed: γ and β are trained for the statistics that are used afterwards, and a last batch of one image is harmless.

    Args:
        statistics: ``"adapt"``: re-estimate and fix the statistics, see above; ``"keep"``: fix those of the model;
            ``"batch"``: normalize each step by its batch and update the running statistics with the layer's momentum,
            as training usually does and as the published code did.
        module: Only train batch norm below this submodule.
        exact: For ``"adapt"``, see :func:`~pl_personalize.adapt_batchnorm`.
        prior_samples: For ``"adapt"``, see :func:`~pl_personalize.adapt_batchnorm`.
        forward: For ``"adapt"``: ``(module, batch) -> anything``, if calling the module on the input is not enough.

    Raises:
        MisconfigurationException: In ``setup``, for an unknown option, a strategy that shards parameters, an unknown
            module, or a layer with ``track_running_stats=False``. If no batch-norm layer has γ and β, the callback
            warns and does nothing.
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
        with naming_errors(self):
            check_adaptation(prior_samples, max_scratch_mb=1)
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
        """Refuse invalid options, then freeze."""
        check_trainer(self, trainer, pl_module)
        others = [c for c in trainer.callbacks if isinstance(c, BaseFinetuning) and c is not self]  # type: ignore[attr-defined]
        if stage == "fit" and others:
            raise MisconfigurationException(
                f"AdaBNS and {type(others[0]).__name__} in one Trainer would each freeze what the other trains. Use "
                "only one of them; AdaBNS(module=) trains the batch-norm layers of a submodule."
            )
        if stage == "fit" and not is_overridden("configure_model", pl_module):  # else the layers may not exist yet
            super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze a module that ``configure_model`` has made."""
        if is_overridden("configure_model", pl_module):
            if trainer.world_size > 1:  # DDP already knows which parameters need a gradient
                raise MisconfigurationException(
                    "AdaBNS in several processes does not support layers made in configure_model: make them in "
                    "__init__."
                )
            self.freeze_before_training(pl_module)
        super().on_fit_start(trainer, pl_module)

    @override
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Require gradients for γ and β of the chosen layers only."""
        with naming_errors(self, pl_module):
            layers = list(batchnorm_layers(pl_module, self.module).values())
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
        # Lightning's freeze() would disable the running statistics of frozen layers.
        for parameter in pl_module.parameters():
            parameter.requires_grad_(False)
        for parameter in affine:
            parameter.requires_grad_(True)

    @override
    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze nothing during training."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adapt the statistics; a resumed run loads them from its checkpoint."""
        self._fix()  # a run resumed within an epoch has no epoch start
        if not self._layers or self.statistics != "adapt" or is_resumed(trainer):
            return
        loaders = as_list(trainer.train_dataloader)
        with naming_errors(self, pl_module), silent_and_synchronized(trainer, pl_module):
            check_train_loaders(trainer, pl_module)
            data = PassOverData(trainer, loaders, train_limits(trainer, loaders))
            options = self._options | pass_options(trainer)
            statistics = estimate_batchnorm(pl_module, data, module=self.module, **options)
        statistics.apply(pl_module.get_submodule(self.module or ""))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the statistics fixed, except for ``"batch"``."""
        super().on_train_epoch_start(trainer, pl_module)
        self._fix()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore ``requires_grad`` and the modes."""
        self._restore()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore them when training is interrupted."""
        self._restore()

    def _fix(self) -> None:
        """Put layers with fixed statistics, including those that are not trained, in eval mode."""
        for layer, _ in self._modes:
            if self.statistics != "batch" or layer not in self._layers:
                layer.eval()

    def _restore(self) -> None:
        for parameter, needs_grad in self._before:
            parameter.requires_grad_(needs_grad)
        for layer, training in self._modes:
            layer.training = training
        self._layers, self._before, self._modes = [], [], []
