"""TransPrior: users whose cameras distort what they see."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from pl_personalize.datamodules.base import whole
from pl_personalize.datamodules.distortions import DISTORTIONS
from pl_personalize.datamodules.scene_cameras import CameraSceneDataModule
from pl_personalize.datamodules.scene_folder import LISTS, Pools
from pl_personalize.datamodules.scenes import UserFiles, UserPool, assert_disjoint, shuffled
from pl_personalize.functional.names import some


class TransPriorDataModule(CameraSceneDataModule):
    """The TransPrior benchmark of De Lange et al., CVPR 2020: users see scenes through different distortions.

    A user has half of the test images of each class in adapt and half in eval, and of ``extra_images`` images of each
    task half in each. The server's data are those of :class:`CatPriorDataModule`.

    The images of each profile are stored separately; ten profiles with the default options take 7 GiB, so set
    ``cache_dir``.

    Args:
        *args: The folder of the scenes, as for :class:`SceneDataModule`.
        num_users: Number of user profiles, each with the distortion of that rank in ``DISTORTIONS``; at most 10.
        extra_images: Number of extra images of each task.
        **options: Further arguments of :class:`CameraSceneDataModule`, such as ``severity``, but not ``cameras``.

    Raises:
        MisconfigurationException: If an option is out of range, or the table of supercategories is invalid.

    Example:
        >>> data = TransPriorDataModule("data/mit-indoor", user="user10")
        >>> len(data.users), data.distortion_of("user3")
        (10, 'saturation')
    """

    def __init__(self, *args: Any, num_users: int = 10, extra_images: int = 1000, **options: Any) -> None:
        if whole("num_users", num_users, 1) > len(DISTORTIONS):
            raise MisconfigurationException(
                f"num_users={num_users} is not supported: there are {len(DISTORTIONS)} distortions."
            )
        super().__init__(*args, num_users=num_users, cameras=DISTORTIONS[:num_users], **options)
        self.extra_images = whole("extra_images", extra_images, 0)

    @override
    def decisive_options(self) -> dict[str, Any]:
        return super().decisive_options() | {"extra_images": self.extra_images}

    @override
    def about_user(self, user: int | str) -> str:
        """Name of the distortion."""
        return self.distortion_of(user)

    @override
    def pool_of(self, profile: int) -> UserPool:
        return super().pool_of(profile)._replace(name=f"user{profile + 1}")

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
