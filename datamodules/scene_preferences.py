"""Preferred classes of users."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
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


def read_preferences(
    path: str | os.PathLike[str] | None, classes: Mapping[str, Names], num_users: int, count: int
) -> Preferences:
    """Read preferences from a JSON file ``{user: {task: [class, …]}}``; by default the paper's.

    Users are named ``user1`` or ``1`` and so on, in any order; or none is, and they count in the order of the file.
    Blanks around names are ignored.
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
    named = {user: re.fullmatch(r"(?:user)?[\s_-]*([0-9]{1,9})(?:-seed[0-9]+)?", user, re.IGNORECASE) for user in found}
    numbers = {user: int(match[1]) if match else 0 for user, match in named.items()}
    wrong = 0 in numbers.values() or len(set(numbers.values())) != len(found)
    if any(named.values()) and (wrong or not {*range(1, num_users + 1)} <= {*numbers.values()}):
        raise MisconfigurationException(
            f"{name} must name its users user1, user2 and so on, or all without such numbers (they then count in "
            f"the order of the file); got {', '.join(found)}."
        )
    users = sorted(found, key=lambda user: numbers[user])[:num_users]
    for user, tasks in ((user, found[user]) for user in users):
        for task in classes:
            chosen = tasks.get(task, [])
            problem = None
            if not isinstance(chosen, list) or len(chosen) != count or len(set(map(str, chosen))) != count:
                other = written_otherwise(task, tasks) if task not in tasks else None
                written = "" if other is None else f"; it has {other!r}, which is spelled differently"
                problem = f"{chosen!r}, not {count} different classes (preferred_classes={count}){written}"
            elif elsewhere := [scene for scene in chosen if home.get(str(scene)) != task]:
                scene = str(elsewhere[0])
                other = f"belongs to {home[scene]!r}" if scene in home else f"is in no task{hint(scene, home)}"
                problem = f"{elsewhere[0]!r}, which {other}"
            if problem is not None:
                raise MisconfigurationException(f"{name}: user {user!r} prefers in {task!r} {problem}. {remedy}")
    return [{task: tuple(tasks[task]) for task in classes} for tasks in (found[user] for user in users)]


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


def sample_preferences(
    extra: Mapping[str, Names], classes: Mapping[str, Names], num_users: int, count: int, images: int, seed: int
) -> Preferences:
    """Sample ``count`` preferred classes of each task among those that have ``images`` extra images left."""
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
    for _ in range(100):
        yield tuple(scenes[k] for k in torch.randperm(len(scenes), generator=generator)[:count].tolist())
    yield tuple(sorted(scenes, key=lambda scene: -room[scene])[:count])
