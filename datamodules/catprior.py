"""CatPrior: users who prefer other classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from pl_personalize.datamodules.base import whole
from pl_personalize.datamodules.scene_allocation import UserFiles, catprior_files, check_catprior
from pl_personalize.datamodules.scene_folder import Pools
from pl_personalize.datamodules.scene_preferences import Preferences, draw_preferences, read_preferences
from pl_personalize.datamodules.scene_transforms import DEVIATION, MEAN
from pl_personalize.datamodules.scenes import TASKS, SceneDataModule


class CatPriorDataModule(SceneDataModule):
    """The CatPrior benchmark of De Lange et al., CVPR 2020: scenes of users who see some classes more than others.

    Of each class a user has a share of the test images, and of the classes that he prefers ``extra_images`` more; no
    image belongs to two users. Each part is halved into adapt and eval. The published code can never draw a class's
    last extra image, and loses one with every user; here all are drawn alike.

    Args:
        data_dir: Folder with ``Images/<class>/<file>``, ``TrainImages.txt`` and ``TestImages.txt``.
        num_users: How many persons there are.
        preferred_classes: How many classes of each task a person prefers.
        extra_images: Extra images of each of these.
        preferences: JSON file ``{user: {task: [class, …]}}`` (users are ``user1`` or ``1`` and so on, or all have names
            without such a number and count in the file's order), or a seed by which classes that have enough images are
            drawn; by default the paper's. Preferences stay the same in all iterations.
        tasks: Supercategories, in order, one or several; the others are left out.
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
        MisconfigurationException: If an option is out of range, or a table or the preferences are unfit.

    Example:
        >>> data = CatPriorDataModule("data/mit-indoor", task="home")
        >>> data.tasks, data.users, data.num_classes("home")
        (('home', 'leisure', 'public', 'store'), ('user1', 'user2', 'user3', 'user4', 'user5'), 14)
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] = "data/mit-indoor",
        *,
        num_users: int = 5,
        preferred_classes: int = 3,
        extra_images: int = 70,
        preferences: int | str | Path | None = None,
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
        self.preferred_classes = whole("preferred_classes", preferred_classes, 1)
        self.extra_images = whole("extra_images", extra_images, 0)
        self._preferences_seed: int | None = None
        if preferences is None or isinstance(preferences, (str, os.PathLike)):
            stored = read_preferences(preferences, self.classes_by_task(), self.num_users, self.preferred_classes)
            self._shared["preferences"] = stored
        else:
            self._preferences_seed = whole("preferences, if it is no file,", preferences)

    @override
    def about_user(self, user: int | str) -> str:
        """The preferred classes."""
        chosen = self.preferences()[self.person_of(user)]
        return "; ".join(f"{task}: {', '.join(chosen[task])}" for task in self.tasks)

    def preferences(self) -> Preferences:
        """For each person and task, the preferred classes."""
        if "preferences" not in self._shared:
            self.pools()  # which draws them, when it knows how many images there are
        found: Preferences = self._shared["preferences"]
        return found

    @override
    def check(self, pools: Pools) -> None:
        if self._preferences_seed is not None:
            self._shared["preferences"] = draw_preferences(
                pools.extra,
                self.classes_by_task(),
                self.num_users,
                self.preferred_classes,
                self.extra_images,
                self._preferences_seed,
            )
        check_catprior(pools, self.classes_by_task(), self._shared["preferences"], self.extra_images)

    @override
    def allocate(self, pools: Pools, task: int, iteration: int) -> list[UserFiles]:
        name = self.tasks[task]
        preferred = [chosen[name] for chosen in self.preferences()]
        seed = self.split_seed, "CatPrior", iteration, name
        return catprior_files(pools, self.classes[task], preferred, self.extra_images, *seed)
