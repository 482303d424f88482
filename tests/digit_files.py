"""Small digits in the layouts of the real collections: each image is uniform, its brightness tells its digit."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_idx(path: Path, array: np.ndarray) -> None:
    """A file of MNIST's format."""
    path.write_bytes(
        struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )


def write_mnist(folder: Path, train: int = 6, test: int = 4) -> None:
    """Files as torchvision has them; so many images of each digit."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for count, prefix in ((train, "train"), (test, "t10k")):
        digits = np.repeat(np.arange(10, dtype=np.uint8), count)
        images = np.broadcast_to(digits[:, None, None], (len(digits), 28, 28)).copy()
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", digits)


def write_svhn(folder: Path, train: int = 6, test: int = 4) -> None:
    """Files as torchvision has them; the digit 0 has the label 10."""
    from scipy.io import savemat

    (folder / "SVHN").mkdir(parents=True)
    for count, split in ((train, "train"), (test, "test")):
        digits = np.repeat(np.arange(10, dtype=np.uint8), count)
        images = np.broadcast_to(20 * digits, (32, 32, 3, len(digits))).copy()
        savemat(folder / "SVHN" / f"{split}_32x32.mat", {"X": images, "y": np.where(digits == 0, 10, digits)[:, None]})


def write_photos(folder: Path, train: int = 6, test: int = 4) -> None:
    """A folder of colour images."""
    for count, split in ((train, "train"), (test, "test")):
        for digit in range(10):
            place = folder / split / str(digit)
            place.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (32, 32), (digit, 10 * digit, 255)).save(place / f"{k}.png")
