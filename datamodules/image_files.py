"""Search for image files, and decoding to squares of one size."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2.functional import center_crop, resize

_NAMES = """
    apng avif avifs bmp dib gif heic heif j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx jxl mpo
    pbm pcx pfm pgm png pnm ppm qoi sgi tga tif tiff webp
"""
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
"""Suffixes of image files, in lower case. A file that the installed Pillow cannot read is refused, never skipped."""
_SYSTEM_FOLDERS = {"#recycle", "$recycle.bin", "@eadir", "__macosx"}
"""Folders of thumbnails, metadata and deleted files."""
_LONGEST = 8
"""Largest aspect ratio kept; a center crop reaches no further."""


def is_image(name: str) -> bool:
    """Whether a file has the suffix of an image, in any case, and is not hidden (its name does not start with a dot).

    Example:
        >>> [is_image(name) for name in ("a.png", "a.JPG", "._a.png", "Thumbs.db", ".DS_Store")]
        [True, True, False, False, False]
    """
    path = Path(name)
    return path.suffix.strip().lower() in SUFFIXES and not path.name.startswith(".")


def files_below(folder: Path) -> list[str]:
    """List the files of a folder and its subfolders, as relative paths with slashes.

    The order is that of torchvision's ``ImageFolder``: folders sorted, each with its files, sorted, before its
    subfolders. Hidden folders and system folders are skipped. Links are followed, except into a folder that contains
    them.
    """

    def refuse(error: OSError) -> None:
        raise MisconfigurationException(f"The folder {error.filename} cannot be read: {error}.") from error

    found: list[str] = []
    for name, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(name)
        above = {place.resolve() for place in (here, *here.parents)}
        folders[:] = sorted(
            sub
            for sub in folders
            if not sub.startswith(".") and sub.lower() not in _SYSTEM_FOLDERS and (here / sub).resolve() not in above
        )
        prefix = "" if here == folder else f"{here.relative_to(folder).as_posix()}/"
        found += (prefix + file for file in sorted(files))
    return found


def passed_over(names: Iterable[str]) -> str:
    """Sentence on the suffixes of files that are not images, for messages about missing images; possibly empty."""
    suffixes = Counter(Path(name).suffix.lower() or "no suffix" for name in names if not is_image(name))
    found = ", ".join(f"{count} with {suffix}" for suffix, count in sorted(suffixes.items()))
    return f"There are other files ({found}); images end in {', '.join(sorted(SUFFIXES))}." if found else ""


def read_rgb(path: Path) -> Image.Image:
    """Read an image file as RGB, ignoring transparency and EXIF orientation as ``ImageFolder`` does.

    Colors with 16 bits per channel are reduced to 8; of several frames or pages the first is read.
    """
    try:
        with Image.open(path) as opened:
            deep = opened.mode.startswith(("I", "F"))  # Pillow would clip its values at 255
            if opened.mode == "P" and "transparency" in opened.info:
                image = opened.convert("RGBA").convert("RGB")
            else:
                image = opened.convert("RGB")
    except UnidentifiedImageError as error:
        raise MisconfigurationException(
            f"{path} cannot be read as an image: it is broken or of a format that this Pillow does not support. "
            "Replace, convert (for example to PNG) or remove it."
        ) from error
    except Exception as error:  # Pillow's readers raise anything for a broken file
        raise MisconfigurationException(f"{path} cannot be read as an image: {error}") from error
    if deep:
        raise MisconfigurationException(f"{path} is grayscale with more than 8 bits; convert it to 8 bits.")
    return image


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size``, bilinear with antialiasing; very long images are cut at both ends."""
    kept = _LONGEST * min(image.size)
    if max(image.size) > kept:
        image = center_crop(image, [min(image.height, kept), min(image.width, kept)])
    resized: Image.Image = resize(image, [size])
    return resized


def center_square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Center crop, (size, size, 3); smaller images are padded with black."""
    return np.asarray(center_crop(image, [size, size]))
