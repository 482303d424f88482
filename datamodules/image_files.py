"""Image files of any size and kind, as squares of one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import center_crop

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_LONGEST = 8
"""How many times the shorter side the longer one is kept; beyond it no centre crop reaches."""


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    path = Path(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_rgb(path: Path) -> Image.Image:
    """An image file in RGB, whatever it is in; transparency and EXIF's orientation are ignored.

    Of colours with 16 bits a channel it takes the upper eight.

    Raises:
        MisconfigurationException: If it is missing or broken, or grey with more than 8 bits.
    """
    try:
        with Image.open(path) as opened:
            deep = opened.mode.startswith(("I", "F"))  # Pillow would clip its values at 255
            if opened.mode == "P" and "transparency" in opened.info:
                image = opened.convert("RGBA").convert("RGB")
            else:
                image = opened.convert("RGB")
    except Exception as error:  # Pillow's readers raise what they like at a broken file
        raise MisconfigurationException(f"{path} cannot be read as an image: {error}") from error
    if deep:
        raise MisconfigurationException(f"{path} is grey with more than 8 bits; convert it to 8.")
    return image


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Bring the shorter side to ``size``, bilinear with antialiasing; the ends of a very long image are cut off."""
    short, long = sorted(image.size)
    kept = min(long, _LONGEST * short)
    start = (long - kept) // 2
    target = max(size, size * kept // short)
    if image.width <= image.height:
        box, shape = (0, start, short, start + kept), (size, target)
    else:
        box, shape = (start, 0, start + kept, short), (target, size)
    return image.resize(shape, Image.Resampling.BILINEAR, box=box)


def crop_centre(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The square in the middle, (size, size, 3); black where a smaller image has nothing."""
    return np.asarray(center_crop(image, [size, size]))
