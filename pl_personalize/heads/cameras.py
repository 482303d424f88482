"""Random cameras, by which a server learns how the features of its network move when only the camera changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

Camera = Callable[[Tensor], Tensor]
"""Images (n, channels, height, width) in [0, 1] as another camera takes them."""


def _gain(images: Tensor, draw: np.random.Generator) -> Tensor:
    return images * torch.from_numpy(draw.uniform(0.7, 1.3, images.shape[1])).to(images)[:, None, None]


def _gamma(images: Tensor, draw: np.random.Generator) -> Tensor:
    return images ** float(2 ** draw.uniform(-1, 1))


def _blur(images: Tensor, draw: np.random.Generator, least: float = 0.4, most: float = 2.0) -> Tensor:
    size = min(9, 2 * min(images.shape[2:]) - 1)
    blurred: Tensor = transforms.gaussian_blur(images, [size, size], [draw.uniform(least, most)] * 2)
    return blurred


def _noise(images: Tensor, draw: np.random.Generator) -> Tensor:
    return images + torch.from_numpy(draw.normal(0, draw.uniform(0.03, 0.18), images.shape)).to(images)


def _contrast(images: Tensor, draw: np.random.Generator) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return mean + (images - mean) * draw.uniform(0.15, 0.8)


def _saturation(images: Tensor, draw: np.random.Generator) -> Tensor:
    factor = draw.uniform(0, 2.5)
    return transforms.adjust_saturation(images, factor) if images.shape[1] == 3 else images


def _brightness(images: Tensor, draw: np.random.Generator) -> Tensor:
    return images + draw.uniform(-0.35, 0.35)


def _impulse(images: Tensor, draw: np.random.Generator) -> Tensor:
    share, chance = draw.uniform(0.01, 0.1), torch.from_numpy(draw.uniform(size=images.shape)).to(images)
    return images.masked_fill(chance < share / 2, 0).masked_fill(chance > 1 - share / 2, 1)


def _jpeg(images: Tensor, draw: np.random.Generator) -> Tensor:
    quality = int(draw.integers(10, 80))
    if images.shape[1] not in (1, 3):
        return images
    bytes_ = (images * 255).round().to(torch.uint8).cpu()
    return torch.stack([transforms.jpeg(image, quality) for image in bytes_]).to(images) / 255


def _mixed(images: Tensor, draw: np.random.Generator) -> Tensor:
    images = _gamma(_gain(images, draw).clamp(0, 1), draw)
    images = _blur(images, draw, 0.2, 1.0)
    return images + torch.from_numpy(draw.normal(0, draw.uniform(0.01, 0.06), images.shape)).to(images)


FAMILIES = {
    "gain": _gain,
    "gamma": _gamma,
    "blur": _blur,
    "noise": _noise,
    "contrast": _contrast,
    "saturation": _saturation,
    "brightness": _brightness,
    "impulse": _impulse,
    "jpeg": _jpeg,
    "mixed": _mixed,
}


def random_cameras(count: int, *, leave_out: tuple[str, ...] = ()) -> list[Camera]:
    """Random cameras, of each family in turn.

    The families are gains of the channels, gamma, blur, noise, contrast, saturation, brightness, impulse noise, JPEG,
    and a mixture of gains, gamma, blur and noise.

    Args:
        count: Number of cameras.
        leave_out: Families to leave out.

    Raises:
        ValueError: If there is no such family, or none is left.

    Example:
        >>> camera = random_cameras(10)[4]  # contrast
        >>> bool(camera(torch.rand(1, 3, 8, 8)).std() < 0.3)
        True
    """
    families = [function for name, function in FAMILIES.items() if name not in leave_out]
    if set(leave_out) - FAMILIES.keys() or not families:
        raise ValueError(f"leave_out must name some of {', '.join(FAMILIES)}, not all; got {leave_out}.")
    return [partial(_take, family=families[number % len(families)], number=number) for number in range(count)]


def _take(images: Tensor, family: Callable[[Tensor, np.random.Generator], Tensor], number: int) -> Tensor:
    return family(images, np.random.default_rng(number)).clamp(0, 1)


def on_inputs(camera: Camera, inputs: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Apply a camera to a network's normalized inputs, whose channels span [low, high] (each (channels,))."""
    low, span = low[:, None, None], (high - low).clamp_min(1e-12)[:, None, None]
    return camera(((inputs - low) / span).clamp(0, 1)) * span + low
