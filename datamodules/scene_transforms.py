"""Transforms of batches of scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resized_crop

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_AREAS = (0.08, 1.0)
_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Normalize uint8 images (n, 3, height, width) to floats; with ImageNet's statistics by default."""
    centre, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return images.float().div_(255).sub_(centre).div_(scale)


def random_crops(images: Tensor, seed: int) -> Tensor:
    """Random resized crops to the image's size, flipped horizontally with probability 0.5.

    Crops have 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3, as in the training of GoogLeNet (Szegedy et
    al., CVPR 2015) and in torchvision's ``RandomResizedCrop``.

    Args:
        images: (n, 3, height, width).
        seed: Seed of the crops and flips.
    """
    generator = torch.Generator().manual_seed(seed)
    found, (rows, columns) = torch.empty_like(images), images.shape[-2:]
    for number, image in enumerate(images):
        top, left, height, width = _random_box(rows, columns, generator)
        size = [rows, columns]
        part = resized_crop(image, top, left, height, width, size, InterpolationMode.BILINEAR, antialias=True)
        found[number] = part.flip(-1) if torch.rand((), generator=generator) < 0.5 else part
    return found


def _random_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop; the whole image if no sampled one fits."""
    for _ in range(_TRIES):
        area, ratio = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (_AREAS[0] + area * (_AREAS[1] - _AREAS[0]))
        ratio = _RATIOS[0] * (_RATIOS[1] / _RATIOS[0]) ** ratio
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return top, left, h, w
    return 0, 0, height, width
