"""CatPrior: users with different preferred classes."""

from __future__ import annotations

import os
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from pl_personalize.datamodules.base import whole
from pl_personalize.datamodules.labelled_images import permutation
from pl_personalize.datamodules.scene_folder import LISTS, Names, Pools
from pl_personalize.datamodules.scene_preferences import Preferences, read_preferences, sample_preferences
from pl_personalize.datamodules.scenes import SceneDataModule, UserFiles, assert_disjoint, shuffled
from pl_personalize.functional.names import some


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
        chosen = self.preferences_of(user)
        return "; ".join(f"{task}: {', '.join(chosen[task])}" for task in self.tasks)

    def preferences_of(self, user: int | str) -> dict[str, Names]:
        """Preferred classes of a user for each task."""
        return self.preferences()[self.profile_of(user)]

    def preferences(self) -> Preferences:
        """Preferred classes for each profile and task."""
        if "preferences" not in self._shared:
            self.pools()  # samples them, given the number of images
        found: Preferences = self._shared["preferences"]
        return found

    @override
    def check(self, pools: Pools) -> None:
        users = self.num_users
        if isinstance(self._preferences, int):
            numbers = users, self.preferred_classes, self.extra_images
            sampled = sample_preferences(pools.extra, self.classes_by_task(), *numbers, self._preferences)
            self._shared["preferences"] = sampled
        found = {scene: len(pools.test[scene]) for scenes in self.classes for scene in scenes}
        if few := [f"{scene!r} has {count}" for scene, count in found.items() if count < 2 * users]:
            raise MisconfigurationException(
                f"Each of the {users} users needs two test images of each class, one for adapt and one for eval, "
                f"{2 * users} in total; in {LISTS[1]} {some(few)}. Reduce num_users= or add images."
            )
        demand = Counter(scene for chosen in self.preferences() for task in self.tasks for scene in chosen[task])
        there = {scene: len(pools.extra[scene]) for scene in found if demand[scene]}
        if short := [scene for scene, count in there.items() if demand[scene] * self.extra_images > count]:
            needs = (
                f"{scene!r}: {demand[scene]} user(s) × {self.extra_images} = {demand[scene] * self.extra_images}, "
                f"there are {there[scene]}"
                for scene in short
            )
            most = min(count // demand[scene] for scene, count in there.items())
            raise MisconfigurationException(
                f"There are too few extra images, those in neither list. {some(needs, '; ')}. Reduce extra_images= (at "
                f"most {most} with these preferences) or choose other preferences=."
            )

    @override
    def allocate(self, pools: Pools, task: int, allocation_seed: int) -> list[UserFiles]:
        """Each of the U users gets floor(n / U) of the n test images of a class; random users get one more each."""
        seed = self.split_seed, "CatPrior", allocation_seed, self.tasks[task]
        users = range(self.num_users)
        mine: list[tuple[list[str], list[str]]] = [([], []) for _ in users]  # adapt and eval

        def give(user: int, names: Names) -> None:
            mine[user][0].extend(names[len(names) // 2 :])
            mine[user][1].extend(names[: len(names) // 2])

        for scene in self.classes[task]:
            names = shuffled(pools.test[scene], *seed, "test", scene)
            sizes = [len(names) // len(users) + (place < len(names) % len(users)) for place in users]
            order = permutation(len(users), *seed, "users", scene).tolist()
            for user, stop, size in zip(order, accumulate(sizes), sizes, strict=True):
                give(user, names[stop - size : stop])
            names = shuffled(pools.extra[scene], *seed, "extra", scene)
            fans = (user for user in users if scene in self.preferences()[user][self.tasks[task]])
            for place, user in enumerate(fans):
                give(user, names[place * self.extra_images : (place + 1) * self.extra_images])
        assert_disjoint(*(split for splits in mine for split in splits))
        return [
            UserFiles(shuffled(adapt, *seed, "adapt", user), shuffled(evaluation, *seed, "eval", user))
            for user, (adapt, evaluation) in enumerate(mine)
        ]
