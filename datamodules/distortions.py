"""The ten distortions of the TransPrior benchmark, which simulate users' cameras."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from io import BytesIO
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

_Image = NDArray[np.uint8]
_Levels = NDArray[np.float64]  # gray levels, from 0 to 255
_LARGEST = 32_766  # of OpenCV's remap


def distort(image: _Image, name: str, *, severity: int = 3, seed: int) -> _Image:
    """Distort an image as the camera of one of TransPrior's users does.

    Severity 3 is that of De Lange et al., CVPR 2020; the others, and the constants of all, are those of Tiny-ImageNet-C
    (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
    2019). They are in pixels for images of 64×64, and are not scaled with the image. ``docs/distortions.md`` lists the
    formulas and constants.

    ================== ===================================================== ==============
    name               effect                                                at severity 3
    ================== ===================================================== ==============
    ``spatter``        drops of water on the lens; at severity 4 and 5 mud   strength 0.6
    ``elastic``        a random affine map, then smooth random displacements within 3.84 px
    ``saturation``     saturation (HSV) times a factor                       2
    ``defocus_blur``   mean over a disk                                      radius 1.5
    ``gaussian_noise`` normal noise in each pixel and channel                std 0.12
    ``brightness``     value (HSV) plus a constant                           0.3
    ``gaussian_blur``  a Gaussian filter                                     σ 1
    ``jpeg``           compression                                           quality 50
    ``contrast``       distance to the mean of each channel times a factor   0.2
    ``impulse_noise``  values replaced by 0 or 255                           5 %
    ================== ===================================================== ==============

    Args:
        image: (height, width, 3), uint8, RGB, at least 1×1 pixels, and for elastic at most 32,766 in height and width.
        name: One of ``DISTORTIONS``.
        severity: From 1 to 5. The strength increases with it, except for spatter, elastic and saturation.
        seed: Seed of all randomness.

    Returns:
        (height, width, 3), uint8: the distorted image, rounded and clipped. It depends only on the arguments.

    Raises:
        ValueError: If the distortion or severity does not exist, the image has another shape or dtype or is too large,
            or the seed is negative.
        ModuleNotFoundError: If OpenCV is required (spatter, elastic and both blurs) but not installed.

    Example:
        >>> image = np.full((2, 2, 3), (200, 100, 50), dtype=np.uint8)
        >>> distort(image, "saturation", seed=0)[0, 0].tolist()
        [200, 67, 0]
        >>> distort(image, "brightness", severity=1, seed=0)[0, 0].tolist()
        [226, 113, 56]
    """
    if name not in _DISTORTIONS:
        raise ValueError(f"There is no distortion {name!r}; there are {', '.join(DISTORTIONS)}.")
    function, constants = _DISTORTIONS[name]
    if severity not in range(1, 6):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5; got {severity!r}.")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ValueError(f"image must be an array of uint8; got {getattr(image, 'dtype', type(image).__name__)}.")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must be of shape (height, width, 3), at least (1, 1, 3); got {image.shape}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}.")
    levels = np.array(image, dtype=np.float64, order="C")
    distorted = function(levels, np.random.default_rng(seed), *constants[int(severity) - 1])
    # Round halves up: to the nearest even level, an offset that ends in .5 would merge two gray levels.
    rounded: _Image = np.floor(distorted.clip(0, 255) + 0.5).astype(np.uint8)
    return rounded


def opencv_version() -> str:
    """Version of OpenCV, on which some distortions depend in the last digit; empty if it is not installed."""
    try:
        return str(_opencv().__version__)
    except ModuleNotFoundError:
        return ""


def _spatter(
    levels: _Levels, rng: Generator, mean: float, std: float, sigma: float, threshold: float, last: float, mud: bool
) -> _Levels:
    """Bright drops with an edge that catches the light, or opaque brown spots with a soft edge."""
    cv2 = _opencv()
    liquid = _gaussian(rng.normal(mean, std, levels.shape[:2]), sigma)
    liquid[liquid < threshold] = 0  # too little to stick
    if mud:
        opacity = _gaussian((liquid > threshold).astype(np.float64), last)
        opacity[opacity < 0.8] = 0
        return levels * (1 - opacity[..., None]) + opacity[..., None] * (63.0, 42.0, 20.0)
    depth = (255 * liquid).clip(0, 255).astype(np.uint8)
    to_edge = cv2.distanceTransform(255 - cv2.Canny(depth, 50, 150), cv2.DIST_L2, cv2.DIST_MASK_5)
    relief = cv2.equalizeHist(cv2.blur(np.minimum(to_edge, 20), (3, 3)).astype(np.uint8))
    relief = cv2.filter2D(relief, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float32))
    drops: _Levels = depth * cv2.blur(relief.astype(np.float64), (3, 3))
    if drops.max() > 0:  # otherwise there are no drops
        drops *= last / drops.max()
    return levels + drops[..., None] * (175.0, 238.0, 238.0)


def _elastic(levels: _Levels, rng: Generator, amplitude: float, sigma: float, jitter: float) -> _Levels:
    """An affine map of three jittered points, then displacements that vary smoothly over the image."""
    cv2 = _opencv()
    height, width = levels.shape[:2]
    if max(height, width) > _LARGEST:
        raise ValueError(f"elastic takes images of up to {_LARGEST} pixels in height and width; got {height}×{width}.")
    # OpenCV 5 interpolates exactly in float32; OpenCV 4, and 5 in float64, round places to 1/32 of a pixel.
    warped = levels.astype(np.float32)
    reach = min(height, width) // 3
    if reach:  # otherwise the three points coincide
        signs = np.array([[1, 1], [-1, 1], [-1, -1]])  # x, y
        points = (np.array([width // 2, height // 2]) + reach * signs).astype(np.float32)
        moved = (points + rng.uniform(-jitter, jitter, (3, 2))).astype(np.float32)
        affine = cv2.getAffineTransform(points, moved)
        warped = cv2.warpAffine(warped, affine, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    if amplitude:
        noise = (rng.uniform(-1, 1, (height, width)) for _ in range(2))
        dx, dy = (amplitude * _gaussian(values, sigma, truncate=3, border="REFLECT") for values in noise)
        rows, columns = np.mgrid[:height, :width]
        x, y = (columns + dx).astype(np.float32), (rows + dy).astype(np.float32)
        warped = cv2.remap(warped, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return warped.astype(np.float64)


def _saturation(levels: _Levels, rng: Generator, factor: float, offset: float) -> _Levels:
    """HSV: S becomes clip(factor S + offset, 0, 1). With hue and value fixed, V − c is proportional to S."""
    value: _Levels = levels.max(axis=2, keepdims=True)
    gap = value - levels
    chroma: _Levels = gap.max(axis=2, keepdims=True)
    # Gray has no hue; HSV treats it as red, so green and blue lack all of the new saturation.
    direction = np.where(chroma > 0, gap / np.maximum(chroma, 1), (0.0, 1.0, 1.0))
    wanted: _Levels = (factor * chroma / np.maximum(value, 1) + offset).clip(0, 1)
    return value * (1 - direction * wanted)


def _brightness(levels: _Levels, rng: Generator, offset: float) -> _Levels:
    """HSV: V becomes clip(V + offset, 0, 1). With hue and saturation fixed, a color is proportional to V."""
    value: _Levels = levels.max(axis=2, keepdims=True)
    # Exact in gray levels: a conversion to HSV and back would round arbitrarily where 255 · offset ends in .5.
    brighter = np.minimum(value + 255 * offset, 255)
    return np.where(value > 0, levels * brighter / np.maximum(value, 1), brighter)


def _defocus_blur(levels: _Levels, rng: Generator, radius: float, edge_sigma: float) -> _Levels:
    """The mean over the pixels whose centres are within the radius, with an edge smoothed by a 3×3 Gaussian."""
    cv2 = _opencv()
    offsets = np.arange(-int(radius) - 1, int(radius) + 2)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float64)
    disk = cv2.GaussianBlur(disk / disk.sum(), (3, 3), edge_sigma, borderType=cv2.BORDER_CONSTANT)
    blurred: _Levels = cv2.filter2D(levels, cv2.CV_64F, disk, borderType=cv2.BORDER_REFLECT_101)
    return blurred


def _gaussian_noise(levels: _Levels, rng: Generator, std: float) -> _Levels:
    return levels + rng.normal(0, 255 * std, levels.shape)


def _gaussian_blur(levels: _Levels, rng: Generator, sigma: float) -> _Levels:
    return _gaussian(levels, sigma)


def _jpeg(levels: _Levels, rng: Generator, quality: int) -> _Levels:
    """Encode with chroma subsampling and decode."""
    file = BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return np.asarray(decoded, dtype=np.float64)


def _contrast(levels: _Levels, rng: Generator, factor: float) -> _Levels:
    mean: _Levels = levels.mean(axis=(0, 1))
    return (levels - mean) * factor + mean


def _impulse_noise(levels: _Levels, rng: Generator, share: float) -> _Levels:
    """Replace each value of each channel independently."""
    drawn = rng.random(levels.shape)
    return np.where(drawn < share / 2, 0, np.where(drawn >= 1 - share / 2, 255, levels))


def _gaussian(values: _Levels, sigma: float, *, truncate: float = 4, border: str = "REPLICATE") -> _Levels:
    """Gaussian filter, truncated at ``truncate`` times σ, rounded."""
    cv2 = _opencv()
    size = 2 * int(truncate * sigma + 0.5) + 1
    blurred: _Levels = cv2.GaussianBlur(values, (size, size), sigma, borderType=getattr(cv2, f"BORDER_{border}"))
    return blurred


def _opencv() -> Any:
    try:
        return import_module("cv2")
    except ModuleNotFoundError as error:
        if error.name != "cv2":
            raise
        message = "TransPrior's distortions need OpenCV: pip install 'pl-personalize[transprior]'"
        raise ModuleNotFoundError(message, name="cv2") from error


_DISTORTIONS: dict[str, tuple[Callable[..., _Levels], Sequence[tuple[float, ...]]]] = {
    "spatter": (
        _spatter,  # mean and std of the noise, sigma, threshold; strength of water, or sigma of the edge of mud
        (
            (0.62, 0.1, 0.7, 0.7, 0.6, False),
            (0.65, 0.1, 0.8, 0.7, 0.6, False),
            (0.65, 0.3, 1.0, 0.69, 0.6, False),
            (0.65, 0.1, 0.7, 0.68, 0.6, True),
            (0.65, 0.1, 0.5, 0.67, 0.6, True),
        ),
    ),
    "elastic": (
        _elastic,
        ((0.0, 0.0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84), (6.4, 1.92, 1.92), (10.24, 1.92, 1.28)),
    ),
    "saturation": (_saturation, ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (30.0, 0.2))),
    "defocus_blur": (_defocus_blur, ((0.5, 0.6), (1.0, 0.1), (1.5, 0.1), (2.5, 0.01), (3.0, 0.1))),
    "gaussian_noise": (_gaussian_noise, ((0.04,), (0.08,), (0.12,), (0.15,), (0.18,))),
    "brightness": (_brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "gaussian_blur": (_gaussian_blur, ((0.5,), (0.75,), (1.0,), (1.25,), (1.5,))),
    "jpeg": (_jpeg, ((65,), (58,), (50,), (40,), (25,))),
    "contrast": (_contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "impulse_noise": (_impulse_noise, ((0.01,), (0.02,), (0.05,), (0.08,), (0.14,))),
}
"""Function of each distortion, and its constants at severity 1 to 5."""
DISTORTIONS: tuple[str, ...] = tuple(_DISTORTIONS)
"""Names in the order of TransPrior's ten users."""
