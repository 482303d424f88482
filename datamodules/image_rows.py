"""Images shared by several splits, in memory or on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
