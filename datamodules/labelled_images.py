"""Images with labels, in memory or shared by several splits, and the validation of what a benchmark returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pl_personalize.functional.labels import class_labels
from pl_personalize.functional.seeding import derive_seed

_CHUNK = 256  # images checked at a time


class ImageRows:
    """Selection of images from one or several pools, copied only when indexed.

    Splits, users and tasks share the pools, which may exceed the memory if they are memory-mapped files.

    Args:
        pools: Pools, each (n, channels, height, width), of one image shape and dtype.
        rows: Row of each image in its pool, (n,).
        which: Index of each image's pool, (n,); 0 by default.

    Raises:
        ValueError: If there is no pool, or image shapes or dtypes differ.

    Example:
        >>> pool = torch.arange(5).view(5, 1, 1, 1)
        >>> images = ImageRows([pool], torch.tensor([4, 0, 2]))
        >>> images[torch.tensor([0, 2])].flatten()
        tensor([4, 2])
    """

    def __init__(self, pools: Sequence[Tensor], rows: Tensor, which: Tensor | None = None) -> None:
        if len({(pool.shape[1:], pool.dtype) for pool in pools}) != 1:
            raise ValueError(
                f"Pools must have one image shape and dtype; got {[(tuple(p.shape), p.dtype) for p in pools]}."
            )
        self.pools, self.rows = tuple(pools), rows
        self.which = torch.zeros_like(rows) if which is None else which

    @property
    def shape(self) -> torch.Size:
        """(n, channels, height, width)."""
        return torch.Size([len(self.rows), *self.pools[0].shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the pools."""
        return self.pools[0].dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        which, rows = self.which[index], self.rows[index]
        if not rows.ndim:
            return self.pools[int(which)][int(rows)]
        if len(self.pools) == 1:
            return self.pools[0][rows]
        found = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for number, pool in enumerate(self.pools):
            here = which == number
            found[here] = pool[rows[here]]
        return found

    def select(self, index: Tensor) -> ImageRows:
        """Subset of the images, from the same pools."""
        return ImageRows(self.pools, self.rows[index], self.which[index])


def join(parts: Sequence[ImageRows]) -> ImageRows:
    """Concatenate selections in order; a pool that they share is kept once."""
    pools = list({id(pool): pool for part in parts for pool in part.pools}.values())
    numbers = {id(pool): number for number, pool in enumerate(pools)}
    which = [torch.tensor([numbers[id(pool)] for pool in part.pools])[part.which] for part in parts]
    return ImageRows(pools, torch.cat([part.rows for part in parts]), torch.cat(which))


class LabelledImages(NamedTuple):
    """Stored images (n, channels, height, width) and their labels within the task (n,), from 0."""

    images: Tensor | ImageRows
    labels: Tensor


def concatenate(parts: Sequence[LabelledImages]) -> LabelledImages:
    """Concatenate in order; tensors are copied, :class:`ImageRows` keep sharing their pools."""
    labels = torch.cat([part.labels for part in parts])
    rows = [part.images for part in parts if isinstance(part.images, ImageRows)]
    tensors = [part.images for part in parts if isinstance(part.images, Tensor)]
    if rows and tensors:
        raise TypeError("Images must be all tensors or all ImageRows; got both.")
    return LabelledImages(join(rows) if rows else torch.cat(tensors), labels)


def random_split(data: LabelledImages, share: float, *seed: int | str) -> tuple[LabelledImages, LabelledImages]:
    """Split at random into floor(``share`` * n) samples and the rest, as a function of the parts of ``seed``."""
    first, second = divided(torch.arange(len(data.labels)), share, *seed)
    select = data.images.select if isinstance(data.images, ImageRows) else data.images.__getitem__
    return LabelledImages(select(first), data.labels[first]), LabelledImages(select(second), data.labels[second])


def divided(indices: Tensor, share: float, *seed: int | str) -> tuple[Tensor, Tensor]:
    """Divide at random into floor(``share`` * n) indices and the rest."""
    shuffled, count = indices[permutation(len(indices), *seed)], int(share * len(indices))
    return shuffled[:count], shuffled[count:]


def permutation(count: int, *seed: int | str) -> Tensor:
    """Random order that depends only on the parts of the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(*seed)))


def described(found: Any) -> str:
    """The type of an object, and the length of a tuple or list, for messages."""
    return f"a {type(found).__name__}" + (f" of {len(found)}" if isinstance(found, tuple | list) else "")


def labelled_images(found: Any, num_classes: int, *, offset: int = 0) -> LabelledImages:
    """Validate a split that a benchmark returns; convert other types if nothing is lost, else raise ``ValueError``."""
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise ValueError(f"a split must be LabelledImages(images, labels); got {described(found)}.")
    images, labels = _images(found[0]), class_labels(found[1], num_classes, offset=offset)
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels; pass one label per image.")
    if isinstance(images, ImageRows):
        _check_rows(images)
    for start in range(0, len(images) if images.dtype.is_floating_point else 0, _CHUNK):
        finite = images[start : start + _CHUNK].flatten(1).isfinite().all(1)
        if not finite.all():
            place = start + int((~finite).nonzero()[0])
            raise ValueError(f"image {place} has NaN or infinite values; correct or remove it.")
    return LabelledImages(images, labels)


def _images(given: Any) -> Tensor | ImageRows:
    if isinstance(given, ImageRows):
        return given
    images = given
    if isinstance(images, tuple | list) and len(images):
        shapes = {tuple(getattr(image, "shape", ())) for image in images}
        if not all(isinstance(image, Tensor | np.ndarray) for image in images) or len(shapes) != 1:
            kinds = sorted({type(image).__name__ for image in images})
            raise ValueError(
                "images must be a tensor (n, channels, height, width) or a list of tensors of one shape; got a list of "
                f"{', '.join(kinds)} with the shapes {', '.join(map(str, sorted(shapes)[:3]))}."
            )
        images = torch.stack([torch.as_tensor(image) for image in images])
    if isinstance(images, np.ndarray):
        try:
            images = torch.from_numpy(np.ascontiguousarray(images))
        except TypeError as error:
            raise ValueError(f"images cannot be an array of {images.dtype}: {error}") from error
    if not isinstance(images, Tensor) or images.ndim < 2:
        what = f"the shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(given).__name__}"
        raise ValueError(f"images must be a tensor (n, channels, height, width) or ImageRows; got {what}.")
    return images


def _check_rows(images: ImageRows) -> None:
    for number, pool in enumerate(images.pools):
        rows = images.rows[images.which == number]
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(pool):
            raise ValueError(f"ImageRows has rows outside 0 to {len(pool) - 1}: {rows.tolist()[:5]}.")
    if len(images) and not 0 <= int(images.which.min()) <= int(images.which.max()) < len(images.pools):
        raise ValueError(f"ImageRows has {len(images.pools)} pools but refers to pool {int(images.which.max())}.")
