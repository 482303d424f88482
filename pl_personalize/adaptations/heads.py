"""Heads refitted on the server, and adapted on the device without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from pl_personalize.adaptations.adaptation import SENT, Adaptation, Case, Device, Entries, Reads, Received, load_entries
from pl_personalize.adaptations.reestimated_statistics import AdaBN
from pl_personalize.batchnorm import BatchNormStatistics, batchnorm_layers
from pl_personalize.checks import check_option
from pl_personalize.functional.batches import Forward, batch_labels
from pl_personalize.functional.discriminant import Linear
from pl_personalize.functional.feature_shift import standardized
from pl_personalize.heads import HeadAdaptation, HeadReference, adapt_head, refit_head
from pl_personalize.heads.adapt import Estimator, Shift
from pl_personalize.heads.features import HeadOf
from pl_personalize.models import TaskNetwork

FOUND = "shift"
"""Name of what :class:`Auto` sends along: the number of the shift that it found."""
_REFERENCE = "reference."


def _forward(device: Device) -> Forward:
    def forward(model: nn.Module, batch: Any) -> Any:
        return model(device.as_input(batch))

    return forward


def _head(network: TaskNetwork) -> Entries:
    return {f"head.{name}": value for name, value in network.head.state_dict().items()}


def _copied(entries: Entries) -> Entries:
    return {name: value.clone() for name, value in entries.items()}


def _statistics(network: TaskNetwork) -> Entries:
    return {f"body.{name}": value for name, value in BatchNormStatistics.of(network.body).items()}


def _reference(received: Received) -> HeadReference:
    tensors = {name.removeprefix(_REFERENCE): t for name, t in received.sent.items() if name.startswith(_REFERENCE)}
    return HeadReference.from_tensors(tensors)


@dataclass(frozen=True)
class Refit(Adaptation):
    """The head refitted to its features on the server's images, see :func:`~pl_personalize.refit_head`.

    Attributes:
        cameras: Number of random cameras that devices can be told apart by; 0 for none.
    """

    name: ClassVar[str] = "refit"
    text: ClassVar[str] = "the head refitted by linear discriminant analysis on the server's images of the task"
    reads: ClassVar[Reads] = "server"

    cameras: int = 0

    def __post_init__(self) -> None:
        check_option("refit: cameras", self.cameras, least=0)

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        images = (device.server_images(split) for split in ("train", "val"))
        reference = refit_head(network, *images, head="head", forward=_forward(device), cameras=self.cameras)
        sent = {f"{SENT}{_REFERENCE}{name}": value for name, value in reference.tensors.items()}
        return _head(network) | sent


class _AdaptedHead(Adaptation):
    """Base class for adaptations of a refitted head to the user's unlabelled images."""

    shift: ClassVar[Shift | None]
    estimator: ClassVar[Estimator] = "em"
    reads: ClassVar[Reads] = "unlabelled"
    follows: ClassVar[str | None] = Refit.name
    private: ClassVar[bool] = True
    pools_tasks: ClassVar[bool] = True

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        return self.adapt_tasks([Case(network, device, received)])[0]

    @override
    def adapt_tasks(self, cases: Sequence[Case]) -> list[Entries]:
        self._adapt(cases, self.shift)
        return [_head(case.network) for case in cases]

    def _adapt(self, cases: Sequence[Case], shift: Shift | None) -> HeadAdaptation:
        """Adapt the heads in place; returns what was found, which is the same for all tasks, for the first of them."""
        return adapt_head(
            [case.network for case in cases],
            [case.device.images() for case in cases],
            [_reference(case.received) for case in cases],
            head="head",
            forward=_forward(cases[0].device),
            shift=shift,
            estimator=self.estimator,
        )[0]


@dataclass(frozen=True)
class Priors(_AdaptedHead):
    """Class priors of the user, estimated without labels, in the bias of the refitted head (label shift)."""

    name: ClassVar[str] = "priors"
    text: ClassVar[str] = "class priors estimated on the user's unlabelled images"
    reference: ClassVar[str] = "Saerens et al., Neural Computation 2002"
    shift: ClassVar[Shift | None] = "label"


@dataclass(frozen=True)
class BlackBoxPriors(Priors):
    """The same by black-box shift estimation, regularized."""

    name: ClassVar[str] = "bbse"
    text: ClassVar[str] = "class priors by regularized black-box shift estimation on the user's unlabelled images"
    reference: ClassVar[str] = "Lipton et al., ICML 2018; Azizzadenesheli et al., ICLR 2019"
    estimator: ClassVar[Estimator] = "bbse"


