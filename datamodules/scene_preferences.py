"""Preferred classes of users."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.datamodules.scene_folder import Names
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.functional.spelling import hint, trimmed, written_otherwise

Preferences = list[dict[str, Names]]
"""Preferred classes for each user and task."""

_TRIES = 100


def read_preferences(
    path: str | os.PathLike[str] | None, classes: Mapping[str, Names], num_users: int, count: int
) -> Preferences:
    """Read preferences from a JSON file ``{user: {task: [class, …]}}``; by default the paper's.

    Users are named ``user1`` or ``1`` and so on, in any order; or none is, and they count in the order of the file.
    Blanks around names are ignored.

    Args:
        path: The file.
        classes: Classes of each task.
        num_users: Number of users.
        count: Number of preferred classes of a task.

    Raises:
        MisconfigurationException: If the file is missing or does not fit these users, tasks and classes.
    """
    packaged = files("pl_personalize.datamodules") / "data" / "mit_indoor_preferences.json"
    name = "The paper's preferences" if path is None else str(path)
    try:
        text = (packaged if path is None else Path(path).expanduser()).read_text("utf-8-sig")
        found: Any = _trimmed(json.loads(text, object_pairs_hook=_each_once))
    except (OSError, ValueError, RecursionError) as error:
        raise MisconfigurationException(f"The preferences cannot be read from {name}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(tasks, dict) for tasks in found.values()):
        raise MisconfigurationException(f"{name} must be a JSON object: user -> task -> list of classes.")
    remedy = "Pass a matching file, or a seed to sample preferences (preferences=1)."
    if len(found) < num_users:
        raise MisconfigurationException(f"{name}: {len(found)} user(s), but num_users={num_users}. {remedy}")
    home = {scene: task for task, scenes in classes.items() for scene in scenes}
    numbers = {user: _number(user) for user in found}
    numbered = any(number is not None for number in numbers.values())
    if numbered and not _from_one(list(numbers.values()), num_users):
        raise MisconfigurationException(
            f"{name} must name its users user1, user2 and so on, or all without such numbers (they then count in "
            f"the order of the file); got {', '.join(found)}."
        )
    order = sorted(found, key=lambda user: numbers[user] or 0) if numbered else list(found)
    users = {user: found[user] for user in order[:num_users]}
    for user, tasks in users.items():
        for task in classes:
            chosen = tasks.get(task, [])
            problem = None
            if not isinstance(chosen, list) or len(chosen) != count or len(set(map(str, chosen))) != count:
                elsewhere = written_otherwise(task, tasks) if task not in tasks else None
                written = "" if elsewhere is None else f"; it has {elsewhere!r}, which is spelled differently"
                problem = f"{chosen!r}, not {count} different classes (preferred_classes={count}){written}"
            elif wrong := [scene for scene in chosen if home.get(str(scene)) != task]:
                nowhere = f"is in no task{hint(str(wrong[0]), home)}"
                other = f"belongs to {home[wrong[0]]!r}" if str(wrong[0]) in home else nowhere
                problem = f"{wrong[0]!r}, which {other}"
            if problem is not None:
                raise MisconfigurationException(f"{name}: user {user!r} prefers in {task!r} {problem}. {remedy}")
    return [{task: tuple(tasks[task]) for task in classes} for tasks in users.values()]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Convert a JSON object, refusing names that are equal up to blanks, of which Python would keep the last."""
    names = [trimmed(name) for name, _ in pairs]
    if twice := [name for k, name in enumerate(names) if name in names[:k]]:
        raise ValueError(f"{twice[0]!r} appears twice in one object; remove one.")
    return dict(zip(names, (value for _, value in pairs), strict=True))


def _trimmed(value: Any) -> Any:
    """Strip strings in JSON; names in objects already are."""
    if isinstance(value, dict):
        return {name: _trimmed(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_trimmed(inner) for inner in value]
    return trimmed(value) if isinstance(value, str) else value


def _from_one(numbers: Sequence[int | None], count: int) -> bool:
    """Whether all are positive and different and include 1 to ``count``."""
    return len(set(numbers)) == len(numbers) and {*range(1, count + 1)} <= {*numbers} and not {None, 0} & {*numbers}


def _number(user: str) -> int | None:
    """3 for user3, User_3, 3 or user3-seed1."""
    found = re.fullmatch(r"(?:user)?[\s_-]*([0-9]{1,9})(?:-seed[0-9]+)?", user.strip(), re.IGNORECASE)
    return int(found[1]) if found else None


def sample_preferences(
    extra: Mapping[str, Names], classes: Mapping[str, Names], num_users: int, count: int, images: int, seed: int
) -> Preferences:
    """Sample preferences among the classes that have enough extra images left.

    Args:
        extra: Extra images of each class.
        classes: Classes of each task.
        num_users: Number of users.
        count: Number of preferred classes of a task.
        images: Number of extra images of each preferred class.
        seed: Seed of the sampling.

    Raises:
        MisconfigurationException: If there are too few images for any preferences.
    """
    sampled: Preferences = [{} for _ in range(num_users)]
    for task, scenes in classes.items():
        room = {scene: len(extra[scene]) // images if images else num_users for scene in scenes}
        if not _possible(room, num_users, count):
            there = sum(min(times, num_users) for times in room.values())
            raise MisconfigurationException(
                f"Cannot sample preferences for {task!r}: {num_users} users × {count} preferred classes need "
                f"{num_users * count} shares of {images} extra images, different classes for each user, but the "
                f"{len(scenes)} classes have room for {there}, with "
                f"{', '.join(str(len(extra[scene])) for scene in scenes)} extra images. Reduce extra_images=, "
                "preferred_classes= or num_users=."
            )
        generator = torch.Generator().manual_seed(derive_seed(seed, "preferences", task))
        for user in range(num_users):
            for chosen in _choices(room, count, generator):
                left = {scene: times - (scene in chosen) for scene, times in room.items()}
                if _possible(left, num_users - user - 1, count):
                    sampled[user][task], room = chosen, left
                    break
    return sampled


def _possible(room: Mapping[str, int], users: int, count: int) -> bool:
    """Whether each user can get ``count`` different classes, by the Gale–Ryser theorem for equal demands."""
    return len(room) >= count and sum(min(times, users) for times in room.values()) >= users * count


def _choices(room: Mapping[str, int], count: int, generator: torch.Generator) -> Iterator[Names]:
    """Yield random choices of classes with room, and finally the roomiest, which suit the others if any choice does."""
    scenes = [scene for scene, times in room.items() if times]
    for _ in range(_TRIES):
        yield tuple(scenes[k] for k in torch.randperm(len(scenes), generator=generator)[:count].tolist())
    yield tuple(sorted(scenes, key=lambda scene: -room[scene])[:count])
