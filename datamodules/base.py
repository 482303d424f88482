"""What all task-incremental benchmarks have in common."""

from __future__ import annotations

import copy
import operator
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self, SupportsIndex

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from pl_personalize.datamodules.image_rows import ImageRows, join
from pl_personalize.datamodules.loader import TensorLoader, tensor_loader
from pl_personalize.functional.seeding import derive_seed


class LabelledImages(NamedTuple):
    """Images (n, channels, height, width), as they are stored, and their class in the task (n,), from 0."""

    images: Tensor | ImageRows
    labels: Tensor


class TaskIncrementalDataModule(LightningDataModule):
    """Data of a server and of its users, for a sequence of tasks.

    A *task* is a group of classes that arrives together. The server has labelled data of each task, split into train
    and val. Each *user* has images of each task of his own, split into ``adapt`` (used without labels, for importances
    and batch norm) and ``eval``.

    * ``train`` and ``val``: the server's data of ``task``; for ``task=None`` of all, with labels counted through.
    * ``predict``: the adapt images of ``user``, without labels; a list with one loader for each task for ``task=None``.
    * ``test``: the eval images of ``user``: a list with one loader for each task.

    A benchmark is a subclass with :meth:`load_server` and :meth:`load_user`; where images are not stored as a network
    takes them, also with :meth:`transform`.

    Args:
        tasks: Names of the tasks, in order.
        classes: Names of the classes of each task.
        users: Names of the users.
        task: The present task, an index from 0 or a name; also an attribute that may be set before ``setup``.
        user: The present user, likewise.
        batch_size: For training.
        eval_batch_size: For everything else.
        seed: What the order of training data depends on.

    Raises:
        MisconfigurationException: If a task or user is not there, a batch size or the seed is no whole number, or a
            batch size is not positive.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

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
        self.tasks, self.users = tuple(tasks), tuple(users)
        self.classes = tuple(tuple(names) for names in classes)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.eval_batch_size, self.seed = whole("eval_batch_size", eval_batch_size, 1), whole("seed", seed)
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._server: dict[int, tuple[LabelledImages, LabelledImages]] = {}
        self._user: dict[tuple[int, int], tuple[LabelledImages, LabelledImages]] = {}
        self.task = task
        self.user = user

    # What a benchmark defines

    @abstractmethod
    def load_server(self, task: int) -> tuple[LabelledImages, LabelledImages]:
        """The server's train and val split of a task."""

    @abstractmethod
    def load_user(self, user: int, task: int) -> tuple[LabelledImages, LabelledImages]:
        """A user's adapt and eval split of a task; no image in both."""

    def transform(self, images: Tensor, seed: int | None = None) -> Tensor:
        """What every loader does with the stored images of a batch: here nothing.

        Args:
            images: Of a batch, as :meth:`load_server` and :meth:`load_user` give them.
            seed: Of a random augmentation, in batches to train on; else ``None``: there must be none.
        """
        return images

    def about_user(self, user: int | str) -> str:
        """What makes a user different, in a few words for results and figures; here nothing."""
        return ""

    # Where we are

    @property
    def task(self) -> str | None:
        """Name of the present task, or ``None``."""
        return None if self._task is None else self.tasks[self._task]

    @task.setter
    def task(self, task: int | str | None) -> None:
        self._task = None if task is None else self.task_index(task)

    @property
    def user(self) -> str | None:
        """Name of the present user, or ``None``."""
        return None if self._user_index is None else self.users[self._user_index]

    @user.setter
    def user(self, user: int | str | None) -> None:
        self._user_index = None if user is None else self.user_index(user)

    def task_index(self, task: int | str) -> int:
        """The number of a task, from 0, by number or name.

        Raises:
            MisconfigurationException: If there is none.
        """
        return _index(task, self.tasks, "task")

    def user_index(self, user: int | str) -> int:
        """The number of a user, from 0, by number or name.

        Raises:
            MisconfigurationException: If there is none.
        """
        return _index(user, self.users, "user")

    def num_classes(self, task: int | str | None = None) -> int:
        """Number of classes of a task, or of all."""
        return len(self.classes[self.task_index(task)]) if task is not None else sum(map(len, self.classes))

    def view(self, *, task: int | str | None = None, user: int | str | None = None, seed: int | None = None) -> Self:
        """The same data, which is shared in memory, for another task and user, and in another order (``seed``)."""
        other = copy.copy(self)
        other.trainer = None
        other.task, other.user = task, user
        if seed is not None:
            other.seed = seed
        return other

    # Splits, each loaded once

    def server_split(self, task: int | str) -> tuple[LabelledImages, LabelledImages]:
        """The server's train and val split of a task."""
        index = self.task_index(task)
        if index not in self._server:
            self._server[index] = self.load_server(index)
        return self._server[index]

    def user_split(self, user: int | str, task: int | str) -> tuple[LabelledImages, LabelledImages]:
        """A user's adapt and eval split of a task."""
        key = self.user_index(user), self.task_index(task)
        if key not in self._user:
            self._user[key] = self.load_user(*key)
        return self._user[key]

    @override
    def setup(self, stage: str) -> None:
        """Load what the stage needs: the server's data for fit and validate, the user's for predict and test."""
        present = range(len(self.tasks)) if self._task is None else [self._task]
        if stage in ("fit", "validate"):
            for task in present:
                self.server_split(task)
        elif stage == "predict":
            for task in present:
                self.user_split(self._need_user(), task)
        else:
            for task in range(len(self.tasks)):
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

    def adapt_dataloader(
        self,
        task: int | str,
        *,
        labels: bool = False,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> TensorLoader:
        """The present user's adapt split of a task.

        Args:
            task: The task.
            labels: Whether batches have them.
            batch_size: By default ``eval_batch_size``.
            shuffle: A new order for each epoch, else the split's.
            seed: What the orders depend on.

        Raises:
            MisconfigurationException: If no user was chosen.
        """
        images, classes = self.user_split(self._need_user(), task)[0]
        tensors = [images, classes] if labels else [images]
        return self._loader(*tensors, batch_size=batch_size, shuffle=shuffle, seed=seed)

    def server_dataloader(
        self,
        task: int | str,
        split: Literal["all", "train", "val"] = "all",
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> TensorLoader:
        """The server's data of a task, with labels and never augmented.

        Args:
            task: The task.
            split: Train and val, or one of them.
            batch_size: By default ``eval_batch_size``.
            shuffle: A new order for each epoch, else the split's.
            seed: What the orders depend on.
        """
        train, val = self.server_split(task)
        chosen = {"all": [train, val], "train": [train], "val": [val]}[split]
        data = concatenate(chosen) if len(chosen) > 1 else chosen[0]
        return self._loader(*data, batch_size=batch_size, shuffle=shuffle, seed=seed)

    def _loader(self, *tensors: Tensor | ImageRows, batch_size: int | None = None, **options: Any) -> TensorLoader:
        """With the transform."""
        size = self.eval_batch_size if batch_size is None else batch_size
        return tensor_loader(*tensors, batch_size=size, transform=self.transform, **options)

    def _present_server_split(self, which: int) -> LabelledImages:
        if self._task is not None:
            return self.server_split(self._task)[which]
        parts, offset = [], 0
        for task in range(len(self.tasks)):
            images, labels = self.server_split(task)[which]
            parts.append(LabelledImages(images, labels + offset))
            offset += self.num_classes(task)
        return concatenate(parts)

    def _need_user(self) -> int:
        if self._user_index is None:
            raise MisconfigurationException(
                f"No user was chosen: set user= to one of {', '.join(map(repr, self.users))}, or to its index."
            )
        return self._user_index


def concatenate(parts: Sequence[LabelledImages]) -> LabelledImages:
    """Several sets as one, in order; tensors are copied, :class:`ImageRows` go on sharing their pools."""
    labels, images = torch.cat([part.labels for part in parts]), [part.images for part in parts]
    rows = [found for found in images if isinstance(found, ImageRows)]
    tensors = [found for found in images if isinstance(found, Tensor)]
    if rows and tensors:
        raise TypeError("Images of all sets must be tensors, or of all ImageRows.")
    return LabelledImages(join(rows) if rows else torch.cat(tensors), labels)


def _index(value: int | str, names: Sequence[str], what: str) -> int:
    if isinstance(value, str):
        if value in names:
            return names.index(value)
    elif not isinstance(value, bool) and 0 <= operator.index(value) < len(names):
        return operator.index(value)
    raise MisconfigurationException(
        f"There is no {what} {value!r}; there are {', '.join(map(repr, names))} (or 0 to {len(names) - 1})."
    )


def random_split(data: LabelledImages, share: float, *seed: int | str) -> tuple[LabelledImages, LabelledImages]:
    """Divide at random into floor(share * n) samples and the rest.

    Args:
        data: What to divide.
        share: Of the first part.
        seed: What the division depends on.
    """
    count = len(data.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(*seed)))
    return _select(data, order[: int(share * count)]), _select(data, order[int(share * count) :])


def _select(data: LabelledImages, index: Tensor) -> LabelledImages:
    images = data.images.select(index) if isinstance(data.images, ImageRows) else data.images[index]
    return LabelledImages(images, data.labels[index])


def whole(name: str, value: SupportsIndex, least: int | None = None) -> int:
    """The value of an option that must be a whole number.

    Raises:
        MisconfigurationException: If it is none, or less than ``least``. True and False are none.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise MisconfigurationException(f"{name} must be a whole number; got {value!r}.")
    if least is not None and number < least:
        raise MisconfigurationException(f"{name} must be at least {least}; got {number}.")
    return number
