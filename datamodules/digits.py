"""Digits: five tasks of two handwritten digits, for a user with a scanner and a user with a camera."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur
from typing_extensions import override

from pl_personalize.datamodules.base import TaskIncrementalDataModule
from pl_personalize.datamodules.labelled_images import LabelledImages, concatenate, divided, permutation
from pl_personalize.functional.seeding import derive_seed

IMAGE_SHAPE = (3, 16, 16)
SERVER_PHOTOGRAPHS = 2
"""Number of photographs of each digit on the server; users have one."""


class DigitsDataModule(TaskIncrementalDataModule):
    """The 1797 handwritten digits of scikit-learn: tasks {0, 1}, {2, 3}, …, {8, 9}, and the users *scan* and *camera*.

    The user *scan* sees the scans, resized to RGB 16×16. The user *camera* sees other digits through a camera
    (:func:`photograph`): chalk on a colored board in uneven light, blurred and noisy, with randomness that depends only
    on the digit. The server has both kinds.

    Every digit is in one place: of each class, half of the digits go to the server (half of these as scans, half as two
    photographs each) and a quarter to each user. The server trains on 80 % of its digits; a user's are halved into
    adapt and eval. Nothing is downloaded.

    Args:
        split_seed: Seed of the division of the images among server and users.
        **options: Further arguments of :class:`TaskIncrementalDataModule`.

    Example:
        >>> data = DigitsDataModule(task=0, user="camera")
        >>> data.tasks, data.users
        (('0-1', '2-3', '4-5', '6-7', '8-9'), ('scan', 'camera'))
    """

    image_shape = IMAGE_SHAPE

    def __init__(self, *, split_seed: int = 27, **options: Any) -> None:
        pairs = [(str(digit), str(digit + 1)) for digit in range(0, 10, 2)]
        super().__init__(tasks=["-".join(pair) for pair in pairs], classes=pairs, users=["scan", "camera"], **options)
        self.split_seed = split_seed

    @override
    def decisive_options(self) -> dict[str, Any]:
        return super().decisive_options() | {"split_seed": self.split_seed}

    @override
    def load_server(self, task: int) -> tuple[LabelledImages, LabelledImages]:
        """Load the server's scans and photographs, 80 % of the digits for training."""
        scans = divided(self._share(task, 0.0, 0.25), 0.8, self.split_seed, task, "server scan")
        photos = divided(self._share(task, 0.25, 0.5), 0.8, self.split_seed, task, "server camera")
        train, val = (
            concatenate([self._scans(task, scan), self._photographs(task, photo, SERVER_PHOTOGRAPHS)])
            for scan, photo in zip(scans, photos, strict=True)
        )
        return train, val

    @override
    def load_user(self, user: int, task: int) -> tuple[LabelledImages, LabelledImages]:
        """Load the user's images, halved."""
        share = self._share(task, 0.5, 0.75) if user == 0 else self._share(task, 0.75, 1.0)
        see = self._scans if user == 0 else self._photographs
        evaluation, adapt = divided(share, 0.5, self.split_seed, task, self.users[user])
        return see(task, adapt), see(task, evaluation)

    def _share(self, task: int, start: float, stop: float) -> Tensor:
        """Digits of one owner: the same part of each class, whose digits are in random order."""
        digits = _load_digits()[1]
        parts = []
        for name in self.classes[task]:
            chosen = (digits == int(name)).nonzero().squeeze(1)
            order = permutation(len(chosen), self.split_seed, int(name))
            parts.append(chosen[order[int(start * len(chosen)) : int(stop * len(chosen))]])
        return torch.cat(parts)

    def _scans(self, task: int, chosen: Tensor) -> LabelledImages:
        images, digits = _load_digits()
        return LabelledImages((images[chosen] - 0.5) / 0.5, digits[chosen] - int(self.classes[task][0]))

    def _photographs(self, task: int, chosen: Tensor, count: int = 1) -> LabelledImages:
        images, digits = _load_digits()
        photos = [photograph(images[k], derive_seed(int(k), copy)) for k in chosen for copy in range(count)]
        labels = digits[chosen].repeat_interleave(count) - int(self.classes[task][0])
        return LabelledImages((torch.stack(photos) - 0.5) / 0.5, labels)


def photograph(scan: Tensor, seed: int) -> Tensor:
    """Simulate a photograph of a scan: colored chalk on a colored board, side light, blur and noise.

    Args:
        scan: (3, height, width) in [0, 1], bright on black.
        seed: Seed of colors, light and noise.

    Returns:
        (3, height, width) in [0, 1].
    """
    generator = torch.Generator().manual_seed(derive_seed("photograph", seed))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    chalk = gaussian_blur(scan, kernel_size=[5, 5], sigma=[1.0, 1.0])
    board_color, chalk_color = uniform(0.1, 0.5, 3, 1, 1), uniform(0.6, 1.0, 3, 1, 1)
    image = board_color * (1 - chalk) + chalk_color * chalk
    height, width = scan.shape[1:]
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None, :]
    tilt = uniform(-0.35, 0.35, 2)
    image = image * (0.8 + tilt[0] * rows + tilt[1] * columns)
    image = image + 0.12 * torch.randn(image.shape, generator=generator)
    photo: Tensor = image.clamp(0, 1)
    return photo


@cache
def _load_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MisconfigurationException(
            "DigitsDataModule needs scikit-learn: pip install 'pl-personalize[experiments]'."
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=IMAGE_SHAPE[1:], mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    return images.contiguous(), torch.tensor(digits.target)
