"""Numbers: five tasks of two digits from several collections, each of which is also one user."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torchvision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, pil_to_tensor, resize
from typing_extensions import override

from pl_personalize.datamodules.base import TaskIncrementalDataModule
from pl_personalize.datamodules.image_files import files_below, is_image, passed_over, read_rgb
from pl_personalize.datamodules.labelled_images import LabelledImages, concatenate, permutation, random_split
from pl_personalize.functional.spelling import hint, written_otherwise

IMAGE_SHAPE = (3, 28, 28)
_COLLECTIONS = {
    "mnist": [
        f"MNIST/raw/{part}-ubyte"
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ],
    "svhn": ["SVHN/train_32x32.mat", "SVHN/test_32x32.mat"],
    "usps": ["USPS/usps.bz2", "USPS/usps.t.bz2"],
}
"""Files of the named collections."""
_Raw = tuple[Tensor, Tensor]  # uint8 (n, 1 or 3, height, width), and digits (n,)


class NumbersDataModule(TaskIncrementalDataModule):
    """The Numbers benchmark of De Lange et al., CVPR 2020: tasks {0, 1}, {2, 3}, …, {8, 9}; each source is one user.

    For each task and source, the server has at most ``max_per_source`` random training images, 80 % of them for
    training. A user has the test images of one source, halved into adapt and eval. Images are 3×28×28 floats. MNIST is
    normalized with mean 0.1307 and std 0.3081; every other source is resized to RGB 32×32 (bilinear), center-cropped to
    28×28, and normalized with mean and std 0.5.

    Args:
        data_dir: Folder of the named collections.
        sources: ``"svhn"``, ``"mnist"``, ``"usps"``, or the path of a folder with ``{train,test}/<digit>/*`` images,
            whose user is named after the folder. All files with the suffix of an image that are not hidden are read,
            including those in subfolders.
        download: Whether to download missing collections.
        max_per_source: Largest number of images on the server per task and source; ``None`` for all.
        split_seed: Seed of the choice and the division of the images; ``"seed"``: the same as ``seed``, so that each
            seed of an experiment has its own images.
        **options: Further arguments of :class:`TaskIncrementalDataModule`.

    Raises:
        MisconfigurationException: If a source is unknown or missing.
    """

    image_shape = IMAGE_SHAPE

    def __init__(
        self,
        data_dir: str | os.PathLike[str] = "data",
        sources: Sequence[str] = ("svhn", "mnist"),
        *,
        download: bool = False,
        max_per_source: int | None = 10_000,
        split_seed: int | Literal["seed"] = 27,
        **options: Any,
    ) -> None:
        names = [source if source in _COLLECTIONS else Path(source).name for source in sources]
        if not names or len(set(names)) != len(names):
            raise MisconfigurationException(f"sources must be one or more with different names; got {list(sources)}.")
        if max_per_source is not None and max_per_source < 1:
            raise MisconfigurationException(f"max_per_source must be positive or None; got {max_per_source}.")
        pairs = [(str(digit), str(digit + 1)) for digit in range(0, 10, 2)]
        super().__init__(tasks=["-".join(pair) for pair in pairs], classes=pairs, users=names, **options)
        self.data_dir, self.sources, self.download = Path(data_dir).expanduser(), tuple(sources), download
        self.max_per_source, self.split_seed = max_per_source, split_seed
        self._raw: dict[tuple[str, bool], _Raw] = {}

    @override
    def decisive_options(self) -> dict[str, Any]:
        return super().decisive_options() | {
            "data_dir": str(self.data_dir.resolve()),
            "sources": list(self.sources),
            "max_per_source": self.max_per_source,
            "split_seed": self.split_seed,
        }

    @property
    def _division(self) -> int:
        return self.seed if self.split_seed == "seed" else self.split_seed

    @override
    def view(self, *, task: int | str | None = None, user: int | str | None = None, seed: int | None = None) -> Self:
        """See :meth:`TaskIncrementalDataModule.view`; with ``split_seed="seed"``, another seed splits anew."""
        other = super().view(task=task, user=user, seed=seed)
        if self.split_seed == "seed" and other.seed != self.seed:
            other._server, other._user = {}, {}
        return other

    @override
    def prepare_data(self) -> None:
        """Download missing collections if ``download`` is set, and check that all sources are there.

        Raises:
            MisconfigurationException: If a source is missing or cannot be downloaded.
        """
        for source in self.sources:
            if source in _COLLECTIONS and self.download:
                for train in (True, False):
                    self._read(source, train)
            else:
                self._check(source)

    @override
    def load_server(self, task: int) -> tuple[LabelledImages, LabelledImages]:
        """Load the training images of all sources, 80 % for training."""
        parts: list[LabelledImages] = []
        for source, name in zip(self.sources, self.users, strict=True):
            images, labels = self._of_task(source, True, task)
            order = permutation(len(labels), self._division, name, task)[: self.max_per_source]
            parts.append(LabelledImages(_normalize(images[order], source), labels[order]))
        return random_split(concatenate(parts), 0.8, self._division, "server", task)

    @override
    def load_user(self, user: int, task: int) -> tuple[LabelledImages, LabelledImages]:
        """Load the test images of the user's source, halved."""
        images, labels = self._of_task(self.sources[user], False, task)
        found = LabelledImages(_normalize(images, self.sources[user]), labels)
        evaluation, adapt = random_split(found, 0.5, self._division, "user", self.users[user], task)
        return adapt, evaluation

    def _of_task(self, source: str, train: bool, task: int) -> _Raw:
        """Images of a task as stored, and their labels in it."""
        key = source, train
        if key not in self._raw:
            self._raw[key] = self._read(source, train)
        images, digits = self._raw[key]
        lowest = int(self.classes[task][0])
        chosen = (digits == lowest) | (digits == lowest + 1)
        return images[chosen], digits[chosen].long() - lowest

    def _check(self, source: str) -> None:
        if source not in _COLLECTIONS:
            _check_folder(Path(source))
        elif missing := [file for file in _COLLECTIONS[source] if not (self.data_dir / file).is_file()]:
            raise MisconfigurationException(
                f"The data set {source!r} is not in {self.data_dir.resolve()}: there is no "
                f"{' and no '.join(missing)}. Download it with download=True (--download true on the command line), or "
                "put these files, as torchvision names them, there."
            )

    def _read(self, source: str, train: bool) -> _Raw:
        if source not in _COLLECTIONS or not self.download:
            self._check(source)
        if source not in _COLLECTIONS:
            return _read_folder(Path(source) / ("train" if train else "test"))
        try:
            return _read_collection(source, self.data_dir, train, self.download)
        except Exception as error:  # torchvision does not document what its readers and downloads raise
            raise MisconfigurationException(
                f"Cannot {'download or read' if self.download else 'read'} the data set {source!r} in "
                f"{self.data_dir.resolve()}: {type(error).__name__}: {error}"
            ) from error


def _normalize(images: Tensor, source: str) -> Tensor:
    if source == "mnist":
        return images.float().div_(255).sub_(0.1307).div_(0.3081).expand(-1, 3, -1, -1)
    if images.shape[-2:] != (32, 32):
        images = resize(images, [32, 32], InterpolationMode.BILINEAR, antialias=True)
    cropped: Tensor = center_crop(images, list(IMAGE_SHAPE[1:]))
    return cropped.float().div_(255).sub_(0.5).div_(0.5).expand(-1, 3, -1, -1)


def _read_folder(folder: Path) -> _Raw:
    """Read ``<digit>/*`` as RGB 32×32, in the order of :func:`files_below`."""
    _refuse_misnamed(folder)
    there = [files_below(folder / str(digit)) if (folder / str(digit)).is_dir() else [] for digit in range(10)]
    files = [[name for name in names if is_image(name)] for names in there]
    empty = [digit for digit, names in enumerate(files) if not names]
    if len(empty) == 10:
        raise MisconfigurationException(
            f"No images found in {folder.resolve()}; expected folders 0 to 9 with images. A source is a folder with "
            f"train/<digit>/* and test/<digit>/*, or one of {', '.join(_COLLECTIONS)}. "
            f"{passed_over(chain.from_iterable(there))}"
        )
    if empty:
        others = passed_over(name for digit in empty for name in there[digit])
        raise MisconfigurationException(f"{folder.resolve()} has no images of the digits {empty}. {others}")
    images, size = [], (32, 32)
    for digit, names in enumerate(files):
        for name in names:
            image = read_rgb(folder / str(digit) / name)
            image = image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
            images.append(pil_to_tensor(image))
    return torch.stack(images), torch.tensor([digit for digit, names in enumerate(files) for _ in names])


def _refuse_misnamed(folder: Path) -> None:
    """Refuse folders named after a digit in another way, such as ``03``, whose images would be left out."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        digit = str(int(entry.name)) if entry.name.strip().isdecimal() else entry.name
        if entry.is_dir() and digit != entry.name and 0 <= int(digit) <= 9:
            raise MisconfigurationException(
                f"{folder.resolve()} has a folder {entry.name!r}; rename it to {digit!r} or move its images there."
            )


def _check_folder(folder: Path) -> None:
    """Check that a folder has the parts of a source."""
    missing = [part for part in ("train", "test") if not (folder / part).is_dir()]
    if missing:
        there = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
        known = written_otherwise(str(folder), _COLLECTIONS)
        meant = hint(missing[0], there) + ("" if known is None else f" (the collection is called {known!r})")
        raise MisconfigurationException(
            f"The source {str(folder)!r} has no folder {' and no folder '.join(missing)} in {folder.resolve()}{meant}. "
            "Add the images as train/<digit>/* and test/<digit>/*, or choose one of the collections "
            f"{', '.join(_COLLECTIONS)}."
        )


def _read_collection(name: str, data_dir: Path, train: bool, download: bool) -> _Raw:
    """Read a data set of torchvision."""
    split, data = "train" if train else "test", torchvision.datasets
    if name == "mnist":
        mnist = data.MNIST(data_dir, train=train, download=download)
        return mnist.data[:, None], mnist.targets
    if name == "svhn":
        svhn = data.SVHN(data_dir / "SVHN", split=split, download=download)
        return torch.from_numpy(svhn.data), torch.from_numpy(svhn.labels)
    _, file, md5 = data.USPS.split_list[split]
    path = data_dir / "USPS" / file
    if download and path.is_file() and not check_integrity(path, md5):
        path.unlink()  # torchvision checks only new downloads
    usps = data.USPS(data_dir / "USPS", train=train, download=download)
    return torch.from_numpy(usps.data)[:, None], torch.tensor(usps.targets)
