"""Re-estimated batch-norm statistics: on the server's images (recalibration) or on the user's (AdaBN)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from pl_personalize.adaptation import check_adaptation, estimate_batchnorm
from pl_personalize.adaptations.adaptation import Adaptation, Device, Entries, Reads, Received, load_entries
from pl_personalize.adaptations.expert_statistics import affine_names
from pl_personalize.batchnorm import batchnorm_layers
from pl_personalize.callbacks import AdaBNS
from pl_personalize.checks import check_option
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.models import TaskNetwork


@dataclass(frozen=True)
class _Reestimated(Adaptation):
    """Base class for adaptations that re-estimate batch-norm statistics.

    Attributes:
        exact: Make the statistics independent of the batch size, see :func:`~pl_personalize.adapt_batchnorm`.
        prior_samples: Number of images that the present statistics count as; a merge has the average of its experts.
        max_scratch_mb: Memory for ``exact``, in 2**20 bytes.
    """

    needs_batchnorm: ClassVar[bool] = True

    exact: bool = False
    prior_samples: float = 0.0
    max_scratch_mb: float = 256

    def __post_init__(self) -> None:
        try:
            check_adaptation(self.prior_samples, self.max_scratch_mb)
        except ValueError as error:
            raise MisconfigurationException(f"{self.name}: {error}") from error

    def _estimate(self, network: TaskNetwork, images: Iterable[Any], device: Device) -> Entries:
        def forward(model: nn.Module, batch: Any) -> Any:
            return model(device.as_input(batch))

        statistics = estimate_batchnorm(
            network,
            images,
            module="body",
            forward=forward,
            exact=self.exact,
            prior_samples=self.prior_samples,
            max_scratch_mb=self.max_scratch_mb,
        )
        return {f"body.{name}": value for name, value in statistics.items()}


@dataclass(frozen=True)
class Recalibrate(_Reestimated):
    """Batch-norm statistics re-estimated on the server's validation images of the task."""

    name: ClassVar[str] = "recalibrate"
    text: ClassVar[str] = "batch-norm statistics re-estimated on the server's images of the task"
    reads: ClassVar[Reads] = "server"

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        return self._estimate(network, device.server_images(), device)


@dataclass(frozen=True)
class AdaBN(_Reestimated):
    """Batch-norm statistics re-estimated on the user's unlabelled images of the task (AdaBN)."""

    name: ClassVar[str] = "AdaBN"
    text: ClassVar[str] = "batch-norm statistics re-estimated on the user's unlabelled images of the task"
    reference: ClassVar[str] = "Li et al., 2016"
    reads: ClassVar[Reads] = "unlabelled"

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        return self._estimate(network, device.images(), device)


@dataclass(frozen=True)
class EarlyAdaBN(AdaBN):
    """AdaBN in the first layers only: those see a camera, late ones class frequencies too.

    The others keep their statistics, which :class:`Recalibrate` should have re-estimated before
    (``recalibrate+early-AdaBN``).

    Attributes:
        depth: Share of the batch-norm layers that are adapted, from the input.
    """

    name: ClassVar[str] = "early-AdaBN"
    text: ClassVar[str] = "AdaBN in the first quarter of the batch-norm layers"
    reference: ClassVar[str] = "after HybridTTN, Lim et al., ICLR 2023"

    depth: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("early-AdaBN: depth", self.depth, most=1, exclusive=True)

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        layers = list(batchnorm_layers(network.body))
        early = {f"body.{name}" for name in layers[: math.ceil(self.depth * len(layers))]}
        found = super().adapt(network, device, received)
        return {name: value for name, value in found.items() if name.rpartition(".")[0] in early}


@dataclass(frozen=True)
class AdaBNSupervised(_Reestimated):
    """AdaBN, and then the scales and shifts (γ and β) trained on the user's labelled images (AdaBN-S).

    Attributes:
        epochs: Epochs over the user's labelled images.
        lr: Learning rate of SGD with momentum 0.9.
    """

    name: ClassVar[str] = "AdaBN-S"
    text: ClassVar[str] = "AdaBN, then γ and β trained on the user's labelled images"
    reference: ClassVar[str] = "De Lange et al., CVPR 2020, section 4.3"
    reads: ClassVar[Reads] = "labelled"
    trains: ClassVar[bool] = True

    epochs: int = 5
    lr: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("AdaBN-S: epochs", self.epochs, least=1)
        check_option("AdaBN-S: lr", self.lr, exclusive=True)

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        statistics = self._estimate(network, device.images(), device)
        load_entries(network, statistics)
        seed = derive_seed(received.seed, "AdaBN-S", received.model, received.task)
        device.train(
            network, epochs=self.epochs, lr=self.lr, seed=seed, model=received.model, callbacks=[AdaBNS("keep")]
        )
        state = network.state_dict()
        return statistics | {f"body.{name}": state[f"body.{name}"] for name in affine_names(network.body)}
