"""Fine-tuning on labelled images: the bound that adaptation without labels is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from pl_personalize.adaptations.adaptation import Adaptation, Device, Entries, Reads, Received
from pl_personalize.checks import check_option
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.models import TaskNetwork


@dataclass(frozen=True)
class FineTune(Adaptation):
    """All parameters trained further on the user's labelled images; the last model is kept.

    Attributes:
        epochs: Epochs over the user's labelled images.
        lr: Learning rate of SGD with momentum 0.9.
    """

    name: ClassVar[str] = "FT"
    text: ClassVar[str] = "all parameters trained on the user's labelled images"
    reference: ClassVar[str] = "De Lange et al., CVPR 2020 (Task Experts)"
    reads: ClassVar[Reads] = "labelled"
    trains: ClassVar[bool] = True

    epochs: int = 10
    lr: float = 0.0005

    def __post_init__(self) -> None:
        check_option("FT: epochs", self.epochs, least=1)
        check_option("FT: lr", self.lr, exclusive=True)

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        seed = derive_seed(received.seed, "FT", str(device.user), received.task)
        device.train(network, epochs=self.epochs, lr=self.lr, seed=seed, model=received.model)
        return dict(network.state_dict())
