"""CameraPrior: users with preferred classes, seen through distorting cameras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from pl_personalize.datamodules.catprior import CatPriorDataModule
from pl_personalize.datamodules.distortions import DISTORTIONS
from pl_personalize.datamodules.scene_cameras import CameraSceneDataModule
from pl_personalize.datamodules.scene_folder import Names, Pools
from pl_personalize.datamodules.scenes import UserFiles


class CameraPriorDataModule(CameraSceneDataModule, CatPriorDataModule):
    """Scenes of users who see some classes more than others, through distorting cameras.

    Each combination of the preferences of CatPrior's users and TransPrior's cameras is a user: ``user1-spatter``,
    ``user1-elastic``, …, ``user2-spatter``, … They have the images of :class:`CatPriorDataModule`'s user with the same
    preferences, so users who differ only in the camera share images. The server's data are those of
    :class:`CatPriorDataModule`.

    The images of each camera are stored separately; ten cameras with the default options take 7 GiB, so set
    ``cache_dir``.

    Args:
        *args: The folder of the scenes, as for :class:`SceneDataModule`.
        cameras: Names of different distortions out of ``DISTORTIONS``, one or several; by default all ten.
        num_users: Number of preferences; each has a user for every camera.
        **options: Further arguments of :class:`CameraSceneDataModule` and :class:`CatPriorDataModule`.

    Raises:
        MisconfigurationException: If an option is out of range, or a table or the preferences are invalid.

    Example:
        >>> data = CameraPriorDataModule("data/mit-indoor", cameras=["contrast", "jpeg"], num_users=2)
        >>> data.users
        ('user1-contrast', 'user1-jpeg', 'user2-contrast', 'user2-jpeg')
        >>> data.distortion_of("user2-jpeg"), data.preferences_of("user2-jpeg")["store"]
        ('jpeg', ('bakery', 'bookstore', 'laundromat'))
    """

    def __init__(
        self, *args: Any, cameras: Sequence[str] | str = DISTORTIONS, num_users: int = 5, **options: Any
    ) -> None:
        super().__init__(*args, cameras=cameras, num_users=num_users, **options)

    @override
    def profile_names(self) -> list[str]:
        return [f"{name}-{camera}" for name in super().profile_names() for camera in self.cameras]

    @override
    def decisive_options(self) -> dict[str, Any]:
        return super().decisive_options() | {"cameras": list(self.cameras)}

    @override
    def about_user(self, user: int | str) -> str:
        """Name of the distortion and preferred classes."""
        return f"{self.distortion_of(user)}; {super().about_user(user)}"

    @override
    def preferences_of(self, user: int | str) -> dict[str, Names]:
        return self.preferences()[self.profile_of(user) // len(self.cameras)]

    @override
    def allocate(self, pools: Pools, task: int, allocation_seed: int) -> list[UserFiles]:
        return [files for files in super().allocate(pools, task, allocation_seed) for _ in self.cameras]
