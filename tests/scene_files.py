"""Small scenes in the layout of MIT Indoor Scenes: each image has a colour of its own, which tells which it is."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pl_personalize.datamodules import CameraPriorDataModule, CatPriorDataModule, TransPriorDataModule
from pl_personalize.datamodules.scenes import MEAN, STD

TABLE = {
    "attic": "home", "bath": "home", "cellar": "home",
    "bar": "leisure", "gym": "leisure", "rink": "leisure",
    "church": "public", "subway": "public", "tram": "public",
    "bakery": "store", "deli": "store", "mall": "store",
    "lab": "work", "office": "work",
}  # fmt: skip
COUNTS = {"train": 10, "test": 7, "extra": 9}
SIZES = [(12, 12), (20, 14), (13, 31), (40, 16)]
SIZE = 8


def colour_of(number: int) -> tuple[int, int, int]:
    return (number % 200, 40 + number // 200, 7)


def write_scenes(
    folder: Path, table: Mapping[str, str] = TABLE, counts: Mapping[str, int] = COUNTS, textured: bool = False
) -> Path:
    """Write a data set; ``textured`` images are random, and no colour tells which is which."""
    lists: dict[str, list[str]] = {"train": [], "test": [], "extra": []}
    number, generator = 0, torch.Generator().manual_seed(0)
    for scene in sorted(table):
        (folder / "Images" / scene).mkdir(parents=True)
        for split, count in counts.items():
            for k in range(count):
                name = f"{scene}/{count - 1 - k:02}_{split}.png"
                width, height = SIZES[number % len(SIZES)]
                image = Image.new("RGB", (width, height), colour_of(number))
                if textured:
                    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
                    image = Image.fromarray(pixels.numpy())
                image.save(folder / "Images" / name)
                lists[split].append(name)
                number += 1
    (folder / "TrainImages.txt").write_text("".join(f"{name}\r\n" for name in lists["train"]))
    (folder / "TestImages.txt").write_text("\n".join(lists["test"]))
    write_table(folder / "supercategories.csv", table)
    return folder


def write_table(path: Path, table: Mapping[str, str]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("scene_class", "supercategory"), *table.items()])
    return path


def names_by_colour(folder: Path) -> dict[tuple[int, int, int], str]:
    """The name of the image that has a colour."""
    paths = sorted((folder / "Images").glob("*/*.png"))
    return {Image.open(path).getpixel((0, 0)): f"{path.parent.name}/{path.name}" for path in paths}  # type: ignore[misc]


def names_of(images: Tensor, names: Mapping[tuple[int, int, int], str]) -> list[str]:
    """Which images these are, normalized or not; each must have one colour."""
    if images.dtype != torch.uint8:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        values = (images * std + mean) * 255
        assert float((values - values.round()).abs().max()) < 1e-3
        images = values.round().to(torch.uint8)
    assert bool((images == images[:, :, :1, :1]).all())
    return [names[tuple(image[:, 0, 0].tolist())] for image in images]  # type: ignore[index]


def catprior(folder: Path, **options: Any) -> CatPriorDataModule:
    """CatPrior for three profiles who prefer two classes of each task."""
    return CatPriorDataModule(folder, **_catprior_options(folder) | options)


def cameraprior(folder: Path, **options: Any) -> CameraPriorDataModule:
    """The same through two cameras, whose distortions do without OpenCV."""
    fixed = _catprior_options(folder) | {"cameras": ["jpeg", "saturation"]}
    return CameraPriorDataModule(folder, **fixed | options)


def _catprior_options(folder: Path) -> dict[str, Any]:
    return {
        "supercategories": folder / "supercategories.csv", "image_size": SIZE, "num_users": 3,
        "preferred_classes": 2, "extra_images": 3, "preferences": 1, "batch_size": 4, "eval_batch_size": 5,
    }  # fmt: skip


def transprior(folder: Path, **options: Any) -> TransPriorDataModule:
    """TransPrior for three profiles."""
    fixed: dict[str, Any] = {
        "supercategories": folder / "supercategories.csv", "image_size": SIZE, "num_users": 3, "extra_images": 11,
        "batch_size": 4, "eval_batch_size": 5,
    }  # fmt: skip
    return TransPriorDataModule(folder, **fixed | options)
