"""The ten distortions of TransPrior's users, until they are written: their names."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DISTORTIONS = (
    "spatter",
    "elastic",
    "saturation",
    "defocus_blur",
    "gaussian_noise",
    "brightness",
    "gaussian_blur",
    "jpeg",
    "contrast",
    "impulse_noise",
)


def distort(image: NDArray[np.uint8], name: str, *, severity: int = 3, seed: int) -> NDArray[np.uint8]:
    """A stand-in: a coarse pattern that depends on all arguments."""
    pattern = np.random.default_rng([seed, DISTORTIONS.index(name), severity]).integers(0, 20, image.shape)
    return (image // 2 + pattern).astype(np.uint8)
