"""Which classes each user prefers."""

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
"""For each user and task the preferred classes."""

_TRIES = 100


def read_preferences(
    path: str | os.PathLike[str] | None, classes: Mapping[str, Names], num_users: int, count: int
) -> Preferences:
    """Preferences from a JSON file ``{user: {task: [class, …]}}``; by default the paper's.

    Users are ``user1`` or ``1`` and so on, in any order; or all have names without such a number and count in the
    order of the file. Blanks around names, of any kind, do not count.

    Args:
        path: The file.
        classes: The classes of each task.
        num_users: How many users there are.
        count: How many classes of a task each prefers.

    Raises:
        MisconfigurationException: If the file is missing, or does not say that of these users, tasks and classes.
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
    way_out = "Give a file that does, or a number (preferences=1): then they are sampled with that seed."
    if len(found) < num_users:
        raise MisconfigurationException(f"{name}: {len(found)} user(s), but num_users={num_users}. {way_out}")
    home = {scene: task for task, scenes in classes.items() for scene in scenes}
    numbers = {user: _number(user) for user in found}
    numbered = any(number is not None for number in numbers.values())
    if numbered and not _from_one(list(numbers.values()), num_users):
        raise MisconfigurationException(
            f"{name} must call its users user1, user2 and so on, or all by names without such a number, which then "
            f"count in their order; got {', '.join(found)}."
        )
    order = sorted(found, key=lambda user: numbers[user] or 0) if numbered else list(found)
    users = {user: found[user] for user in order[:num_users]}
    for user, tasks in users.items():
        for task in classes:
            chosen = tasks.get(task, [])
            problem = None
            if not isinstance(chosen, list) or len(chosen) != count or len(set(map(str, chosen))) != count:
                elsewhere = written_otherwise(task, tasks) if task not in tasks else None
                written = "" if elsewhere is None else f"; it has {elsewhere!r}, which is written otherwise"
                problem = f"{chosen!r}, not {count} different classes (preferred_classes={count}){written}"
            elif wrong := [scene for scene in chosen if home.get(str(scene)) != task]:
                nowhere = f"is in no task{hint(str(wrong[0]), home)}"
                other = f"belongs to {home[wrong[0]]!r}" if str(wrong[0]) in home else nowhere
                problem = f"{wrong[0]!r}, which {other}"
            if problem is not None:
                raise MisconfigurationException(f"{name}: user {user!r} prefers in {task!r} {problem}. {way_out}")
    return [{task: tuple(tasks[task]) for task in classes} for tasks in users.values()]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names, without blanks around them, are there once: of two, Python would take the last."""
    names = [trimmed(name) for name, _ in pairs]
    if twice := [name for k, name in enumerate(names) if name in names[:k]]:
        raise ValueError(f"{twice[0]!r} is there twice in one object; leave one out.")
    return dict(zip(names, (value for _, value in pairs), strict=True))


def _trimmed(value: Any) -> Any:
    """JSON without blanks around texts; names in objects are without them already."""
    if isinstance(value, dict):
        return {name: _trimmed(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_trimmed(inner) for inner in value]
    return trimmed(value) if isinstance(value, str) else value


def _from_one(numbers: Sequence[int | None], count: int) -> bool:
    """Whether all are positive and different, and the first ``count`` are among them."""
    return len(set(numbers)) == len(numbers) and {*range(1, count + 1)} <= {*numbers} and not {None, 0} & {*numbers}


def _number(user: str) -> int | None:
    """3 for user3, User_3, 3 or user3-seed1."""
    found = re.fullmatch(r"(?:user)?[\s_-]*([0-9]{1,9})(?:-seed[0-9]+)?", user.strip(), re.IGNORECASE)
    return int(found[1]) if found else None


def sample_preferences(
    extra: Mapping[str, Names], classes: Mapping[str, Names], num_users: int, count: int, images: int, seed: int
) -> Preferences:
    """Preferences at random, among the classes that have enough extra images left.

    Args:
        extra: The extra images of each class.
        classes: The classes of each task.
        num_users: How many users there are.
        count: How many classes of a task each prefers.
        images: Extra images that a user gets of each.
        seed: Seed of the sampling.

    Raises:
        MisconfigurationException: If there are not enough images for any preferences.
    """
    sampled: Preferences = [{} for _ in range(num_users)]
    for task, scenes in classes.items():
        room = {scene: len(extra[scene]) // images if images else num_users for scene in scenes}
        if not _possible(room, num_users, count):
            there = sum(min(times, num_users) for times in room.values())
            raise MisconfigurationException(
                f"No preferences can be sampled for {task!r}: {num_users} users × {count} preferred classes are "
                f"{num_users * count} shares of {images} extra images, each user's of different classes, and the "
                f"{len(scenes)} classes have room for {there}: they have "
                f"{', '.join(str(len(extra[scene])) for scene in scenes)} extra images. Ask for fewer with "
                "extra_images=, preferred_classes= or num_users=."
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
    """Whether each user can have ``count`` different classes: the theorem of Gale and Ryser for equal demands."""
    return len(room) >= count and sum(min(times, users) for times in room.values()) >= users * count


def _choices(room: Mapping[str, int], count: int, generator: torch.Generator) -> Iterator[Names]:
    """Random choices of classes that have room; at last the roomiest, which leave enough to the others if any do."""
    scenes = [scene for scene, times in room.items() if times]
    for _ in range(_TRIES):
        yield tuple(scenes[k] for k in torch.randperm(len(scenes), generator=generator)[:count].tolist())
    yield tuple(sorted(scenes, key=lambda scene: -room[scene])[:count])
