"""Allocation of images of scenes to the server and the users."""

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
    """Names of the server's images of a task, by split."""

    train: Names
    val: Names


class UserFiles(NamedTuple):
    """Names of a user's images of a task, by split."""

    adapt: Names
    eval: Names


def server_files(pools: Pools, scenes: Names, *seed: int | str) -> ServerFiles:
    """Split the n images of some classes at random, floor(0.8 n) of them for training."""
    names = _shuffled([name for scene in scenes for name in pools.train[scene]], *seed)
    count = 4 * len(names) // 5
    return ServerFiles(names[:count], names[count:])


def catprior_files(
    pools: Pools, scenes: Names, preferred: Sequence[Names], extra_images: int, *seed: int | str
) -> list[UserFiles]:
    """Allocate images of a task of CatPrior: a share of the test images, and extra ones of preferred classes.

    Each of the U users gets floor(n / U) of the n test images of a class, and users in random order get one more until
    none is left. A user's images of a class are halved; adapt gets the odd one.

    Args:
        pools: The images.
        scenes: The classes of the task.
        preferred: The preferred classes of each user.
        extra_images: Number of extra images of each preferred class.
        seed: Parts of the seed.

    Returns:
        The images of each user; all splits are disjoint.
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
    """Allocate images of a task of TransPrior, the same to every user.

    Of the n test images of a class, the first floor(n / 2) are in eval and the others in adapt, whatever the seed.
    ``extra_images`` random extra images of the task are halved; adapt gets the odd one.
    """
    halves = [(pools.test[scene], len(pools.test[scene]) // 2) for scene in scenes]
    sampled = _shuffled([name for scene in scenes for name in pools.extra[scene]], *seed, "extra")[:extra_images]
    evaluation = [*(n for names, half in halves for n in names[:half]), *sampled[: extra_images // 2]]
    adapt = [*(n for names, half in halves for n in names[half:]), *sampled[extra_images // 2 :]]
    _assert_disjoint(adapt, evaluation)
    return UserFiles(_shuffled(adapt, *seed, "adapt"), _shuffled(evaluation, *seed, "eval"))


def check_catprior(pools: Pools, classes: Mapping[str, Names], preferences: Preferences, extra_images: int) -> None:
    """Check that there are images for all users of CatPrior.

    Raises:
        MisconfigurationException: If a class has too few test or extra images.
    """
    users = len(preferences)
    found = {scene: len(pools.test[scene]) for scenes in classes.values() for scene in scenes}
    if few := [f"{scene!r} has {count}" for scene, count in found.items() if count < 2 * users]:
        raise MisconfigurationException(
            f"Each of the {users} users needs two test images of each class, one for adapt and one for eval, "
            f"{2 * users} in total; in {LISTS[1]} {some(few)}. Reduce num_users= or add images."
        )
    demand = {
        scene: sum(scene in preferred[task] for preferred in preferences)
        for task, scenes in classes.items()
        for scene in scenes
    }
    there = {scene: len(pools.extra[scene]) for scene in demand}
    if short := [scene for scene, count in demand.items() if count * extra_images > there[scene]]:
        needs = (
            f"{scene!r}: {demand[scene]} user(s) × {extra_images} = {demand[scene] * extra_images}, there are "
            f"{there[scene]}"
            for scene in short
        )
        most = min(there[scene] // count for scene, count in demand.items() if count)
        raise MisconfigurationException(
            f"There are too few extra images, those in neither list. {some(needs, '; ')}. Reduce extra_images= (at "
            f"most {most} with these preferences) or choose other preferences=."
        )


def check_transprior(pools: Pools, classes: Mapping[str, Names], extra_images: int) -> None:
    """Check that there are images for the users of TransPrior.

    Raises:
        MisconfigurationException: If a task has too few extra images or a class too few test images.
    """
    if few := [scene for scenes in classes.values() for scene in scenes if len(pools.test[scene]) < 2]:
        raise MisconfigurationException(
            f"Each class needs at least 2 test images, one for adapt and one for eval; {LISTS[1]} has fewer of "
            f"{some(map(repr, few))}."
        )
    there = {task: sum(len(pools.extra[scene]) for scene in scenes) for task, scenes in classes.items()}
    if any(count < extra_images for count in there.values()):
        listed = ", ".join(f"{task!r} has {count}" for task, count in there.items() if count < extra_images)
        raise MisconfigurationException(
            f"There are too few extra images, those in neither list: each user gets {extra_images} of each task, and "
            f"{listed}. Reduce extra_images= (at most {min(there.values())})."
        )


def _assert_disjoint(*splits: Sequence[str]) -> None:
    """Assert that no image is allocated twice, also under ``python -O``."""
    names = [name for split in splits for name in split]
    if len(set(names)) != len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise AssertionError(f"{twice!r} is allocated twice.")


def _permutation(count: int, *seed: int | str) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(*seed))).tolist()
    return order


def _shuffled(names: Sequence[str], *seed: int | str) -> Names:
    return tuple(names[index] for index in _permutation(len(names), *seed))
