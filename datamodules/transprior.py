"""TransPrior: users whose cameras distort what they see."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import override

from pl_personalize.datamodules import distortions
from pl_personalize.datamodules.base import whole
from pl_personalize.datamodules.image_files import crop_centre, read_rgb, resize_shorter
from pl_personalize.datamodules.scene_allocation import UserFiles, check_transprior, transprior_files
from pl_personalize.datamodules.scene_folder import Pools
from pl_personalize.datamodules.scene_transforms import DEVIATION, MEAN
from pl_personalize.datamodules.scenes import TASKS, SceneDataModule, UserPool
from pl_personalize.functional.seeding import derive_seed

DistortAt = Literal["resized", "reference"]


class TransPriorDataModule(SceneDataModule):
    """The TransPrior benchmark of De Lange et al., CVPR 2020: users see the same scenes, each in his own distortion.

    A person has half of the test images of each class in adapt, half in eval, and of ``extra_images`` images of each
    task half in each. The server's data are those of :class:`CatPriorDataModule`.

    An image looks the same whenever a person sees it: what is random in a distortion follows from ``split_seed``, the
    person and the name of the file. Each person's images are kept for themselves; ten persons with the default numbers
    have 7 GiB of them, for which ``cache_dir`` is the place.

    Args:
        data_dir: Folder with ``Images/<class>/<file>``, ``TrainImages.txt`` and ``TestImages.txt``.
        num_users: How many persons there are; the first so many of the distortions are theirs.
        extra_images: Extra images of each task.
        severity: Of the distortions, 1 to 5.
        distort_at: ``resized``: images are brought to ``image_size``, distorted and cropped, so that persons see the
            same part of a scene as the server. ``reference``: as in the published code, images are distorted as they
            are in the file and cropped, without resizing, with black around small ones.
        tasks: Supercategories, in order; the others are left out.
        supercategories: CSV file with the columns scene_class and supercategory; by default that of MIT Indoor Scenes.
        iterations: Seeds of allocations of images to the persons; each person is one user for each of them.
        image_size: Side of the images, in pixels.
        augment: Whether training sees random parts of the stored images, every second one mirrored.
        mean: Of each channel, in [0, 1], which is subtracted; by default ImageNet's.
        deviation: Of each channel, which the rest is divided by; by default ImageNet's.
        cache_dir: Folder for decoded images, which are then read from there; by default they are in memory.
        download: Fetch MIT Indoor Scenes if it is missing.
        archive_md5: Checksum that its archive must have; there is no official one.
        task: See :class:`TaskIncrementalDataModule`.
        user: See there.
        batch_size: For training.
        eval_batch_size: For everything else.
        seed: See :class:`SceneDataModule`.
        split_seed: What the choice and the division of the images depend on.

    Raises:
        MisconfigurationException: If an option is out of range, or the table of supercategories unfit.

    Example:
        >>> data = TransPriorDataModule("data/mit-indoor", user="user10")
        >>> len(data.users), data.distortion_of("user3")
        (10, 'saturation')
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] = "data/mit-indoor",
        *,
        num_users: int = 10,
        extra_images: int = 1000,
        severity: int = 3,
        distort_at: DistortAt = "resized",
        tasks: Sequence[str] | str = TASKS,
        supercategories: str | Path | None = None,
        iterations: Sequence[int] | int = (1,),
        image_size: int = 224,
        augment: bool = False,
        mean: Sequence[float] = MEAN,
        deviation: Sequence[float] = DEVIATION,
        cache_dir: str | Path | None = None,
        download: bool = False,
        archive_md5: str | None = None,
        task: int | str | None = None,
        user: int | str | None = None,
        batch_size: int = 20,
        eval_batch_size: int = 256,
        seed: int = 0,
        split_seed: int = 27,
    ) -> None:
        if whole("num_users", num_users) > len(distortions.DISTORTIONS):
            raise MisconfigurationException(
                f"There are {len(distortions.DISTORTIONS)} distortions, one for each user; got num_users={num_users}."
            )
        severity = whole("severity", severity)
        if severity not in range(1, 6):
            raise MisconfigurationException(f"severity must be 1, 2, 3, 4 or 5; got {severity}.")
        if distort_at not in get_args(DistortAt):
            raise MisconfigurationException(f"distort_at must be 'resized' or 'reference'; got {distort_at!r}.")
        super().__init__(
            data_dir,
            num_users,
            tasks=tasks,
            supercategories=supercategories,
            iterations=iterations,
            image_size=image_size,
            augment=augment,
            mean=mean,
            deviation=deviation,
            cache_dir=cache_dir,
            download=download,
            archive_md5=archive_md5,
            task=task,
            user=user,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            split_seed=split_seed,
        )
        self.extra_images = whole("extra_images", extra_images, 0)
        self.severity, self.distort_at = severity, distort_at

    @override
    def about_user(self, user: int | str) -> str:
        """The distortion."""
        return self.distortion_of(user)

    def distortion_of(self, user: int | str) -> str:
        """The name of a user's distortion."""
        return distortions.DISTORTIONS[self.person_of(user)]

    @override
    def prepare_data(self) -> None:
        """See :meth:`SceneDataModule.prepare_data`; besides, that what the distortions need is installed."""
        super().prepare_data()
        for name in distortions.DISTORTIONS[: self.num_users]:
            try:
                distortions.distort(np.zeros((8, 8, 3), np.uint8), name, severity=self.severity, seed=0)
            except ImportError as error:  # of a package that is missing, or that lacks a library of the system
                raise MisconfigurationException(f"The distortion {name!r} cannot be made: {error}") from error

    @override
    def check(self, pools: Pools) -> None:
        check_transprior(pools, self.classes_by_task(), self.extra_images)

    @override
    def allocate(self, pools: Pools, task: int, iteration: int) -> list[UserFiles]:
        seed = self.split_seed, "TransPrior", iteration, self.tasks[task]
        return [transprior_files(pools, self.classes[task], self.extra_images, *seed)] * self.num_users

    @override
    def pool_of(self, person: int) -> UserPool:
        name, versions = distortions.DISTORTIONS[person], (np.__version__, distortions.opencv_version())
        depends = name, *versions, self.severity, self.distort_at, self.split_seed, person
        return UserPool(f"user{person + 1}", partial(self.read_distorted, person=person), depends)

    def read_distorted(self, path: Path, person: int) -> NDArray[np.uint8]:
        """An image file as a person (from 0) sees it."""
        image = read_rgb(path)
        if self.distort_at == "resized":
            image = resize_shorter(image, self.image_size)
        name, folder = distortions.DISTORTIONS[person], path.parent.relative_to(self.data_dir / "Images").as_posix()
        seed = derive_seed(self.split_seed, person, folder, path.name)
        try:
            distorted = distortions.distort(np.asarray(image), name, severity=self.severity, seed=seed)
        except Exception as error:  # what OpenCV and Pillow raise at images of extreme sizes
            raise MisconfigurationException(f"{path} cannot be distorted ({name}): {error}") from error
        return crop_centre(Image.fromarray(distorted), self.image_size)
