"""What batches of scenes go through on their way to a network."""

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
    """uint8 (n, 3, height, width) as floats with the given mean and standard deviation subtracted and divided by."""
    centre, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return images.float().div_(255).sub_(centre).div_(scale)


def random_crops(images: Tensor, seed: int) -> Tensor:
    """A random part of each image, brought to the image's size, and every second one mirrored.

    The part has 8 to 100 % of the area and a ratio of sides of 3:4 to 4:3, as in the training of GoogLeNet (Szegedy et
    al., CVPR 2015) and in torchvision's ``RandomResizedCrop``.

    Args:
        images: (n, 3, height, width).
        seed: What is random depends on it.
    """
    generator = torch.Generator().manual_seed(seed)
    found, (rows, columns) = torch.empty_like(images), images.shape[-2:]
    for number, image in enumerate(images):
        top, left, height, width = _random_part(rows, columns, generator)
        size = [rows, columns]
        part = resized_crop(image, top, left, height, width, size, InterpolationMode.BILINEAR, antialias=True)
        found[number] = part.flip(-1) if torch.rand((), generator=generator) < 0.5 else part
    return found


def _random_part(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width; the whole image where none of some tries fits in it."""
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
