"""Base class for task-incremental benchmarks."""

from __future__ import annotations

import copy
import operator
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, Self, SupportsIndex

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from pl_personalize.datamodules.labelled_images import (
    ImageRows,
    LabelledImages,
    concatenate,
    described,
    labelled_images,
    random_split,
)
from pl_personalize.datamodules.loader import TensorLoader, tensor_loader
from pl_personalize.functional.seeding import derive_seed

__all__ = ["LabelledImages", "TaskIncrementalDataModule", "random_split", "whole"]


class TaskIncrementalDataModule(LightningDataModule):
    """Base class for data of a server and its users, for a sequence of tasks.

    A *task* is a group of classes that arrives together. For each task, the server has labelled images, split into
    train and val, and each *user* has their own images, split into ``adapt`` (used without labels, for importances and
    adaptation) and ``eval``.

    * ``train`` and ``val``: the server's images of ``task``; for ``task=None`` of all tasks, with consecutive labels.
    * ``predict``: the adapt images of ``user``, without labels; for ``task=None`` a list with one loader per task.
    * ``test``: the eval images of ``user``, a list with one loader per task.

    Subclasses implement :meth:`load_server` and :meth:`load_user`, and may override :meth:`transform`.

    Args:
        tasks: Names of the tasks, in order.
        classes: Names of the classes of each task.
        users: Names of the users.
        task: Current task, by name or index; ``None`` for all tasks. The attribute may be set before ``setup``.
        user: Current user, by name or index. The attribute may be set before ``setup``.
        batch_size: Batch size for training.
        eval_batch_size: Batch size for everything else.
        seed: Seed of the order and the augmentation of training data.

    Raises:
        MisconfigurationException: If the current task or user does not exist, names are missing or repeated, a batch
            size is not a positive integer, or the seed is not an integer.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        classes: Sequence[Sequence[str]],
        users: Sequence[str],
        *,
        task: int | str | None = None,
        user: int | str | None = None,
        batch_size: int = 20,
        eval_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tasks, self.users = _distinct("tasks", tuple(tasks)), _distinct("users", users)
        self.classes = tuple(_distinct(f"classes of task {k}", names) for k, names in enumerate(classes))
        if len(self.classes) != len(self.tasks):
            raise MisconfigurationException(
                f"classes must have one list for each of the {len(self.tasks)} tasks; got {len(self.classes)}."
            )
        self.batch_size = whole("batch_size", batch_size, 1)
        self.eval_batch_size, self.seed = whole("eval_batch_size", eval_batch_size, 1), whole("seed", seed)
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._server: dict[int, tuple[LabelledImages, LabelledImages]] = {}
        self._user: dict[tuple[int, int], tuple[LabelledImages, LabelledImages]] = {}
        self.task = task
        self.user = user

    # Hooks for subclasses

    @abstractmethod
    def load_server(self, task: int) -> tuple[LabelledImages, LabelledImages]:
        """Load the server's train and val split of a task.

        Labels count from 0 within the task. The splits are checked on first use: tuples, arrays and other label types
        are converted if nothing is lost, and refused otherwise.
        """

    @abstractmethod
    def load_user(self, user: int, task: int) -> tuple[LabelledImages, LabelledImages]:
        """Load a user's adapt and eval split of a task, which must be disjoint; see :meth:`load_server`."""

    def transform(self, images: Tensor, seed: int | None = None) -> Tensor:
        """Convert a batch of stored images to network inputs in every loader; the identity by default.

        Args:
            images: Stored images, as :meth:`load_server` and :meth:`load_user` return them.
            seed: Seed of a random augmentation for training batches; ``None`` for no augmentation.
        """
        return images

    def about_user(self, user: int | str) -> str:
        """Describe in a few words what distinguishes a user, for results and figures; empty by default."""
        return ""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of a network input, (channels, height, width); by default that of the first server image."""
        return tuple(self.transform(self.server_split(0)[0].images[:1]).shape[1:])

    def decisive_options(self) -> dict[str, Any]:
        """Options that results depend on, as JSON values, apart from ``task``, ``user`` and ``seed``.

        Subclasses add their own, with resolved paths, and omit those that change no image, such as ``download``.
        """
        return {"batch_size": self.batch_size, "eval_batch_size": self.eval_batch_size}

    # Current task and user

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer that uses this datamodule, if any."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        if any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in type(trainer).__mro__):
            raise MisconfigurationException(
                f"{type(self).__name__} needs a Trainer of `lightning.pytorch`; got one of `pytorch_lightning`. Change "
                "`import pytorch_lightning as pl` to `import lightning.pytorch as pl`."
            )
        self._trainer = trainer

    @property
    def task(self) -> str | None:
        """Name of the current task, or ``None``."""
        return None if self._task is None else self.tasks[self._task]

    @task.setter
    def task(self, task: int | str | None) -> None:
        self._task = None if task is None else self.task_index(task)

    @property
    def user(self) -> str | None:
        """Name of the current user, or ``None``."""
        return None if self._user_index is None else self.users[self._user_index]

    @user.setter
    def user(self, user: int | str | None) -> None:
        self._user_index = None if user is None else self.user_index(user)

    def task_index(self, task: int | str) -> int:
        """Index of a task given by index or name; raises MisconfigurationException if there is none."""
        return _index_of(task, self.tasks, "task")

    def user_index(self, user: int | str) -> int:
        """Index of a user given by index or name; raises MisconfigurationException if there is none."""
        return _index_of(user, self.users, "user")

    def num_classes(self, task: int | str | None = None) -> int:
        """Number of classes of a task, or of all tasks."""
        return len(self.classes[self.task_index(task)]) if task is not None else sum(map(len, self.classes))

    def view(self, *, task: int | str | None = None, user: int | str | None = None, seed: int | None = None) -> Self:
        """Copy for another task, user and order of the data (``seed``) that shares the images in memory."""
        other = copy.copy(self)
        other.trainer = None
        other.task, other.user = task, user
        if seed is not None:
            other.seed = seed
        return other

    # Splits, each loaded on first use

    def server_split(self, task: int | str) -> tuple[LabelledImages, LabelledImages]:
        """The server's train and val split of a task.

        Raises:
            MisconfigurationException: If :meth:`load_server` returned something other than two splits, with as many
                labels as images, labels that are classes of the task, and finite images.
        """
        index = self.task_index(task)
        if index not in self._server:
            self._server[index] = self._checked(self.load_server(index), "the server", index, ("train", "val"))
        return self._server[index]

    def refuse_several_shapes(self) -> None:
        """Raise MisconfigurationException if the server's images of all tasks do not have one shape."""
        shapes: dict[tuple[int, ...], str] = {}
        for task in self.tasks:
            for split in self.server_split(task):
                shapes.setdefault(tuple(split.images.shape[1:]), task)
        if len(shapes) > 1:
            listed = ", ".join(f"{shape} in {task!r}" for shape, task in shapes.items())
            raise MisconfigurationException(f"Training on all tasks needs images of one shape; got {listed}.")

    def user_split(self, user: int | str, task: int | str) -> tuple[LabelledImages, LabelledImages]:
        """A user's adapt and eval split of a task; raises as :meth:`server_split` does."""
        key = self.user_index(user), self.task_index(task)
        if key not in self._user:
            owner = f"user {self.users[key[0]]!r}"
            self._user[key] = self._checked(self.load_user(*key), owner, key[1], ("adapt", "eval"))
        return self._user[key]

    def _checked(
        self, found: Any, owner: str, task: int, names: tuple[str, str]
    ) -> tuple[LabelledImages, LabelledImages]:
        """Loaded splits, converted to what loaders, losses and metrics need."""
        where = f"{type(self).__name__}: {owner}, task {self.tasks[task]!r}"
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise MisconfigurationException(
                f"{where}: expected two splits, {' and '.join(names)}, each LabelledImages(images, labels); got "
                f"{described(found)}."
            )
        splits = []
        for name, split in zip(names, found, strict=True):
            try:
                offset = sum(map(len, self.classes[:task]))
                splits.append(labelled_images(split, len(self.classes[task]), offset=offset))
            except ValueError as error:
                raise MisconfigurationException(f"{where}, {name}: {error}") from error
        return splits[0], splits[1]

    @override
    def setup(self, stage: str) -> None:
        """Load the server's data for fit and validate, the user's for predict and test."""
        present = range(len(self.tasks)) if self._task is None else [self._task]
        if stage in ("fit", "validate"):
            for task in present:
                self.server_split(task)
        else:
            for task in present if stage == "predict" else range(len(self.tasks)):
                self.user_split(self._need_user(), task)

    # Loaders

    @override
    def train_dataloader(self) -> TensorLoader:
        """The server's train split, shuffled and augmented."""
        split = self._present_server_split(0)
        seed = derive_seed(self.seed, -1 if self._task is None else self._task)
        return self._loader(*split, batch_size=self.batch_size, shuffle=True, seed=seed, repeat=True, augment=True)

    @override
    def val_dataloader(self) -> TensorLoader:
        """The server's val split, in order."""
        return self._loader(*self._present_server_split(1), repeat=True)

    @override
    def test_dataloader(self) -> list[TensorLoader]:
        """The user's eval split of each task."""
        user = self._need_user()
        return [self._loader(*self.user_split(user, task)[1]) for task in range(len(self.tasks))]

    @override
    def predict_dataloader(self) -> TensorLoader | list[TensorLoader]:
        """The user's adapt images, without labels."""
        if self._task is not None:
            return self.adapt_dataloader(self._task)
        return [self.adapt_dataloader(task) for task in range(len(self.tasks))]

    def adapt_dataloader(self, task: int | str, *, labels: bool = False, **options: Any) -> TensorLoader:
        """The current user's adapt split of a task.

        Args:
            task: The task.
            labels: Whether batches contain labels.
            **options: ``batch_size`` (by default ``eval_batch_size``), ``shuffle`` and ``seed`` of
                :func:`tensor_loader`.

        Raises:
            MisconfigurationException: If no user is set.
        """
        images, classes = self.user_split(self._need_user(), task)[0]
        return self._loader(*([images, classes] if labels else [images]), **options)

    def server_dataloader(
        self, task: int | str, split: Literal["all", "train", "val"] = "all", **options: Any
    ) -> TensorLoader:
        """The server's images of a task, with labels and without augmentation.

        Args:
            task: The task.
            split: The split; ``"all"`` for train and val.
            **options: As for :meth:`adapt_dataloader`.
        """
        train, val = self.server_split(task)
        data = concatenate([train, val]) if split == "all" else {"train": train, "val": val}[split]
        return self._loader(*data, **options)

    def _loader(self, *tensors: Tensor | ImageRows, batch_size: int | None = None, **options: Any) -> TensorLoader:
        size = self.eval_batch_size if batch_size is None else batch_size
        return tensor_loader(*tensors, batch_size=size, transform=self.transform, **options)

    def _present_server_split(self, which: int) -> LabelledImages:
        if self._task is not None:
            return self.server_split(self._task)[which]
        self.refuse_several_shapes()
        parts = [self.server_split(task)[which] for task in self.tasks]
        offsets = [0, *accumulate(map(len, self.classes))]
        return concatenate([LabelledImages(p.images, p.labels + k) for p, k in zip(parts, offsets, strict=False)])

    def _need_user(self) -> int:
        if self._user_index is None:
            raise MisconfigurationException(
                f"No user is set: set user= to one of {', '.join(map(repr, self.users))}, or to its index."
            )
        return self._user_index


def whole(name: str, value: SupportsIndex, least: int | None = None) -> int:
    """Return an option as an int."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise MisconfigurationException(f"{name} must be an integer; got {value!r}.")
    if least is not None and number < least:
        raise MisconfigurationException(f"{name} must be at least {least}; got {number}.")
    return number


def _distinct(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names as a tuple, if there are any and they differ."""
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise MisconfigurationException(f"{what} must be a list of one or several different names; got {names!r}.")
    return tuple(names)


def _index_of(value: int | str, names: Sequence[str], what: str) -> int:
    """Index of an item given by its index or name."""
    if isinstance(value, str):
        if value in names:
            return names.index(value)
    elif not isinstance(value, bool) and 0 <= operator.index(value) < len(names):
        return operator.index(value)
    raise MisconfigurationException(
        f"There is no {what} {value!r}; choose one of {', '.join(map(repr, names))} (or 0 to {len(names) - 1})."
    )
