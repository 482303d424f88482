"""Image files of any size and kind, as squares of one size; and which files are images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2.functional import center_crop

_FORMATS = {
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    "JPEG 2000 and XL": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx", ".jxl"),
    "AVIF, HEIF, WebP": (".avif", ".avifs", ".heic", ".heif", ".webp"),
    "PNG, GIF, TIFF": (".apng", ".gif", ".png", ".tif", ".tiff"),
    "PNM": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
    "others": (".bmp", ".dib", ".pcx", ".qoi", ".sgi", ".tga"),
}
SUFFIXES = frozenset(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
"""Of image files, in lower case. Not all can be read by every Pillow; one that cannot is refused, never passed over."""
_SYSTEM_FOLDERS = {"#recycle", "$recycle.bin", "@eadir", "__macosx"}
"""Where systems keep thumbnails, companions and deleted files."""
_LONGEST = 8
"""How many times the shorter side the longer one is kept; beyond it no centre crop reaches."""


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name: it has the suffix of one, in any case, and is not hidden.

    Hidden are names that begin with a dot, such as the companions ``._x.png`` that macOS writes.

    Example:
        >>> [is_image(name) for name in ("a.png", "a.JPG", "._a.png", "Thumbs.db", ".DS_Store")]
        [True, True, False, False, False]
    """
    path = Path(name)
    return path.suffix.strip().lower() in SUFFIXES and not path.name.startswith(".")


def is_class_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder that may hold images: not hidden, and none of a system's own."""
    return entry.is_dir() and not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_FOLDERS


def files_below(folder: Path) -> list[str]:
    """The files of a folder and of its subfolders, by their paths below it with slashes.

    Folders come in sorted order, each with its own files, sorted, before its subfolders: as torchvision's
    ``ImageFolder`` has them. Links are followed, but into no folder that they are in.

    Raises:
        MisconfigurationException: If a folder cannot be read.
    """
    return list(_walk(folder, "", ()))


def _walk(folder: Path, prefix: str, within: tuple[Path, ...]) -> Iterator[str]:
    try:
        here = folder.resolve()
        if here in within:
            return
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise MisconfigurationException(f"The folder {folder} cannot be read: {error}.") from error
    yield from (prefix + entry.name for entry in entries if not entry.is_dir())
    for entry in entries:
        if is_class_folder(entry):
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", (*within, here))


def passed_over(names: Iterable[str]) -> str:
    """The suffixes of files that are no images, and those that are read: for messages about what is missing."""
    suffixes = Counter(Path(name).suffix.lower() or "no suffix" for name in names if not is_image(name))
    found = ", ".join(f"{count} with {suffix}" for suffix, count in sorted(suffixes.items()))
    return f"There are other files ({found}); images end in {', '.join(sorted(SUFFIXES))}." if found else ""


def read_rgb(path: Path) -> Image.Image:
    """An image file in RGB, whatever it is in; transparency and EXIF's orientation are ignored, as in ``ImageFolder``.

    Colours with 16 bits a channel are brought to eight, as Pillow does; of several frames or pages the first counts.

    Raises:
        MisconfigurationException: If it is missing or broken, of a format that Pillow cannot read here, or grey with
            more than 8 bits.
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
            f"{path} cannot be read as an image: it is broken, or of a format that this Pillow does not read. Replace "
            "it, convert it (to PNG, say), or remove it."
        ) from error
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
