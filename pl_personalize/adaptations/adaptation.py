"""Base class for adaptations, and what each is given."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pl_personalize.batchnorm import batchnorm_layers
from pl_personalize.models import TaskNetwork

Entries = dict[str, Tensor]
"""Entries of a network that replace its own, by their names in it: ``body.…`` and ``head.…``.

Those named ``sent.…`` are what a step on the server sends along for later steps, see :attr:`Received.sent`.
"""
SENT = "sent."
Reads = Literal["nothing", "server", "unlabelled", "labelled"]


class Device(Protocol):
    """A user's device: the images of one task, and the means to compute on them."""

    @property
    def user(self) -> str | None:
        """Name of the user."""

    def images(self) -> Iterable[Any]:
        """Batches of the user's unlabelled ``adapt`` images."""

    def labelled_images(self, seed: int) -> Iterable[Any]:
        """Batches of the same images with labels, in an order that follows from the seed."""

    def server_images(self, split: Literal["train", "val"] = "val") -> Iterable[Any]:
        """Batches of the server's images with labels, which only the server can read."""

    def as_input(self, batch: Any) -> Any:
        """The network's input in a batch, in the precision of the run."""

    def train(
        self,
        network: TaskNetwork,
        *,
        epochs: int,
        lr: float,
        seed: int,
        model: int,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Train a network in place on :meth:`labelled_images`, by SGD with momentum 0.9 on the cross-entropy.

        Args:
            network: The network.
            epochs: Number of epochs.
            lr: Learning rate.
            seed: Seed of the order of the images, and of random layers.
            model: Number of the model, from 0, which metrics are logged for.
            callbacks: Callbacks of the Trainer.

        Raises:
            MisconfigurationException: If there is no means to train here, or the training diverges.
        """


@dataclass(frozen=True)
class Received:
    """Data that the server sent along with the model after task t, for its use on task i.

    Attributes:
        model: t, from 0.
        task: i, from 0; at most t.
        seed: Seed of the run.
        experts: The bodies of experts 1..t that a merge was made of; empty for a model that is no merge.
        weights: Their weights in the merge; ``None`` if they are equal.
        bodies: The body of each model, also of earlier ones; read when needed.
        sent: Tensors that earlier steps of a sequence sent along, by name.
    """

    model: int
    task: int
    seed: int = 0
    experts: Sequence[Mapping[str, Tensor]] = ()
    weights: Sequence[float] | None = None
    bodies: Sequence[Mapping[str, Tensor]] = ()
    sent: Mapping[str, Tensor] = field(default_factory=dict)


class Case(NamedTuple):
    """A model, a device and what the server sent, for one task."""

    network: TaskNetwork
    device: Device
    received: Received


@dataclass(frozen=True)
class Adaptation(metaclass=ABCMeta):
    """Base class for adaptations: what a device does with a model before it uses the model on a task.

    A subclass is a frozen dataclass whose fields are its options. It implements :meth:`adapt` and sets the class
    attributes; a user of the library registers it with ``ADAPTATIONS.register``. Adaptations compose in sequence, as
    in ``"recalibrate+AdaBN"``.

    Attributes:
        name: Name in options, stages, tables and figures.
        text: One line for the legend of a table: what it does.
        reference: Paper or section that describes it.
        reads: The data it uses, which has no default: ``"nothing"``, the ``"server"``'s validation images, or the
            user's ``"unlabelled"`` or ``"labelled"`` images. Other data are refused. Unless it reads a user's images,
            all users share its result.
        merges_only: Whether it needs the experts of a merge.
        needs_batchnorm: Whether it does nothing to a network without batch norm.
        needs_earlier_models: Whether it reads the models after earlier tasks.
        trains: Whether it trains; then only the models and tasks that average accuracy and forgetting need are adapted.
        follows: Name of the adaptation that must come before it in a sequence, if any, with nothing in between that
            changes more than the statistics of batch norm.
        private: Whether its result tells what the user's images are of, so that no step on the server may follow.
        pools_tasks: Whether it reads the data of all tasks of a model before it decides; then it implements
            :meth:`adapt_tasks`.
        bound: Whether it is a bound to compare with, which uses what no device has.
    """

    name: ClassVar[str]
    text: ClassVar[str]
    reference: ClassVar[str] = ""
    reads: ClassVar[Reads]
    merges_only: ClassVar[bool] = False
    needs_batchnorm: ClassVar[bool] = False
    needs_earlier_models: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    follows: ClassVar[str | None] = None
    private: ClassVar[bool] = False
    pools_tasks: ClassVar[bool] = False
    bound: ClassVar[bool] = False

    @abstractmethod
    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        """The entries to replace in the network for one task.

        Args:
            network: The model, on the device that computes. It may be changed; the caller discards it.
            device: The user's images of the task, and the means to compute on them.
            received: What the server sent along.

        Raises:
            ValueError: If the data do not allow it; the message says why.
        """

    def adapt_tasks(self, cases: Sequence[Case]) -> list[Entries]:
        """The entries to replace for each task of one model; raises as :meth:`adapt` does."""
        return [self.adapt(*case) for case in cases]

    def why_not(self, network: TaskNetwork) -> str | None:
        """Why it does not apply to a network; ``None`` if it does."""
        if self.needs_batchnorm and not batchnorm_layers(network.body):
            return "needs a network with batch norm"
        return None


@dataclass(frozen=True)
class AdaptationSequence:
    """One adaptation, or several that are applied one after the other.

    Attributes:
        steps: The adaptations.
    """

    steps: tuple[Adaptation, ...]

    @property
    def name(self) -> str:
        """The names of the steps, joined by ``+``."""
        return "+".join(step.name for step in self.steps)

    @property
    def text(self) -> str:
        """Description of the steps."""
        return ", then ".join(step.text for step in self.steps)

    @property
    def merges_only(self) -> bool:
        """Whether a step needs the experts of a merge."""
        return any(step.merges_only for step in self.steps)

    @property
    def needs_earlier_models(self) -> bool:
        """Whether a step reads the models after earlier tasks."""
        return any(step.needs_earlier_models for step in self.steps)

    @property
    def trains(self) -> bool:
        """Whether a step trains."""
        return any(step.trains for step in self.steps)

    @property
    def personal(self) -> bool:
        """Whether its result differs between users."""
        return any(step.reads in ("unlabelled", "labelled") for step in self.steps)

    def why_not(self, network: TaskNetwork) -> str | None:
        """Why it does not apply to a network; ``None`` if it does."""
        for place, step in enumerate(self.steps):
            before = self.steps[:place]
            private = next((one.name for one in before if one.private), None)
            if step.reads == "server" and private is not None:
                return f"{step.name!r} reads the server's images, and {private!r} before it stays on the user's device"
            if step.follows is None:
                continue
            names = [one.name for one in before if one.trains or not one.needs_batchnorm]
            if step.follows not in names:
                return f"{step.name!r} must come after {step.follows!r}, as in '{step.follows}+{step.name}'"
            if names[-1] != step.follows:
                return f"{step.name!r} must come directly after {step.follows!r}; {names[-1]!r} changes the network"
        return next((f"{s.name!r} {why}" for s in self.steps if (why := s.why_not(network)) is not None), None)

    @property
    def pools_tasks(self) -> bool:
        """Whether a step reads the data of all tasks of a model before it decides."""
        return any(step.pools_tasks for step in self.steps)

    def adapt(self, network: TaskNetwork, device: Device, received: Received) -> Entries:
        """The entries that the steps replace together; see :meth:`adapt_tasks`."""
        return self.adapt_tasks([Case(network, device, received)])[0]

    def adapt_tasks(self, cases: Sequence[Case]) -> list[Entries]:
        """The entries that the steps replace together, for each task of a model; the networks are left with them.

        Raises:
            MisconfigurationException: If a step cannot be done with these data.
        """
        found: list[Entries] = [{} for _ in cases]
        for step in self.steps:
            try:
                with torch.inference_mode(False):
                    before = [_tensors(case.network) for case in cases]
                    entries = step.adapt_tasks([_case(step, *both) for both in zip(cases, found, strict=True)])
                    for case, old, own, new in zip(cases, before, found, entries, strict=True):
                        own |= {name: value.detach().clone() for name, value in new.items()}
                        load_entries(case.network, old | own)  # what a step changed besides does not count
            except ValueError as error:
                tasks = " and ".join(str(case.received.task + 1) for case in cases)
                raise MisconfigurationException(
                    f"The adaptation {step.name!r} failed on task {tasks}: {error}"
                ) from error
        return found


def _tensors(network: nn.Module) -> Entries:
    return {name: value.clone() for name, value in network.state_dict().items() if isinstance(value, Tensor)}


def _case(step: Adaptation, case: Case, found: Entries) -> Case:
    """The case as a step sees it: with the data that it declares, and what earlier steps sent."""
    sent = {name.removeprefix(SENT): value for name, value in found.items() if name.startswith(SENT)}
    received = replace(case.received, sent={**case.received.sent, **sent})
    return Case(case.network, cast("Device", _Guarded(case.device, step)), received)


_READERS: dict[str, tuple[Reads, ...]] = {
    "user": ("unlabelled", "labelled"),
    "images": ("unlabelled", "labelled"),
    "labelled_images": ("labelled",),
    "train": ("labelled",),
    "server_images": ("server",),
}
"""The values of ``reads`` that allow each part of a device."""


class _Guarded:
    """A device that gives an adaptation only the data that it declares."""

    def __init__(self, device: Device, step: Adaptation) -> None:
        self._device, self._step = device, step

    def __getattr__(self, name: str) -> Any:
        allowed = _READERS.get(name)
        if allowed is not None and self._step.reads not in allowed:
            raise MisconfigurationException(
                f"The adaptation {self._step.name!r} has reads={self._step.reads!r}, but uses {name} of its device: "
                f"set reads to {' or '.join(map(repr, allowed))}."
            )
        return getattr(self._device, name)


def load_entries(network: nn.Module, entries: Mapping[str, Tensor]) -> None:
    """Copy entries into the parameters and buffers of a network, without those that were only sent along.

    Raises:
        ValueError: If the network has no entry of that name and shape.
    """
    own = network.state_dict()
    entries = {name: value for name, value in entries.items() if not name.startswith(SENT)}
    for name, value in entries.items():
        if name not in own or own[name].shape != value.shape:
            found = f"is {tuple(own[name].shape)} there" if name in own else "is not there"
            raise ValueError(f"The entry {name!r} of shape {tuple(value.shape)} {found}.")
    with torch.no_grad():
        for name, value in entries.items():
            own[name].copy_(value)


def option_names(adaptation: type[Adaptation]) -> list[str]:
    """Names of the options of an adaptation."""
    return [field.name for field in fields(adaptation)]
