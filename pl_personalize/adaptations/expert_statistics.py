"""Batch-norm statistics that the server already has: those of its experts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from pl_personalize.adaptations.adaptation import Adaptation, Device, Entries, Reads, Received
from pl_personalize.batchnorm import BatchNormStatistics, batchnorm_layers
from pl_personalize.functional.moments import MEAN, VARIANCE
from pl_personalize.models import TaskNetwork


def statistics_names(body: nn.Module) -> list[str]:
    """Names of the running means and variances in a body; those of a shared layer once."""
    return [f"{layer}.{what}".removeprefix(".") for layer in batchnorm_layers(body) for what in (MEAN, VARIANCE)]


def affine_names(body: nn.Module) -> list[str]:
    """Names of γ and β in a body; those of a shared layer once."""
    return [
        f"{name}.{what}".removeprefix(".")
        for name, layer in batchnorm_layers(body).items()
        for what in ("weight", "bias")
        if getattr(layer, what) is not None
    ]


def average_statistics(
    body: nn.Module, experts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> BatchNormStatistics:
    """Statistics of the mixture of experts: means and second moments are averaged."""
    names = statistics_names(body)
    return BatchNormStatistics.average([{name: expert[name] for name in names} for expert in experts], weights)


@dataclass(frozen=True)
class Unchanged(Adaptation):
    """Uses the model as the server sends it; a merge has the average batch-norm statistics of its experts."""

    name: ClassVar[str] = "none"
    text: ClassVar[str] = "the model as the server sends it"
    reads: ClassVar[Reads] = "nothing"

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        return {}


class _OfExperts(Adaptation):
    """Base class for adaptations that copy entries of the body from what the server has."""

    reads: ClassVar[Reads] = "nothing"
    needs_batchnorm: ClassVar[bool] = True

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        return {f"body.{name}": value for name, value in self.of_body(network.body, received).items()}

    @abstractmethod
    def of_body(self, body: nn.Module, received: Received) -> Mapping[str, Tensor]:
        """The entries by their names in the body."""


@dataclass(frozen=True)
class Last(_OfExperts):
    """Batch-norm statistics of the last expert; a model that is no merge keeps its own."""

    name: ClassVar[str] = "last"
    text: ClassVar[str] = "batch-norm statistics of the last expert (of an unmerged model, its own)"

    @override
    def of_body(self, body: nn.Module, received: Received) -> Mapping[str, Tensor]:
        last = received.experts[-1:]
        return {name: expert[name] for expert in last for name in statistics_names(body)}


@dataclass(frozen=True)
class Average(_OfExperts):
    """Batch-norm statistics of the mixture of the experts."""

    name: ClassVar[str] = "average"
    text: ClassVar[str] = "batch-norm statistics of the mixture of the experts"
    merges_only: ClassVar[bool] = True

    @override
    def of_body(self, body: nn.Module, received: Received) -> Mapping[str, Tensor]:
        return average_statistics(body, received.experts, received.weights)


@dataclass(frozen=True)
class OfTheTask(_OfExperts):
    """Batch-norm statistics of the expert of the task."""

    name: ClassVar[str] = "expert"
    text: ClassVar[str] = "batch-norm statistics of the task's expert"
    merges_only: ClassVar[bool] = True

    @override
    def of_body(self, body: nn.Module, received: Received) -> Mapping[str, Tensor]:
        return {name: received.experts[received.task][name] for name in statistics_names(body)}


@dataclass(frozen=True)
class Published(_OfExperts):
    """The published code's AdaBN: γ and β of the model after the task, statistics of the last expert."""

    name: ClassVar[str] = "reference"
    text: ClassVar[str] = "as in the published code, γ and β of the task's model and statistics of the last expert"
    reference: ClassVar[str] = "De Lange et al., CVPR 2020, published code"
    merges_only: ClassVar[bool] = True
    needs_earlier_models: ClassVar[bool] = True

    @override
    def of_body(self, body: nn.Module, received: Received) -> Mapping[str, Tensor]:
        earlier = received.bodies[received.task]
        affine = {name: earlier[name] for name in affine_names(body)}
        return affine | {name: received.experts[-1][name] for name in statistics_names(body)}
