"""Fetching MIT Indoor Scenes."""

from __future__ import annotations

import os
import shutil
import socket
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision.datasets.utils import check_integrity, download_url
from tqdm.auto import tqdm

from pl_personalize.datamodules.image_files import is_image
from pl_personalize.datamodules.scene_folder import missing_parts

_PARTIAL = ".download"
_SILENCE = 60.0  # seconds without a byte, after which a server is given up


class SceneArchive(NamedTuple):
    """Where a data set is to be had, and how much is in it.

    Attributes:
        url: Of a tar file with ``Images/<class>/<file>``.
        classes: Folders in it.
        images: Images in it, at least.
        lists: Name of each list, its address and the number of its lines.
    """

    url: str
    classes: int
    images: int
    lists: Mapping[str, tuple[str, int]]


MIT_INDOOR = SceneArchive(
    url="http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar",
    classes=67,
    images=15_620,
    lists={
        "TrainImages.txt": ("http://web.mit.edu/torralba/www/TrainImages.txt", 5360),
        "TestImages.txt": ("http://web.mit.edu/torralba/www/TestImages.txt", 1340),
    },
)


def fetch(archive: SceneArchive, data_dir: Path, md5: str | None = None) -> None:
    """Fetch what of a data set is missing in a folder. Each part appears there when it is complete and was checked.

    The tar file stays in the folder; it is used again, also if it was put there by hand, and may be deleted.

    Args:
        archive: The data set.
        data_dir: The folder.
        md5: Checksum that the tar file must have, if it is known.

    Raises:
        MisconfigurationException: If something cannot be fetched, or is not what it should be.
    """
    if not missing_parts(data_dir):
        return
    partial = data_dir / _PARTIAL
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / f"{_PARTIAL}.lock"):
            try:
                for part in missing_parts(data_dir):
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                    if part == "Images":
                        _fetch_images(archive, data_dir, partial, md5)
                    else:
                        _fetch_list(*archive.lists[part], data_dir / part, partial)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise MisconfigurationException(f"The scenes cannot be written to {data_dir.resolve()}: {error}") from error


def _download(url: str, folder: Path, name: str, md5: str | None = None) -> Path:
    try:
        with _timeout(_SILENCE):  # torchvision sets none
            download_url(url, folder, name, md5)
    except Exception as error:  # what torchvision's download raises is not documented
        raise MisconfigurationException(
            f"{url} cannot be fetched: {error}. Fetch it in another way, and put {name} into {folder.parent.resolve()}."
        ) from error
    return folder / name


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _fetch_list(url: str, lines: int, target: Path, partial: Path) -> None:
    path = _download(url, partial, target.name)
    names = [line.strip() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    missing = [name for name in names if not (target.parent / "Images" / name).is_file()]  # the last may be cut
    if len(names) != lines or missing:
        what = f"names {missing[0]!r}, of which there is no image" if missing else f"has {len(names)}"
        raise MisconfigurationException(
            f"{url} should have {lines} lines, each with an image, and {what}. Fetch it in another way, and put it at "
            f"{target}."
        )
    os.replace(path, target)


def _fetch_images(archive: SceneArchive, data_dir: Path, partial: Path, md5: str | None) -> None:
    name = archive.url.rpartition("/")[2]
    path, ours = data_dir / name, False
    if not path.is_file():
        os.replace(_download(archive.url, partial, name, md5), path)
        ours = True
    elif md5 is not None and not check_integrity(path, md5):
        raise MisconfigurationException(f"{path.resolve()} has not the MD5 {md5}; delete it, and it is fetched again.")
    try:
        _unpack(archive, path, partial)
    except MisconfigurationException as error:
        if ours:
            path.unlink()
        what = "It was deleted" if ours else "Delete it"
        raise MisconfigurationException(
            f"{error} {what}; the next call fetches it again. Or unpack it yourself, so that there is "
            f"{data_dir.resolve() / 'Images'}."
        ) from error
    os.replace(partial / "Images", data_dir / "Images")


def _unpack(archive: SceneArchive, path: Path, folder: Path) -> None:
    """Unpack a tar file, whose members must stay in the folder, and count what is in it."""
    if not hasattr(tarfile, "data_filter"):
        raise MisconfigurationException("This release of Python cannot unpack safely; it needs 3.11.4 or later.")
    try:
        with tarfile.open(path) as tar, tqdm(desc=f"Unpacking {path.name}", unit="file", delay=3, leave=False) as bar:
            for member in tar:
                tar.extract(member, folder, filter="data")
                bar.update()
    except (tarfile.TarError, EOFError) as error:
        reason = str(error).partition("\n")[0].rstrip(":. ")
        raise MisconfigurationException(f"{path.resolve()} cannot be unpacked: {reason}.") from error
    folders = [entry for entry in (folder / "Images").glob("*") if entry.is_dir()]
    images = sum(1 for entry in folders for file in entry.iterdir() if is_image(file.name))
    if len(folders) < archive.classes or images < archive.images:
        raise MisconfigurationException(
            f"{path.resolve()} should have {archive.images} images in {archive.classes} folders Images/<class>, and "
            f"has {images} in {len(folders)}."
        )
