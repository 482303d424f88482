"""Base class for benchmarks on scenes."""

from __future__ import annotations

import hashlib
import json
import math
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
from torchvision.transforms.v2.functional import resized_crop
from typing_extensions import override

from pl_personalize.datamodules.base import TaskIncrementalDataModule, whole
from pl_personalize.datamodules.image_files import center_square, read_rgb, resize_shorter
from pl_personalize.datamodules.image_store import ImageStore, Read
from pl_personalize.datamodules.labelled_images import ImageRows, LabelledImages, permutation
from pl_personalize.datamodules.scene_download import MIT_INDOOR, fetch
from pl_personalize.datamodules.scene_folder import (
    Names,
    Pools,
    check_classes,
    classes_of_tasks,
    read_pools,
    read_supercategories,
)

TASKS = ("home", "leisure", "public", "store")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class ServerFiles(NamedTuple):
    """Names of the server's images of a task, by split."""

    train: Names
    val: Names


class UserFiles(NamedTuple):
    """Names of a user's images of a task, by split."""

    adapt: Names
    eval: Names


class UserPool(NamedTuple):
    """Images decoded together: name, decoder of a file, and what the decoder depends on."""

    name: str
    read: Read
    depends: tuple[str | int, ...] = ()


class SceneDataModule(TaskIncrementalDataModule):
    """Base class for benchmarks on scenes in the layout of MIT Indoor Scenes, whose supercategories are the tasks.

    The server gets the images listed in ``TrainImages.txt``, 80 % of them for training. A subclass allocates those in
    ``TestImages.txt`` and the unlisted ones, the *extra* images, to users (:meth:`check`, :meth:`allocate`,
    :meth:`pool_of`).

    A *profile* is what distinguishes a user: preferences, a distortion or both. There is one user per profile and
    allocation seed, named ``user1``, ``user2``, …, or with several seeds ``user1-seed1``, ``user1-seed2``, …

    Images are decoded once: resized to ``image_size`` (shorter side, bilinear with antialiasing), center-cropped to a
    square and stored as uint8; splits share them. Loaders normalize the batches.

    Args:
        data_dir: Folder with ``Images/<class>/<file>``, ``TrainImages.txt`` and ``TestImages.txt``.
        num_users: Number of user profiles.
        tasks: Supercategories in order, one or several; the others are left out.
        supercategories: CSV file with the columns scene_class and supercategory; by default that of MIT Indoor Scenes.
        allocation_seeds: Seeds, one or several, of the allocation of images to users.
        image_size: Side length of the images in pixels.
        augment: Whether to train on random crops of the stored images, half of them flipped horizontally.
        mean: Mean of each channel, for images in [0, 1]; by default ImageNet's.
        std: Standard deviation of each channel, for images in [0, 1]; by default ImageNet's.
        cache_dir: Folder for the decoded images, which are memory-mapped; by default they are held in memory.
        download: Whether to download MIT Indoor Scenes if it is missing.
        archive_md5: Expected MD5 checksum of the downloaded archive; there is no official one.
        split_seed: Seed of the choice and the division of the images.
        **options: Further arguments of :class:`TaskIncrementalDataModule`.

    Raises:
        MisconfigurationException: If an option is out of range or the table of supercategories is invalid.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] = "data/mit-indoor",
        *,
        num_users: int,
        tasks: Sequence[str] | str = TASKS,
        supercategories: str | Path | None = None,
        allocation_seeds: Sequence[int] | int = (1,),
        image_size: int = 224,
        augment: bool = False,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        cache_dir: str | Path | None = None,
        download: bool = False,
        archive_md5: str | None = None,
        split_seed: int = 27,
        **options: Any,
    ) -> None:
        num_users, image_size = whole("num_users", num_users, 1), whole("image_size", image_size, 1)
        split_seed = whole("split_seed", split_seed)
        float32 = torch.finfo(torch.float32)
        try:
            valid = len(mean) == len(std) == 3 and all(0 <= value <= 1 for value in mean)
            valid = valid and all(float32.tiny <= value <= float32.max for value in std)
        except TypeError:
            valid = False
        if not valid:
            raise MisconfigurationException(
                f"mean={mean!r} and std={std!r} are not supported: pass one number for each of the three channels, "
                "with each mean in [0, 1] and each std positive."
            )
        tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        seeds = allocation_seeds if isinstance(allocation_seeds, Iterable) else [allocation_seeds]
        seeds = [whole("allocation_seeds", allocation_seed) for allocation_seed in seeds]
        if not seeds or len(set(seeds)) != len(seeds):
            raise MisconfigurationException(f"allocation_seeds must be one or several different seeds; got {seeds}.")
        self.supercategories = read_supercategories(supercategories)
        self.num_users = num_users
        names = self.profile_names()
        self._profiles = [(profile, allocation_seed) for profile in range(len(names)) for allocation_seed in seeds]
        suffixes = [f"-seed{allocation_seed}" if len(seeds) > 1 else "" for allocation_seed in seeds]
        super().__init__(
            tasks=tasks,
            classes=classes_of_tasks(self.supercategories, tasks),
            users=[name + suffix for name in names for suffix in suffixes],
            **options,
        )
        self.data_dir, self.allocation_seeds = Path(data_dir).expanduser(), tuple(seeds)
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_size, self.augment, self.split_seed = image_size, augment, split_seed
        self.download, self.archive_md5 = download, archive_md5
        self._table = None if supercategories is None else str(supercategories)
        cache = None if cache_dir is None else Path(cache_dir).expanduser()
        self._store = ImageStore(self.data_dir / "Images", image_size, cache)
        self._shared: dict[str, Any] = {}  # between views
        self._allocations: dict[tuple[int, int], list[UserFiles]] = {}

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    @override
    def decisive_options(self) -> dict[str, Any]:
        files = [
            [self.server_files(task) for task in self.tasks],
            [self.user_files(user, task) for user in self.users for task in self.tasks],
        ]
        return super().decisive_options() | {
            "data_dir": str(self.data_dir.resolve()),
            **{name: getattr(self, name) for name in ("num_users", "image_size", "augment", "split_seed")},
            "tasks": list(self.tasks),
            "supercategories": self._table,
            "allocation_seeds": list(self.allocation_seeds),
            "mean": list(map(float, self.mean)),
            "std": list(map(float, self.std)),
            "images": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16],
        }

    # Hooks for subclasses

    @abstractmethod
    def check(self, pools: Pools) -> None:
        """Raise MisconfigurationException if there are too few images for the users, with the numbers and a remedy."""

    @abstractmethod
    def allocate(self, pools: Pools, task: int, allocation_seed: int) -> list[UserFiles]:
        """Allocate images of a task to each profile."""

    def profile_names(self) -> list[str]:
        """Name of each profile; the names of the users begin with it."""
        return [f"user{profile + 1}" for profile in range(self.num_users)]

    def pool_of(self, profile: int) -> UserPool:
        """Pool of a profile's images; profiles that see images alike share one."""
        return UserPool("users", self.read_scene)

    # Allocation of image files

    def classes_by_task(self) -> dict[str, Names]:
        """Classes of each task."""
        return dict(zip(self.tasks, self.classes, strict=True))

    def profile_of(self, user: int | str) -> int:
        """Profile of a user, from 0."""
        return self._profiles[self.user_index(user)][0]

    @override
    def prepare_data(self) -> None:
        """Download missing images if ``download`` is set, and check them; log which classes a custom table leaves out.

        Raises:
            MisconfigurationException: If images are missing, do not match the tables, or are too few.
        """
        if self.download:
            fetch(MIT_INDOOR, self.data_dir, self.archive_md5)
        left_out = Counter(of for of in self.supercategories.values() if of not in self.tasks)
        if self._table is not None and left_out and "pools" not in self._shared:
            listed = ", ".join(f"{name!r} ({count})" for name, count in sorted(left_out.items()))
            rank_zero_info(
                f"{left_out.total()} class(es) are left out because their supercategories are not among the tasks "
                f"{', '.join(map(repr, self.tasks))}: {listed}."
            )
        self.pools()

    def pools(self) -> Pools:
        """Names of all images."""
        if "pools" not in self._shared:
            pools = read_pools(self.data_dir)
            check_classes(pools, self.supercategories, self.classes, self.data_dir / "Images")
            self.check(pools)
            self._shared["pools"] = pools
        found: Pools = self._shared["pools"]
        return found

    def server_files(self, task: int | str) -> ServerFiles:
        """Names of the server's images of a task, ``class/file``, in the order of the splits."""
        index = self.task_index(task)
        train = self.pools().train
        listed = [name for scene in self.classes[index] for name in train[scene]]
        names = shuffled(listed, self.split_seed, "server", self.tasks[index])
        return ServerFiles(names[: 4 * len(names) // 5], names[4 * len(names) // 5 :])

    def user_files(self, user: int | str, task: int | str) -> UserFiles:
        """Names of a user's images of a task, ``class/file``, in the order of the splits."""
        profile, allocation_seed = self._profiles[self.user_index(user)]
        key = self.task_index(task), allocation_seed
        if key not in self._allocations:
            self._allocations[key] = self.allocate(self.pools(), *key)
        return self._allocations[key][profile]

    # The images

    def read_scene(self, path: Path) -> NDArray[np.uint8]:
        """Decode an image file as the server sees it."""
        return center_square(resize_shorter(read_rgb(path), self.image_size), self.image_size)

    @override
    def load_server(self, task: int) -> tuple[LabelledImages, LabelledImages]:
        """Load the images of the training list, 80 % for training."""
        splits = self.server_files(task)
        files = sorted({name for split in splits for name in split})
        pool = self._store.pool(f"server-{self.tasks[task]}", files, self.read_scene)
        return self._labelled(task, splits.train, files, pool), self._labelled(task, splits.val, files, pool)

    @override
    def load_user(self, user: int, task: int) -> tuple[LabelledImages, LabelledImages]:
        """Load the user's images; those of all users who see images alike are decoded together."""
        mine = self.pool_of(self.profile_of(user))
        sharing = [k for k, (profile, _) in enumerate(self._profiles) if self.pool_of(profile).name == mine.name]
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
        """Normalize a batch, after random crops if it is for training and ``augment`` is set."""
        if self.augment and seed is not None:
            images = random_crops(images, seed)
        return normalize(images, self.mean, self.std)


def shuffled(names: Sequence[str], *seed: int | str) -> Names:
    """Names in a random order that depends only on the parts of the seed."""
    return tuple(names[index] for index in permutation(len(names), *seed).tolist())


def assert_disjoint(*splits: Sequence[str]) -> None:
    """Assert that no image is allocated twice, also under ``python -O``."""
    names = [name for split in splits for name in split]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise AssertionError(f"{twice[0]!r} is allocated twice.")


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Normalize uint8 images (n, 3, height, width) to floats; with ImageNet's statistics by default."""
    centre, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return images.float().div_(255).sub_(centre).div_(scale)


def random_crops(images: Tensor, seed: int) -> Tensor:
    """Random resized crops to the image's size, flipped horizontally with probability 0.5.

    Crops have 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3, as in the training of GoogLeNet (Szegedy et
    al., CVPR 2015) and in torchvision's ``RandomResizedCrop``.
    """
    generator = torch.Generator().manual_seed(seed)
    found, (rows, columns) = torch.empty_like(images), images.shape[-2:]
    for number, image in enumerate(images):
        top, left, height, width = _random_box(rows, columns, generator)
        part = resized_crop(image, top, left, height, width, [rows, columns], antialias=True)
        found[number] = part.flip(-1) if torch.rand((), generator=generator) < 0.5 else part
    return found


def _random_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop; the whole image if no sampled one fits."""
    for _ in range(10):
        area, ratio = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (0.08 + area * (1.0 - 0.08))
        ratio = 3 / 4 * ((4 / 3) / (3 / 4)) ** ratio
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return top, left, h, w
    return 0, 0, height, width
