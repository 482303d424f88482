"""CatPrior: users with different preferred classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from typing_extensions import override

from pl_personalize.datamodules.base import whole
from pl_personalize.datamodules.scene_allocation import UserFiles, catprior_files, check_catprior
from pl_personalize.datamodules.scene_folder import Pools
from pl_personalize.datamodules.scene_preferences import Preferences, read_preferences, sample_preferences
from pl_personalize.datamodules.scenes import SceneDataModule


class CatPriorDataModule(SceneDataModule):
    """The CatPrior benchmark of De Lange et al., CVPR 2020: scenes of users who see some classes more than others.

    A user has a share of the test images of each class, and ``extra_images`` more of each class that they prefer; no
    image belongs to two users. Each part is halved into adapt and eval. Unlike in the published code, which never
    samples a class's last extra image and loses one with every user, all extra images are equally likely.

    Args:
        *args: The folder of the scenes, as for :class:`SceneDataModule`.
        num_users: Number of user profiles.
        preferred_classes: Number of classes of each task that a user prefers.
        extra_images: Number of extra images of each preferred class.
        preferences: JSON file ``{user: {task: [class, …]}}`` (either all users are called ``user1`` or ``1``, and so
            on, or none is and they count in the order of the file), or a seed for sampling classes that have enough
            images; by default the paper's. All allocation seeds share them.
        **options: Further arguments of :class:`SceneDataModule`.

    Raises:
        MisconfigurationException: If an option is out of range, or a table or the preferences are invalid.

    Example:
        >>> data = CatPriorDataModule("data/mit-indoor", task="home")
        >>> data.tasks, data.users, data.num_classes("home")
        (('home', 'leisure', 'public', 'store'), ('user1', 'user2', 'user3', 'user4', 'user5'), 14)
    """

    def __init__(
        self,
        *args: Any,
        num_users: int = 5,
        preferred_classes: int = 3,
        extra_images: int = 70,
        preferences: int | str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, num_users=num_users, **options)
        self.preferred_classes = whole("preferred_classes", preferred_classes, 1)
        self.extra_images = whole("extra_images", extra_images, 0)
        self._preferences: int | str | None = None if preferences is None else str(preferences)
        if preferences is None or isinstance(preferences, (str, os.PathLike)):
            stored = read_preferences(preferences, self.classes_by_task(), self.num_users, self.preferred_classes)
            self._shared["preferences"] = stored
        else:
            self._preferences = whole("preferences, unless a file,", preferences)

    @override
    def decisive_options(self) -> dict[str, Any]:
        return super().decisive_options() | {
            "preferred_classes": self.preferred_classes,
            "extra_images": self.extra_images,
            "preferences": self._preferences,
        }

    @override
    def about_user(self, user: int | str) -> str:
        """Preferred classes."""
        chosen = self.preferences()[self.profile_of(user)]
        return "; ".join(f"{task}: {', '.join(chosen[task])}" for task in self.tasks)

    def preferences(self) -> Preferences:
        """Preferred classes for each profile and task."""
        if "preferences" not in self._shared:
            self.pools()  # samples them, given the number of images
        found: Preferences = self._shared["preferences"]
        return found

    @override
    def check(self, pools: Pools) -> None:
        if isinstance(self._preferences, int):
            numbers = self.num_users, self.preferred_classes, self.extra_images
            sampled = sample_preferences(pools.extra, self.classes_by_task(), *numbers, self._preferences)
            self._shared["preferences"] = sampled
        check_catprior(pools, self.classes_by_task(), self._shared["preferences"], self.extra_images)

    @override
    def allocate(self, pools: Pools, task: int, allocation_seed: int) -> list[UserFiles]:
        name = self.tasks[task]
        preferred = [chosen[name] for chosen in self.preferences()]
        seed = self.split_seed, "CatPrior", allocation_seed, name
        return catprior_files(pools, self.classes[task], preferred, self.extra_images, *seed)
