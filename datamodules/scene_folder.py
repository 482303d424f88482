"""Contents of a folder of scenes in the layout of MIT Indoor Scenes, and their tasks."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.datamodules.image_files import files_below, is_image
from pl_personalize.functional.names import some
from pl_personalize.functional.spelling import hint, trimmed, written_otherwise

LISTS = ("TrainImages.txt", "TestImages.txt")
Names = tuple[str, ...]


class Pools(NamedTuple):
    """Names of the images of each class: those in the two lists, and all others.

    Names are ``class/file``, sorted; those in subfolders, ``class/folder/file``, come after the others.
    """

    train: Mapping[str, Names]
    test: Mapping[str, Names]
    extra: Mapping[str, Names]


def missing_parts(data_dir: Path) -> list[str]:
    """List the missing parts of the layout."""
    there = {"Images": (data_dir / "Images").is_dir()} | {name: (data_dir / name).is_file() for name in LISTS}
    return [part for part, found in there.items() if not found]


def read_pools(data_dir: Path) -> Pools:
    """List the images of ``data_dir``."""
    if missing := missing_parts(data_dir):
        raise MisconfigurationException(
            f"No {' and no '.join(missing)} found in data_dir={str(data_dir.resolve())!r}. Download MIT Indoor Scenes "
            "with download=True (2.4 GB), or provide the folder Images/<class>/ and the lists "
            f"{' and '.join(LISTS)} with a line <class>/<file> for each image."
        )
    there: dict[str, list[str]] = {}
    for name in files_below(data_dir / "Images"):
        folder, slash, _ = name.partition("/")
        if slash:
            there.setdefault(folder, []).append(name)
    known = {name for names in there.values() for name in names}
    train, test = (_read_list(data_dir / name, known) for name in LISTS)
    if both := sorted(train & test):
        raise MisconfigurationException(
            f"{both[0]!r} is in both {LISTS[0]} and {LISTS[1]} ({len(both)} such images); remove it from one of them."
        )
    pools = train, test, {name for name in known - train - test if is_image(name)}
    return Pools(*({scene: tuple(n for n in names if n in pool) for scene, names in there.items()} for pool in pools))


def _read_list(path: Path, known: set[str]) -> set[str]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfigurationException(f"The list {path} cannot be read: {error}") from error
    lines = [name for name in map(trimmed, text.splitlines()) if name]
    if not lines:
        raise MisconfigurationException(f"The list {path} is empty; add a line <class>/<file> for each image.")
    if missing := [line for line in lines if line not in known]:
        raise MisconfigurationException(
            f"{path} names {missing[0]!r}, which is not in {path.parent / 'Images'}{hint(missing[0], known)} "
            f"({len(missing)} of {len(lines)} lines). Add the images or remove the lines."
        )
    if len(set(lines)) != len(lines):
        twice = next(line for k, line in enumerate(lines) if line in lines[:k])
        raise MisconfigurationException(f"{path} names {twice!r} twice; remove one of the lines.")
    return set(lines)


def read_supercategories(path: str | os.PathLike[str] | None) -> dict[str, str]:
    """Read the supercategory of each class from a CSV file; by default that of MIT Indoor Scenes.

    Blanks around names are ignored.
    """
    packaged = files("pl_personalize.datamodules") / "data" / "mit_indoor_supercategories.csv"
    try:
        text = (packaged if path is None else Path(path).expanduser()).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfigurationException(f"The supercategories cannot be read from {path}: {error}") from error
    table: dict[str, str] = {}
    try:
        header, *rows = [*csv.reader(filter(trimmed, text.splitlines()), skipinitialspace=True)] or [[]]
    except csv.Error as error:
        raise MisconfigurationException(f"{path} cannot be read as a CSV file: {error}.") from error
    for fields in rows:
        row = dict(zip(map(trimmed, header), map(trimmed, fields), strict=False))
        scene, supercategory = row.get("scene_class"), row.get("supercategory")
        if not scene or not supercategory or scene in table:
            raise MisconfigurationException(
                f"{path} must have the columns scene_class and supercategory, with each class once; got {row}."
            )
        table[scene] = supercategory
    if not table:
        raise MisconfigurationException(f"{path} has no classes; add lines scene_class,supercategory.")
    return table


def classes_of_tasks(table: Mapping[str, str], tasks: Sequence[str]) -> list[Names]:
    """Classes of each task, in alphabetical order."""
    known = sorted(set(table.values()))
    if not tasks or len(set(tasks)) != len(tasks) or not set(tasks) <= set(known):
        meant = hint(next((str(task) for task in tasks if task not in known), ""), known)
        raise MisconfigurationException(
            f"tasks must be different supercategories out of {', '.join(known)}; got {list(tasks)}{meant}."
        )
    for left_out in sorted(set(known) - set(tasks)):
        if (task := written_otherwise(left_out, tasks)) is not None:
            scenes = [scene for scene, of in table.items() if of == left_out]
            raise MisconfigurationException(
                f"The table of supercategories has {left_out!r} beside the task {task!r}, for {_the_classes(scenes)}. "
                "Spell both alike if they are the same, or rename one."
            )
    return [tuple(sorted(scene for scene, of in table.items() if of == task)) for task in tasks]


def check_classes(pools: Pools, table: Mapping[str, str], classes: Sequence[Names], images: Path) -> None:
    """Check that the folders match the table and that each class of a task has images for the server."""
    if without := sorted(set(pools.train) - set(table)):
        raise MisconfigurationException(
            f"In {images}, {_the_classes(without)} have no supercategory{hint(without[0], table)}; add them to "
            "the table (supercategories=) or remove their folders."
        )
    if unknown := sorted(set(table) - set(pools.train)):
        raise MisconfigurationException(
            f"The table of supercategories names {_the_classes(unknown)}, for which there is no folder in "
            f"{images}{hint(unknown[0], pools.train)}; pass the table of these images (supercategories=)."
        )
    if empty := [scene for scenes in classes for scene in scenes if not pools.train[scene]]:
        raise MisconfigurationException(f"{_the_classes(empty)} have no image in {LISTS[0]}; each class needs one.")


def _the_classes(names: Sequence[str]) -> str:
    return f"the class(es) {some(map(repr, names))}"
