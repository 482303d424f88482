"""Download of MIT Indoor Scenes."""

from __future__ import annotations

import os
import shutil
import socket
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision.datasets.utils import check_integrity, download_url
from tqdm.auto import tqdm

from pl_personalize.datamodules.image_files import is_image
from pl_personalize.datamodules.scene_folder import missing_parts

_TIMEOUT = 60.0  # seconds without a byte from the server


class SceneArchive(NamedTuple):
    """Source of a data set of scenes.

    Attributes:
        url: Address of a tar file with ``Images/<class>/<file>``.
        images: Smallest number of images in it.
        lists: Address and number of lines of each list, by its file name.
    """

    url: str
    images: int
    lists: Mapping[str, tuple[str, int]]


MIT_INDOOR = SceneArchive(
    url="http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar",
    images=15_620,
    lists={
        "TrainImages.txt": ("http://web.mit.edu/torralba/www/TrainImages.txt", 5360),
        "TestImages.txt": ("http://web.mit.edu/torralba/www/TestImages.txt", 1340),
    },
)


def fetch(archive: SceneArchive, data_dir: Path, md5: str | None = None) -> None:
    """Download the missing parts of a data set; each appears in the folder only when it is complete.

    The tar file is kept in the folder and used again, also if it was put there by hand; it may be deleted. Its expected
    checksum is ``md5``.
    """
    if not missing_parts(data_dir):
        return
    partial = data_dir / ".download"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".download.lock"):
            try:
                for part in missing_parts(data_dir):
                    shutil.rmtree(partial, ignore_errors=True)
                    if part == "Images":
                        _fetch_images(archive, data_dir, partial, md5)
                    else:
                        _fetch_list(*archive.lists[part], data_dir / part, partial)
                    os.replace(partial / part, data_dir / part)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise MisconfigurationException(f"The scenes cannot be written to {data_dir.resolve()}: {error}") from error


def _download(url: str, target: Path, partial: Path, md5: str | None = None) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torchvision sets none
    try:
        download_url(url, partial, target.name, md5)
    except Exception as error:  # torchvision does not document what it raises
        raise MisconfigurationException(
            f"Cannot download {url} ({error}). Download it by other means to {target.resolve()}."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _fetch_list(url: str, lines: int, target: Path, partial: Path) -> None:
    _download(url, target, partial)
    text = (partial / target.name).read_text("utf-8", errors="replace")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    missing = [name for name in names if not (target.parent / "Images" / name).is_file()]  # the last one may be cut off
    if len(names) != lines or missing:
        found = f"names {missing[0]!r}, which is not in Images" if missing else f"has {len(names)}"
        raise MisconfigurationException(
            f"{url} should have {lines} lines, each with the name of an image, but {found}. Download it by other means "
            f"to {target.resolve()}."
        )


def _fetch_images(archive: SceneArchive, data_dir: Path, partial: Path, md5: str | None) -> None:
    path = data_dir / archive.url.rpartition("/")[2]
    if not path.is_file():
        _download(archive.url, path, partial, md5)
        os.replace(partial / path.name, path)
    try:
        if md5 is not None and not check_integrity(path, md5):
            raise tarfile.TarError(f"does not have the MD5 checksum {md5}")
        with tarfile.open(path) as tar:
            tar.extractall(
                partial, tqdm(tar, f"Unpacking {path.name}", unit="file", delay=3, leave=False), filter="data"
            )
        if (images := sum(is_image(file.name) for file in (partial / "Images").glob("*/*"))) < archive.images:
            raise tarfile.TarError(f"has {images} images Images/<class>/<file>, not {archive.images}")
    except (tarfile.TarError, EOFError) as error:
        raise MisconfigurationException(
            f"{path.resolve()} cannot be used ({str(error).splitlines()[0]}). Delete it to download "
            f"it again, or unpack it yourself to {data_dir.resolve() / 'Images'}."
        ) from error
