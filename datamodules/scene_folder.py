"""What is in a folder of scenes in the layout of MIT Indoor Scenes, and to which task it belongs."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.datamodules.image_files import files_below, is_class_folder, is_image
from pl_personalize.functional.names import some
from pl_personalize.functional.spelling import hint, trimmed, written_otherwise

LISTS = ("TrainImages.txt", "TestImages.txt")
Names = tuple[str, ...]


class Pools(NamedTuple):
    """Names of images, ``class/file``, for each class: those of the two lists, and all others.

    Sorted; a file in a subfolder of a class is ``class/folder/file``, and comes after those that are in none.
    """

    train: Mapping[str, Names]
    test: Mapping[str, Names]
    extra: Mapping[str, Names]


def missing_parts(data_dir: Path) -> list[str]:
    """What of the layout is not there."""
    there = {"Images": (data_dir / "Images").is_dir()} | {name: (data_dir / name).is_file() for name in LISTS}
    return [part for part, found in there.items() if not found]


def read_pools(data_dir: Path) -> Pools:
    """List the images of ``data_dir``.

    Raises:
        MisconfigurationException: If something is missing, or a list names an image that is not there, or one twice.
    """
    if missing := missing_parts(data_dir):
        raise MisconfigurationException(
            f"The scenes were looked for in {data_dir.resolve()}, where there is no {' and no '.join(missing)}. Fetch "
            "MIT Indoor Scenes with download=True (2.4 GB), or put there yourself the folder Images/<class>/ and the "
            f"lists {' and '.join(LISTS)}, with a line <class>/<file> for each image; or set data_dir= to a folder "
            "that has them."
        )
    images = data_dir / "Images"
    try:
        folders = sorted(entry.name for entry in os.scandir(images) if is_class_folder(entry))
    except OSError as error:
        raise MisconfigurationException(f"The folder {images} cannot be read: {error}.") from error
    there = {folder: [f"{folder}/{name}" for name in files_below(images / folder)] for folder in folders}
    known = {name for names in there.values() for name in names}
    train, test = (_read_list(data_dir / name, known) for name in LISTS)
    if both := sorted(train & test):
        raise MisconfigurationException(
            f"{both[0]!r} is in both {LISTS[0]} and {LISTS[1]} ({len(both)} such images); remove it from one of them."
        )
    extra = {name for name in known - train - test if is_image(name)}
    return Pools(
        *({folder: tuple(n for n in names if n in pool) for folder, names in there.items()} for pool in
          (train, test, extra))
    )  # fmt: skip


def _read_list(path: Path, known: set[str]) -> set[str]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfigurationException(f"The list {path} cannot be read: {error}") from error
    lines = [name for name in map(trimmed, text.splitlines()) if name]
    if not lines:
        raise MisconfigurationException(f"The list {path} is empty; it needs a line <class>/<file> for each image.")
    if missing := [line for line in lines if line not in known]:
        raise MisconfigurationException(
            f"{path} names {missing[0]!r}, which is not in {path.parent / 'Images'}{hint(missing[0], known)} (of "
            f"{len(lines)} lines, {len(missing)}). Complete the images, or remove the lines."
        )
    if len(set(lines)) != len(lines):
        twice = next(line for k, line in enumerate(lines) if line in lines[:k])
        raise MisconfigurationException(f"{path} names {twice!r} twice; remove one of the lines.")
    return set(lines)


def read_supercategories(path: str | os.PathLike[str] | None) -> dict[str, str]:
    """The supercategory of each class, from a CSV file; by default that of MIT Indoor Scenes.

    Blanks around names, of any kind, do not count.

    Raises:
        MisconfigurationException: If the file is missing, or is not such a table.
    """
    packaged = files("pl_personalize.datamodules") / "data" / "mit_indoor_supercategories.csv"
    try:
        text = (packaged if path is None else Path(path).expanduser()).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfigurationException(f"The supercategories cannot be read from {path}: {error}") from error
    lines = [line for line in text.splitlines() if trimmed(line)]
    try:
        header, *rows = csv.reader(lines, skipinitialspace=True) if lines else [[]]
    except csv.Error as error:
        raise MisconfigurationException(f"{path} cannot be read as a CSV file: {error}.") from error
    columns = [trimmed(name) for name in header]
    table: dict[str, str] = {}
    for fields in rows:
        row = dict(zip(columns, map(trimmed, fields), strict=False))
        scene, supercategory = row.get("scene_class"), row.get("supercategory")
        if not scene or not supercategory or scene in table:
            raise MisconfigurationException(
                f"{path} must have the columns scene_class and supercategory, with each class once; got {row}."
            )
        table[scene] = supercategory
    if not table:
        raise MisconfigurationException(f"{path} has no classes; it needs lines scene_class,supercategory.")
    return table


def classes_of_tasks(table: Mapping[str, str], tasks: Sequence[str]) -> list[Names]:
    """The classes of each task, in alphabetical order.

    Raises:
        MisconfigurationException: If a task is no supercategory, is there twice, or there is none; or if a
            supercategory that is no task is one but for its case or blanks, so that its classes would be left out.
    """
    known = sorted(set(table.values()))
    if not tasks or len(set(tasks)) != len(tasks) or not set(tasks) <= set(known):
        meant = hint(next((str(task) for task in tasks if task not in known), ""), known)
        raise MisconfigurationException(
            f"tasks must be supercategories, each at most once: {', '.join(known)}; got {list(tasks)}{meant}."
        )
    for left_out in sorted(set(known) - set(tasks)):
        if (task := written_otherwise(left_out, tasks)) is not None:
            scenes = [scene for scene, of in table.items() if of == left_out]
            raise MisconfigurationException(
                f"The table of supercategories has {left_out!r} beside the task {task!r}, for {_the_classes(scenes)}. "
                "If they are the same, write both alike; if not, give one another name."
            )
    return [tuple(sorted(scene for scene, of in table.items() if of == task)) for task in tasks]


def check_classes(pools: Pools, table: Mapping[str, str], classes: Sequence[Names], images: Path) -> None:
    """See that folders and table agree, and each class of a task has images for the server.

    Raises:
        MisconfigurationException: If they do not.
    """
    if without := sorted(set(pools.train) - set(table)):
        raise MisconfigurationException(
            f"In {images}, {_the_classes(without)} have no supercategory{hint(without[0], table)}; name them in "
            "the table (supercategories=), or remove their folders."
        )
    if unknown := sorted(set(table) - set(pools.train)):
        raise MisconfigurationException(
            f"The table of supercategories names {_the_classes(unknown)}, for which there is no folder in "
            f"{images}{hint(unknown[0], pools.train)}; it must be the table of these images (supercategories=)."
        )
    if empty := [scene for scenes in classes for scene in scenes if not pools.train[scene]]:
        raise MisconfigurationException(f"{_the_classes(empty)} have no image in {LISTS[0]}; each class needs one.")


def _the_classes(names: Sequence[str]) -> str:
    return f"the class(es) {some(map(repr, names))}"
