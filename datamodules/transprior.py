"""TransPrior: users whose cameras distort what they see."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import override

from pl_personalize.datamodules import distortions
from pl_personalize.datamodules.base import whole
from pl_personalize.datamodules.image_files import center_square, read_rgb, resize_shorter
from pl_personalize.datamodules.scene_folder import LISTS, Pools
from pl_personalize.datamodules.scenes import SceneDataModule, UserFiles, UserPool, assert_disjoint, shuffled
from pl_personalize.functional.names import some
from pl_personalize.functional.seeding import derive_seed

DistortAt = Literal["resized", "reference"]


class TransPriorDataModule(SceneDataModule):
    """The TransPrior benchmark of De Lange et al., CVPR 2020: users see scenes through different distortions.

    A user has half of the test images of each class in adapt and half in eval, and of ``extra_images`` images of each
    task half in each. The server's data are those of :class:`CatPriorDataModule`.

    An image always looks the same to a user: the randomness of a distortion depends only on ``split_seed``, the profile
    and the name of the file. The images of each profile are stored separately; ten profiles with the default options
    take 7 GiB, so set ``cache_dir``.

    Args:
        *args: The folder of the scenes, as for :class:`SceneDataModule`.
        num_users: Number of user profiles, each with the distortion of that rank in ``DISTORTIONS``; at most 10.
        extra_images: Number of extra images of each task.
        severity: Severity of the distortions, from 1 to 5.
        distort_at: ``resized``: resize images to ``image_size``, distort them and crop, so that users see the same part
            of a scene as the server. ``reference``: as in the published code, distort images as stored in the file and
            crop them without resizing; small ones are padded with black.
        **options: Further arguments of :class:`SceneDataModule`.

    Raises:
        MisconfigurationException: If an option is out of range, or the table of supercategories is invalid.

    Example:
        >>> data = TransPriorDataModule("data/mit-indoor", user="user10")
        >>> len(data.users), data.distortion_of("user3")
        (10, 'saturation')
    """

    def __init__(
        self,
        *args: Any,
        num_users: int = 10,
        extra_images: int = 1000,
        severity: int = 3,
        distort_at: DistortAt = "resized",
        **options: Any,
    ) -> None:
        if whole("num_users", num_users) > len(distortions.DISTORTIONS):
            raise MisconfigurationException(
                f"num_users={num_users} is not supported: there are {len(distortions.DISTORTIONS)} distortions."
            )
        severity = whole("severity", severity)
        if severity not in range(1, 6):
            raise MisconfigurationException(f"severity must be 1, 2, 3, 4 or 5; got {severity}.")
        if distort_at not in get_args(DistortAt):
            raise MisconfigurationException(f"distort_at must be 'resized' or 'reference'; got {distort_at!r}.")
        super().__init__(*args, num_users=num_users, **options)
        self.extra_images = whole("extra_images", extra_images, 0)
        self.severity, self.distort_at = severity, distort_at

    @override
    def decisive_options(self) -> dict[str, Any]:
        own = {"extra_images": self.extra_images, "severity": self.severity, "distort_at": self.distort_at}
        return super().decisive_options() | own

    @override
    def about_user(self, user: int | str) -> str:
        """Name of the distortion."""
        return self.distortion_of(user)

    def distortion_of(self, user: int | str) -> str:
        """Name of a user's distortion."""
        return distortions.DISTORTIONS[self.profile_of(user)]

    @override
    def prepare_data(self) -> None:
        """Also check that the packages required by the distortions are installed."""
        super().prepare_data()
        for name in distortions.DISTORTIONS[: self.num_users]:
            try:
                distortions.distort(np.zeros((8, 8, 3), np.uint8), name, severity=self.severity, seed=0)
            except ImportError as error:  # a package or a system library is missing
                raise MisconfigurationException(f"The distortion {name!r} is not available: {error}") from error

    @override
    def check(self, pools: Pools) -> None:
        if few := [scene for scenes in self.classes for scene in scenes if len(pools.test[scene]) < 2]:
            raise MisconfigurationException(
                f"Each class needs at least 2 test images, one for adapt and one for eval; {LISTS[1]} has fewer of "
                f"{some(map(repr, few))}."
            )
        there = {
            task: sum(len(pools.extra[scene]) for scene in scenes) for task, scenes in self.classes_by_task().items()
        }
        if few := [f"{task!r} has {count}" for task, count in there.items() if count < self.extra_images]:
            raise MisconfigurationException(
                f"There are too few extra images, those in neither list: each user gets {self.extra_images} of each "
                f"task, and {', '.join(few)}. Reduce extra_images= (at most {min(there.values())})."
            )

    @override
    def allocate(self, pools: Pools, task: int, allocation_seed: int) -> list[UserFiles]:
        """The first floor(n / 2) of the n test images of a class are in eval, whatever the seed."""
        seed = self.split_seed, "TransPrior", allocation_seed, self.tasks[task]
        tests, half = [pools.test[scene] for scene in self.classes[task]], self.extra_images // 2
        extra = [name for scene in self.classes[task] for name in pools.extra[scene]]
        extra = [*shuffled(extra, *seed, "extra")[: self.extra_images]]
        evaluation = [name for names in tests for name in names[: len(names) // 2]] + extra[:half]
        adapt = [name for names in tests for name in names[len(names) // 2 :]] + extra[half:]
        assert_disjoint(adapt, evaluation)
        files = UserFiles(shuffled(adapt, *seed, "adapt"), shuffled(evaluation, *seed, "eval"))
        return [files] * self.num_users

    @override
    def pool_of(self, profile: int) -> UserPool:
        name, versions = distortions.DISTORTIONS[profile], (np.__version__, distortions.opencv_version())
        depends = name, *versions, self.severity, self.distort_at, self.split_seed, profile
        return UserPool(f"user{profile + 1}", partial(self.read_distorted, profile=profile), depends)

    def read_distorted(self, path: Path, profile: int) -> NDArray[np.uint8]:
        """Decode an image file as the users of a profile see it."""
        image = read_rgb(path)
        if self.distort_at == "resized":
            image = resize_shorter(image, self.image_size)
        name, folder = distortions.DISTORTIONS[profile], path.parent.relative_to(self.data_dir / "Images").as_posix()
        seed = derive_seed(self.split_seed, profile, folder, path.name)
        try:
            distorted = distortions.distort(np.asarray(image), name, severity=self.severity, seed=seed)
        except Exception as error:  # raised by OpenCV or Pillow for extreme sizes
            raise MisconfigurationException(f"{path} cannot be distorted ({name}): {error}") from error
        return center_square(Image.fromarray(distorted), self.image_size)