@dataclass(frozen=True)
class Standardize(_AdaptedHead):
    """Features of the user standardized to the server's moments, in the refitted head (covariate shift)."""

    name: ClassVar[str] = "standardize"
    text: ClassVar[str] = "features standardized to the server's moments on the user's unlabelled images"
    shift: ClassVar[Shift | None] = "covariate"


class _Tested(_AdaptedHead):
    """Base class for adaptations to the shift that is found by tests, of batch norm too."""

    shift: ClassVar[Shift | None] = None

    def _found(self, cases: Sequence[Case]) -> tuple[Shift, bool]:
        """Adapt the heads, or else batch norm; returns the shift that was found, and whether it is batch norm.

        Batch norm follows class frequencies, so it is adapted to covariate shift alone.
        """
        before = [_copied(_head(case.network)) for case in cases]
        shift = self._adapt(cases, None).shift
        if shift != "covariate" or not batchnorm_layers(cases[0].network.body):
            return shift, False
        for case, head in zip(cases, before, strict=True):
            load_entries(case.network, head)
            load_entries(case.network, AdaBN().adapt(*case))
        return shift, True


@dataclass(frozen=True)
class TestedAdaBN(_Tested):
    """AdaBN for users with another camera than the server's, as a test tells."""

    name: ClassVar[str] = "tested-AdaBN"
    text: ClassVar[str] = "AdaBN, if the user's camera differs from the server's"
    needs_batchnorm: ClassVar[bool] = True

    @override
    def adapt_tasks(self, cases: Sequence[Case]) -> list[Entries]:
        _, adapted = self._found(cases)
        return [_statistics(case.network) if adapted else {} for case in cases]


@dataclass(frozen=True)
class Auto(_Tested):
    """The shift of the user found by tests and corrected: the head, and batch norm as :class:`TestedAdaBN` does."""

    name: ClassVar[str] = "auto"
    text: ClassVar[str] = "the head, and batch norm where there is some, adapted to the shift that is found"

    @override
    def adapt_tasks(self, cases: Sequence[Case]) -> list[Entries]:
        shift, adapted = self._found(cases)
        if adapted:  # the features have changed
            self._adapt(cases, "covariate")
        note = {f"{SENT}{FOUND}": torch.tensor(get_args(Shift).index(shift))}
        return [_head(case.network) | (_statistics(case.network) if adapted else {}) | note for case in cases]


class _Oracle(Adaptation):
    """Base class for bounds, which correct a refitted head by what the user's labels tell."""

    reads: ClassVar[Reads] = "labelled"
    follows: ClassVar[str | None] = Refit.name
    private: ClassVar[bool] = True
    bound: ClassVar[bool] = True
    corrects: ClassVar[tuple[str, ...]]

    @override
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        layer, ref = HeadOf(network, "head", _forward(device)), _reference(received)
        parts = [(f, batch_labels(batch).cpu()) for batch, f in layer.read(device.labelled_images(0))]
        features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        head, source, means = layer.linear, ref.class_priors.double(), ref.class_means.double()
        counts = torch.bincount(labels, minlength=len(source)).double() + 0.5
        priors: Tensor = counts / counts.sum()
        if "moments" in self.corrects:
            mean = priors @ means
            within = (ref.std.double().square() - source @ (means - source @ means).square()).clamp_min(1e-12)
            std = (within + priors @ (means - mean).square()).sqrt()
            head = standardized(head, features.mean(0), features.std(0, correction=0), mean, std)
        if "priors" in self.corrects:
            head = Linear(head.weight, head.bias + (priors / source).log())
        layer.write(head)
        return _head(network)


@dataclass(frozen=True)
class TruePriors(_Oracle):
    """The true class priors of the user's images: the bound of :class:`Priors`."""

    name: ClassVar[str] = "true-priors"
    text: ClassVar[str] = "the true class priors of the user's images (a bound)"
    corrects: ClassVar[tuple[str, ...]] = ("priors",)


@dataclass(frozen=True)
class TrueMoments(_Oracle):
    """Features standardized to what the server's would be under the user's true class priors: a bound."""

    name: ClassVar[str] = "true-moments"
    text: ClassVar[str] = "features standardized with the true class priors of the user's images (a bound)"
    corrects: ClassVar[tuple[str, ...]] = ("moments",)


@dataclass(frozen=True)
class TruePriorsAndMoments(_Oracle):
    """Both :class:`TruePriors` and :class:`TrueMoments`."""

    name: ClassVar[str] = "true-both"
    text: ClassVar[str] = "true class priors, and features standardized with them (a bound)"
    corrects: ClassVar[tuple[str, ...]] = ("moments", "priors")
