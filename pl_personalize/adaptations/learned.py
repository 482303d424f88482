"""The merge learned on the user's device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from pl_personalize.adaptations.adaptation import Adaptation, Case, Device, Entries, Reads, Received
from pl_personalize.checks import check_choice, check_option
from pl_personalize.learned_merging import Loss, Parameters, Per, learn_merge
from pl_personalize.models import TaskNetwork


@dataclass(frozen=True)
class Learned(Adaptation):
    """Coefficients of the merge learned on the user's images of all tasks, see :func:`~pl_personalize.learn_merge`.

    It starts from the merge that the server sent, and needs the experts on the device.

    Attributes:
        parameters: ``"coefficients"``, these and the ``"heads"``, or these and ``"all"`` weights.
        per: One coefficient for each expert and ``"tensor"`` or ``"channel"``.
        loss: ``"kl"`` or ``"mse"``.
        epochs: Number of epochs.
        batch_size: Number of images of each task in a step.
        lr: Learning rate of heads and weights.
    """

    name: ClassVar[str] = "learned"
    text: ClassVar[str] = "coefficients of the merge learned on the user's unlabelled images from the experts' logits"
    reads: ClassVar[Reads] = "unlabelled"
    merges_only: ClassVar[bool] = True
    pools_tasks: ClassVar[bool] = True

    parameters: Parameters = "coefficients"
    per: Per = "channel"
    loss: Loss = "kl"
    epochs: int = 20
    batch_size: int = 20
    lr: float = 3e-4

    def __post_init__(self) -> None:
        check_choice("learned: parameters", self.parameters, ("coefficients", "heads", "all"))
        check_choice("learned: per", self.per, ("tensor", "channel"))
        check_choice("learned: loss", self.loss, ("kl", "mse"))
        check_option("learned: epochs", self.epochs, least=1)
        check_option("learned: batch_size", self.batch_size, least=1)
        check_option("learned: lr", self.lr, exclusive=True)

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        return self.adapt_tasks([Case(network, device, received)])[0]

    @override
    def adapt_tasks(self, cases: Sequence[Case]) -> list[Entries]:
        received = cases[0].received
        if len(cases) != len(received.experts):
            raise ValueError(
                f"The images of all {len(received.experts)} tasks of the merge are needed; there are those of "
                f"{len(cases)}."
            )
        if len(cases) == 1:
            return [{}]
        experts = []
        for case, body in zip(cases, received.experts, strict=True):
            head = {f"head.{name}": value for name, value in case.network.head.state_dict().items()}
            experts.append({f"body.{name}": value for name, value in body.items()} | head)
        network = cases[0].network
        state = learn_merge(
            network,
            experts,
            [list(self._batches(case.device)) for case in cases],
            network.state_dict(),
            parameters=self.parameters,
            per=self.per,
            loss=self.loss,
            epochs=self.epochs,
            lr=self.lr,
            seed=received.seed,
        )
        body = {name: value for name, value in state.items() if name.startswith("body.")}
        return [body | _head(state, task) for task in range(len(cases))]

    def _batches(self, device: Device) -> Iterator[Tensor]:
        for batch in device.images():
            yield from device.as_input(batch).split(self.batch_size)


def _head(state: Entries, task: int) -> Entries:
    prefix = f"heads.{task}."
    return {f"head.{name.removeprefix(prefix)}": value for name, value in state.items() if name.startswith(prefix)}
