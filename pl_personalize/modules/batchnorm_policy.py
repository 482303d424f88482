"""Where the batch-norm statistics of a model come from when it is tested on a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pl_personalize.adaptation import check_adaptation, estimate_batchnorm
from pl_personalize.batchnorm import BatchNormStatistics, batchnorm_layers
from pl_personalize.functional.batches import as_input
from pl_personalize.functional.moments import MEAN, VARIANCE
from pl_personalize.per_sample.swapped_weights import call_with_weights

BNPolicy = Literal["last", "average", "expert", "recalibrate", "adapt", "reference"]
"""Of model t, on task i:

* ``last``: the statistics of model t; of a merge, those of expert t;
* ``average``: of the mixture of experts 1..t: their means and second moments are averaged;
* ``expert``: those of expert i;
* ``recalibrate``: model t's, re-estimated on the server's validation images of task i;
* ``adapt``: model t's, re-estimated on the user's unlabelled ``adapt`` images of task i (AdaBN);
* ``reference``: what the published code does: γ and β of model i, statistics of expert t.
"""
OWN_POLICIES: tuple[BNPolicy, ...] = ("last", "recalibrate", "adapt")
"""Those that make sense for models that are no merges."""


def check_policy(policy: BNPolicy | None, known: Sequence[BNPolicy] = get_args(BNPolicy)) -> None:
    """Refuse an unknown policy.

    Raises:
        MisconfigurationException: If it is none of them.
    """
    if policy is not None and policy not in known:
        raise MisconfigurationException(f"bn_policy must be one of {', '.join(known)}; got {policy!r}.")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that no estimate has.

    Raises:
        MisconfigurationException: If a name is unknown or a value out of range.
    """
    if unknown := options.keys() - {"exact", "prior_samples", "max_scratch_mb"}:
        raise MisconfigurationException(
            f"bn_options may have exact, prior_samples and max_scratch_mb; got {', '.join(sorted(unknown))}."
        )
    try:
        check_adaptation(options.get("prior_samples", 0), options.get("max_scratch_mb", 1))
    except ValueError as error:
        raise MisconfigurationException(f"bn_options: {error}") from error


def resolve_policy(policy: BNPolicy | None, module: LightningModule) -> BNPolicy:
    """The policy; if none was chosen, ``adapt`` where the Trainer's datamodule has a user's data, else ``average``."""
    if policy is not None:
        return policy
    datamodule = getattr(module._trainer, "datamodule", None)
    return "adapt" if hasattr(datamodule, "adapt_dataloader") else "average"


def statistics_names(body: nn.Module) -> list[str]:
    """Names of running means and variances in a body; a shared layer is there once."""
    return [f"{layer}.{what}".removeprefix(".") for layer in batchnorm_layers(body) for what in (MEAN, VARIANCE)]


def affine_names(body: nn.Module) -> list[str]:
    """Names of γ and β in a body; a shared layer is there once."""
    return [
        f"{name}.{what}".removeprefix(".")
        for name, layer in batchnorm_layers(body).items()
        for what in ("weight", "bias")
        if getattr(layer, what) is not None
    ]


def data_for(policy: BNPolicy, module: LightningModule, task: int) -> Iterable[Any]:
    """The images to re-estimate on, from the Trainer's datamodule.

    Raises:
        MisconfigurationException: If it has none.
    """
    datamodule: Any = getattr(module._trainer, "datamodule", None)
    hook = "adapt_dataloader" if policy == "adapt" else "server_dataloader"
    if not hasattr(datamodule, hook):
        raise MisconfigurationException(
            f"bn_policy={policy!r} needs a datamodule with {hook}(task), such as a TaskIncrementalDataModule; the "
            f"Trainer has {type(datamodule).__name__}. 'average' and 'last' need no data."
        )
    loader: Iterable[Any] = getattr(datamodule, hook)(task, **({} if policy == "adapt" else {"split": "val"}))
    return loader


def re_estimate(
    network: nn.Module,
    state: Mapping[str, Tensor],
    data: Iterable[Any],
    options: Mapping[str, Any],
    convert: Callable[[Any], Any],
) -> BatchNormStatistics:
    """Statistics of a network's body with the parameters of a state dict, which stays as it is.

    Args:
        network: The architecture, with a ``body``.
        state: Its entries.
        data: Batches of images.
        options: Of :func:`~pl_personalize.adapt_batchnorm`.
        convert: Brings images to the Trainer's precision.
    """
    # The estimate writes into the statistics while it runs.
    names = [f"body.{name}" for name in statistics_names(network.get_submodule("body"))]
    with torch.inference_mode(False):
        entries = {**state, **{name: state[name].clone() for name in names}}

    def forward(module: nn.Module, batch: Any) -> Any:
        return call_with_weights(module, entries, convert(as_input(batch)))

    return estimate_batchnorm(network, data, module="body", forward=forward, **options)
