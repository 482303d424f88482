"""What the benchmarks on scenes have in common."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from pl_personalize.datamodules.base import TaskIncrementalDataModule, whole
from pl_personalize.datamodules.image_files import crop_centre, read_rgb, resize_shorter
from pl_personalize.datamodules.image_rows import ImageRows
from pl_personalize.datamodules.image_store import ImageStore, Read
from pl_personalize.datamodules.labelled_images import LabelledImages
from pl_personalize.datamodules.scene_allocation import ServerFiles, UserFiles, server_files
from pl_personalize.datamodules.scene_download import MIT_INDOOR, fetch
from pl_personalize.datamodules.scene_folder import (
    Names,
    Pools,
    check_classes,
    classes_of_tasks,
    read_pools,
    read_supercategories,
)
from pl_personalize.datamodules.scene_transforms import random_crops, standardise

TASKS = ("home", "leisure", "public", "store")
_FLOAT32 = torch.finfo(torch.float32)


class UserPool(NamedTuple):
    """Images that are decoded together: a name, how a file is decoded, and what that depends on."""

    name: str
    read: Read
    depends: tuple[str | int, ...] = ()


class _Plan(NamedTuple):
    """Who gets which images: the server of each task, each user of each task."""

    server: list[ServerFiles]
    users: list[list[UserFiles]]


class SceneDataModule(TaskIncrementalDataModule):
    """Scenes in the layout of MIT Indoor Scenes, whose supercategories are the tasks.

    The server has the images of ``TrainImages.txt``, 80 % of them for training. What users get of those of
    ``TestImages.txt`` and of all others, a subclass says (:meth:`check`, :meth:`allocate`, :meth:`pool_of`).

    Images are decoded once, brought to ``image_size`` (shorter side, bilinear with antialiasing), cropped to the middle
    square and kept as uint8; splits share them. Loaders standardise batches.

    Args:
        data_dir: Folder with ``Images/<class>/<file>``, ``TrainImages.txt`` and ``TestImages.txt``.
        num_users: How many persons there are.
        tasks: Supercategories, in order, one or several.
        supercategories: CSV file with the columns scene_class and supercategory; by default that of MIT Indoor Scenes.
        iterations: Seeds of allocations of images to the persons, one or several. Each person is one user of this
            datamodule for each: ``user1``, or where there are several, ``user1-draw1``, ``user1-draw2``, …
        image_size: Side of the images.
        augment: Whether training sees random parts of the stored images, every second one mirrored.
        mean: Of each channel, in [0, 1], which is subtracted; by default ImageNet's.
        deviation: Of each channel, which the rest is divided by; by default ImageNet's.
        cache_dir: Folder for decoded images, which are then read from there as they are used; by default they are in
            memory.
        download: Fetch MIT Indoor Scenes if it is missing.
        archive_md5: Checksum that its archive must have; there is no official one.
        task: See :class:`TaskIncrementalDataModule`.
        user: See there.
        batch_size: See there.
        eval_batch_size: See there.
        seed: What the order and the augmentation of training data depend on.
        split_seed: What the choice and the division of the images depend on.

    Raises:
        MisconfigurationException: If an option is out of range, or the table of supercategories unfit.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        num_users: int,
        *,
        tasks: Sequence[str] | str,
        supercategories: str | os.PathLike[str] | None,
        iterations: Sequence[int] | int,
        image_size: int,
        augment: bool,
        mean: Sequence[float],
        deviation: Sequence[float],
        cache_dir: str | os.PathLike[str] | None,
        download: bool,
        archive_md5: str | None,
        task: int | str | None,
        user: int | str | None,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        split_seed: int,
    ) -> None:
        num_users, image_size = whole("num_users", num_users, 1), whole("image_size", image_size, 1)
        split_seed = whole("split_seed", split_seed)
        if not _are_three(mean, 0, 1) or not _are_three(deviation, _FLOAT32.tiny, _FLOAT32.max):
            raise MisconfigurationException(
                "mean and deviation must have one number for each of the three channels, of images in [0, 1]: means in "
                f"[0, 1], positive deviations; got {mean} and {deviation}."
            )
        tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        draws = iterations if isinstance(iterations, Iterable) else [iterations]
        iterations = [whole("iterations", iteration) for iteration in draws]
        if not iterations or len(set(iterations)) != len(iterations):
            raise MisconfigurationException(f"iterations must be at least one, each once; got {iterations}.")
        self.supercategories = read_supercategories(
            None if supercategories is None else Path(supercategories).expanduser()
        )
        self._own_table = supercategories is not None
        several = len(iterations) > 1
        self._draws = [(person, iteration) for person in range(num_users) for iteration in iterations]
        super().__init__(
            tasks=tasks,
            classes=classes_of_tasks(self.supercategories, tasks),
            users=[f"user{person + 1}" + (f"-draw{draw}" if several else "") for person, draw in self._draws],
            task=task,
            user=user,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
        )
        self.data_dir, self.num_users, self.iterations = Path(data_dir).expanduser(), num_users, tuple(iterations)
        self.mean, self.deviation = tuple(mean), tuple(deviation)
        self.image_size, self.augment, self.split_seed = image_size, augment, split_seed
        self.download, self.archive_md5 = download, archive_md5
        cache = None if cache_dir is None else Path(cache_dir).expanduser()
        self._store = ImageStore(self.data_dir / "Images", image_size, cache)
        self._shared: dict[str, Any] = {}  # what all views have in common

    # What a benchmark defines

    @abstractmethod
    def check(self, pools: Pools) -> None:
        """See that there are images for all users.

        Raises:
            MisconfigurationException: If there are not; with the arithmetic, and the way out.
        """

    @abstractmethod
    def allocate(self, pools: Pools, task: int, iteration: int) -> list[UserFiles]:
        """The images of each person in a task."""

    def classes_by_task(self) -> dict[str, Names]:
        """The classes of each task."""
        return dict(zip(self.tasks, self.classes, strict=True))

    def person_of(self, user: int | str) -> int:
        """The number of the person, from 0, that a user is in one of the iterations."""
        return self._draws[self.user_index(user)][0]

    def pool_of(self, person: int) -> UserPool:
        """The pool that a person's images belong to; persons who see the same have it in common."""
        return UserPool("users", self.read_scene)

    # Which images

    @override
    def prepare_data(self) -> None:
        """Fetch the images if they are missing and it was asked for; see that there are enough for everybody.

        Of a table of your own, it says which classes belong to no task and are left out.

        Raises:
            MisconfigurationException: If they are missing, do not fit the tables, or are too few.
        """
        if self.download:
            fetch(MIT_INDOOR, self.data_dir, self.archive_md5)
        if self._own_table and "plan" not in self._shared:
            self._say_what_is_left_out()
        self._plan()

    def _say_what_is_left_out(self) -> None:
        """Of a table of the user's own: in the packaged one, it is the published benchmark that leaves some out."""
        left_out = Counter(of for of in self.supercategories.values() if of not in self.tasks)
        if left_out:
            listed = ", ".join(f"{name!r} ({count})" for name, count in sorted(left_out.items()))
            rank_zero_info(
                f"{left_out.total()} class(es) are left out: their supercategories are none of the tasks "
                f"{', '.join(map(repr, self.tasks))}. These are {listed}."
            )

    def pools(self) -> Pools:
        """The names of all images."""
        if "pools" not in self._shared:
            pools = read_pools(self.data_dir)
            check_classes(pools, self.supercategories, self.classes, self.data_dir / "Images")
            self.check(pools)
            self._shared["pools"] = pools
        found: Pools = self._shared["pools"]
        return found

    def server_files(self, task: int | str) -> ServerFiles:
        """Names of the server's images of a task, ``class/file``, in the order of the splits."""
        return self._plan().server[self.task_index(task)]

    def user_files(self, user: int | str, task: int | str) -> UserFiles:
        """Names of a user's images of a task, ``class/file``, in the order of the splits."""
        return self._plan().users[self.user_index(user)][self.task_index(task)]

    def _plan(self) -> _Plan:
        if "plan" not in self._shared:
            pools, tasks = self.pools(), range(len(self.tasks))
            server = [
                server_files(pools, self.classes[task], self.split_seed, "server", self.tasks[task]) for task in tasks
            ]
            given = {(draw, task): self.allocate(pools, task, draw) for draw in self.iterations for task in tasks}
            users = [[given[draw, task][person] for task in tasks] for person, draw in self._draws]
            self._shared["plan"] = _Plan(server, users)
        plan: _Plan = self._shared["plan"]
        return plan

    # The images

    def read_scene(self, path: Path) -> NDArray[np.uint8]:
        """An image file as the server sees it."""
        return crop_centre(resize_shorter(read_rgb(path), self.image_size), self.image_size)

    @override
    def load_server(self, task: int) -> tuple[LabelledImages, LabelledImages]:
        """The images of the list of training images, 80 % for training."""
        splits = self.server_files(task)
        files = sorted({name for split in splits for name in split})
        pool = self._store.pool(f"server-{self.tasks[task]}", files, self.read_scene)
        return self._labelled(task, splits.train, files, pool), self._labelled(task, splits.val, files, pool)

    @override
    def load_user(self, user: int, task: int) -> tuple[LabelledImages, LabelledImages]:
        """What the user was given; the images of all users who see the same are decoded together."""
        mine = self.pool_of(self.person_of(user))
        sharing = [k for k, (person, _) in enumerate(self._draws) if self.pool_of(person).name == mine.name]
        files = sorted({name for k in sharing for split in self.user_files(k, task) for name in split})
        pool = self._store.pool(f"{mine.name}-{self.tasks[task]}", files, mine.read, *mine.depends)
        splits = self.user_files(user, task)
        return self._labelled(task, splits.adapt, files, pool), self._labelled(task, splits.eval, files, pool)

    def _labelled(self, task: int, names: Sequence[str], files: Sequence[str], pool: Tensor) -> LabelledImages:
        rows = {name: row for row, name in enumerate(files)}
        labels = [self.classes[task].index(name.partition("/")[0]) for name in names]
        chosen = torch.tensor([rows[name] for name in names], dtype=torch.long)
        return LabelledImages(ImageRows([pool], chosen), torch.tensor(labels, dtype=torch.long))

    @override
    def transform(self, images: Tensor, seed: int | None = None) -> Tensor:
        """Standardise a batch; before it, take random parts, if it is to train on and ``augment`` was asked for."""
        if self.augment and seed is not None:
            images = random_crops(images, seed)
        return standardise(images, self.mean, self.deviation)


def _are_three(values: Sequence[float], least: float, most: float) -> bool:
    """Whether they are three numbers in a range."""
    try:
        return len(values) == 3 and all(least <= value <= most for value in values)
    except TypeError:
        return False
