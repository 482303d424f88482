"""Which images of a folder of scenes the server and the users get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.datamodules.scene_folder import LISTS, Names, Pools
from pl_personalize.datamodules.scene_preferences import Preferences
from pl_personalize.functional.names import some
from pl_personalize.functional.seeding import derive_seed


class ServerFiles(NamedTuple):
    """Names of the server's images of a task."""

    train: Names
    val: Names


class UserFiles(NamedTuple):
    """Names of a user's images of a task."""

    adapt: Names
    eval: Names


def server_files(pools: Pools, scenes: Names, *seed: int | str) -> ServerFiles:
    """The training images of some classes, floor(0.8 n) of them at random for training."""
    names = _shuffled([name for scene in scenes for name in pools.train[scene]], *seed)
    count = 4 * len(names) // 5
    return ServerFiles(names[:count], names[count:])


def catprior_files(
    pools: Pools, scenes: Names, preferred: Sequence[Names], extra_images: int, *seed: int | str
) -> list[UserFiles]:
    """The images of each user of CatPrior in a task: a share of the test images, and extra ones of what he prefers.

    Of the n test images of a class, each of the U users gets floor(n / U), and users in a random order one more, until
    none is left. A user's images of a class are halved; where they are odd in number, adapt has one more.

    Args:
        pools: The images.
        scenes: The classes of the task.
        preferred: The classes that each user prefers.
        extra_images: How many extra images of each.
        seed: What the allocation depends on.

    Returns:
        For each user; no image is in two places.
    """
    users = range(len(preferred))
    adapt: list[list[str]] = [[] for _ in users]
    evaluation: list[list[str]] = [[] for _ in users]

    def give(user: int, names: Names) -> None:
        evaluation[user] += names[: len(names) // 2]
        adapt[user] += names[len(names) // 2 :]

    for scene in scenes:
        names = _shuffled(pools.test[scene], *seed, "test", scene)
        order = _permutation(len(users), *seed, "users", scene)
        sizes = [len(names) // len(users) + (place < len(names) % len(users)) for place in users]
        for user, stop, size in zip(order, accumulate(sizes), sizes, strict=True):
            give(user, names[stop - size : stop])
        names = _shuffled(pools.extra[scene], *seed, "extra", scene)
        fans = [user for user in users if scene in preferred[user]]
        for place, user in enumerate(fans):
            give(user, names[place * extra_images : (place + 1) * extra_images])
    found = [
        UserFiles(_shuffled(adapt[user], *seed, "adapt", user), _shuffled(evaluation[user], *seed, "eval", user))
        for user in users
    ]
    _assert_disjoint(*(split for files in found for split in files))
    return found


def transprior_files(pools: Pools, scenes: Names, extra_images: int, *seed: int | str) -> UserFiles:
    """The images that every user of TransPrior has in a task.

    Of the n test images of a class, the first floor(n / 2) are in eval, the others in adapt, whatever the seed.
    ``extra_images`` of all extra images of the task are sampled and halved; where they are odd in number, adapt has one
    more.
    """
    halves = [(pools.test[scene], len(pools.test[scene]) // 2) for scene in scenes]
    sampled = _shuffled([name for scene in scenes for name in pools.extra[scene]], *seed, "extra")[:extra_images]
    evaluation = [*(n for names, half in halves for n in names[:half]), *sampled[: extra_images // 2]]
    adapt = [*(n for names, half in halves for n in names[half:]), *sampled[extra_images // 2 :]]
    _assert_disjoint(adapt, evaluation)
    return UserFiles(_shuffled(adapt, *seed, "adapt"), _shuffled(evaluation, *seed, "eval"))


def check_catprior(pools: Pools, classes: Mapping[str, Names], preferences: Preferences, extra_images: int) -> None:
    """See that there are images for all users of CatPrior.

    Raises:
        MisconfigurationException: If there are too few test images or extra images of a class; with the arithmetic.
    """
    users = len(preferences)
    found = {scene: len(pools.test[scene]) for scenes in classes.values() for scene in scenes}
    if few := [f"{scene!r} has {count}" for scene, count in found.items() if count < 2 * users]:
        raise MisconfigurationException(
            f"Each of the {users} users needs two test images of each class, one for adapt and one for eval, which "
            f"makes {2 * users}; but in {LISTS[1]} {some(few)}. Ask for fewer users with num_users=, or add images."
        )
    wanted = {
        scene: sum(scene in preferred[task] for preferred in preferences)
        for task, scenes in classes.items()
        for scene in scenes
    }
    there = {scene: len(pools.extra[scene]) for scene in wanted}
    if short := [scene for scene, times in wanted.items() if times * extra_images > there[scene]]:
        needs = (
            f"{scene!r}: wanted by {wanted[scene]} user(s) × {extra_images} = {wanted[scene] * extra_images}, "
            f"there are {there[scene]}"
            for scene in short
        )
        most = min(there[scene] // times for scene, times in wanted.items() if times)
        raise MisconfigurationException(
            f"There are too few extra images (those of no list). {some(needs, '; ')}. Ask for fewer with "
            f"extra_images= (at most {most} with these preferences), or let other classes be preferred (preferences=)."
        )


def check_transprior(pools: Pools, classes: Mapping[str, Names], extra_images: int) -> None:
    """See that there are images for the users of TransPrior.

    Raises:
        MisconfigurationException: If there are too few extra images in a task, or no test images of a class; with the
            arithmetic.
    """
    if few := [scene for scenes in classes.values() for scene in scenes if len(pools.test[scene]) < 2]:
        raise MisconfigurationException(
            f"Each class needs at least 2 test images, one for adapt and one for eval; in {LISTS[1]} there are fewer "
            f"of {some(map(repr, few))}."
        )
    there = {task: sum(len(pools.extra[scene]) for scene in scenes) for task, scenes in classes.items()}
    if any(count < extra_images for count in there.values()):
        listed = ", ".join(f"{task!r} has {count}" for task, count in there.items() if count < extra_images)
        raise MisconfigurationException(
            f"There are too few extra images (those of no list): each user gets {extra_images} of each task, and "
            f"{listed}. Ask for fewer with extra_images= (at most {min(there.values())})."
        )


def _assert_disjoint(*splits: Sequence[str]) -> None:
    """See that no image was given twice, also under ``python -O``."""
    names = [name for split in splits for name in split]
    if len(set(names)) != len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise AssertionError(f"{twice!r} was given twice.")


def _permutation(count: int, *seed: int | str) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(*seed))).tolist()
    return order


def _shuffled(names: Sequence[str], *seed: int | str) -> Names:
    return tuple(names[index] for index in _permutation(len(names), *seed))
