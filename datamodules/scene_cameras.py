"""Base class for benchmarks whose users see scenes through distorting cameras."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import override

from pl_personalize.datamodules import distortions
from pl_personalize.datamodules.base import whole
from pl_personalize.datamodules.image_files import center_square, read_rgb, resize_shorter
from pl_personalize.datamodules.scenes import SceneDataModule, UserPool
from pl_personalize.functional.seeding import derive_seed

DistortAt = Literal["resized", "reference"]


class CameraSceneDataModule(SceneDataModule):
    """Base class for benchmarks on scenes that users see through distorting cameras.

    Profiles take the cameras in turn. Through one camera, an image always looks the same: the randomness of a
    distortion depends only on ``split_seed``, the distortion and the name of the file.

    Args:
        *args: The folder of the scenes, as for :class:`SceneDataModule`.
        cameras: Names of different distortions out of ``DISTORTIONS``, one or several.
        severity: Severity of the distortions, from 1 to 5.
        distort_at: ``resized``: resize images to ``image_size``, distort them and crop, so that users see the same part
            of a scene as the server. ``reference``: as in the published code, distort images as stored in the file and
            crop them without resizing; small ones are padded with black.
        **options: Further arguments of :class:`SceneDataModule`.

    Raises:
        MisconfigurationException: If an option is out of range, or the table of supercategories is invalid.
    """

    def __init__(
        self,
        *args: Any,
        cameras: Sequence[str] | str,
        severity: int = 3,
        distort_at: DistortAt = "resized",
        **options: Any,
    ) -> None:
        self.cameras = (cameras,) if isinstance(cameras, str) else tuple(map(str, cameras))
        known = distortions.DISTORTIONS
        if not self.cameras or len(set(self.cameras)) != len(self.cameras) or not set(self.cameras) <= set(known):
            raise MisconfigurationException(
                f"cameras must be different distortions out of {', '.join(known)}; got {list(self.cameras)}."
            )
        severity = whole("severity", severity)
        if severity not in range(1, 6):
            raise MisconfigurationException(f"severity must be 1, 2, 3, 4 or 5; got {severity}.")
        if distort_at not in get_args(DistortAt):
            raise MisconfigurationException(f"distort_at must be 'resized' or 'reference'; got {distort_at!r}.")
        self.severity, self.distort_at = severity, distort_at
        super().__init__(*args, **options)

    @override
    def decisive_options(self) -> dict[str, Any]:
        return super().decisive_options() | {"severity": self.severity, "distort_at": self.distort_at}

    def distortion_of(self, user: int | str) -> str:
        """Name of a user's distortion."""
        return self._camera(self.profile_of(user))

    def _camera(self, profile: int) -> str:
        return self.cameras[profile % len(self.cameras)]

    @override
    def prepare_data(self) -> None:
        """Also check that the packages required by the distortions are installed."""
        super().prepare_data()
        for name in self.cameras:
            try:
                distortions.distort(np.zeros((8, 8, 3), np.uint8), name, severity=self.severity, seed=0)
            except ImportError as error:  # a package or a system library is missing
                raise MisconfigurationException(f"The distortion {name!r} is not available: {error}") from error

    @override
    def pool_of(self, profile: int) -> UserPool:
        name, versions = self._camera(profile), (np.__version__, distortions.opencv_version())
        rank = distortions.DISTORTIONS.index(name)
        depends = name, *versions, self.severity, self.distort_at, self.split_seed, rank
        return UserPool(name, partial(self.read_distorted, profile=profile), depends)

    def read_distorted(self, path: Path, profile: int) -> NDArray[np.uint8]:
        """Decode an image file as the users of a profile see it."""
        image = read_rgb(path)
        if self.distort_at == "resized":
            image = resize_shorter(image, self.image_size)
        name, folder = self._camera(profile), path.parent.relative_to(self.data_dir / "Images").as_posix()
        seed = derive_seed(self.split_seed, distortions.DISTORTIONS.index(name), folder, path.name)
        try:
            distorted = distortions.distort(np.asarray(image), name, severity=self.severity, seed=seed)
        except Exception as error:  # raised by OpenCV or Pillow for extreme sizes
            raise MisconfigurationException(f"{path} cannot be distorted ({name}): {error}") from error
        return center_square(Image.fromarray(distorted), self.image_size)
