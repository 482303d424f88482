"""Tiny collections in their real formats, and a server on localhost that has them."""

from __future__ import annotations

import bz2
import hashlib
import io
import struct
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import scipy.io
import torch
import torchvision

from pl_personalize.datamodules import NumbersDataModule

COLLECTIONS = ("svhn", "usps", "mnist")
COUNTS = {"train": 3, "test": 2}
# What lies below the data folder once all is fetched, training files first.
FILES = {
    "svhn": ["SVHN/train_32x32.mat", "SVHN/test_32x32.mat"],
    "usps": ["USPS/usps.bz2", "USPS/usps.t.bz2"],
    "mnist": [
        f"MNIST/raw/{part}-ubyte"
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ],
}
SHAPES = {"svhn": (3, 32, 32), "usps": (1, 16, 16), "mnist": (1, 28, 28)}


@dataclass
class Server:
    """Tiny files, the pixels and digits that are in them, and what was asked for."""

    folder: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)
    pixels: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    digits: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def md5(self, name: str) -> str:
        return hashlib.md5((self.folder / name).read_bytes()).hexdigest()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, quietly; below /short it promises the whole file and sends half."""

    def __init__(self, *arguments, server_data: Server) -> None:
        self.server_data = server_data
        super().__init__(*arguments, directory=str(server_data.folder))

    def do_GET(self) -> None:
        self.server_data.requests.append(self.path)
        if not self.path.startswith("/short/"):
            super().do_GET()
            return
        body = (self.server_data.folder / self.path.removeprefix("/short/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])

    def log_message(self, *arguments) -> None:
        pass


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mat(images: np.ndarray, digits: np.ndarray) -> bytes:
    """SVHN's layout: X is (32, 32, 3, n), y is (n, 1) with 10 for the digit 0."""
    file = io.BytesIO()
    labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
    scipy.io.savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": labels}, do_compression=True)
    return file.getvalue()


def libsvm(images: np.ndarray, digits: np.ndarray) -> bytes:
    """USPS's layout: the digit plus one, then 1:value to 256:value with values in [-1, 1]."""
    lines = []
    for image, digit in zip(images, digits, strict=True):
        # Half a grey level more, for torchvision rounds down.
        values = [f"{k}:{2 * (int(pixel) + 0.5) / 255 - 1:.6f}" for k, pixel in enumerate(image.flatten(), 1)]
        lines.append(" ".join([str(digit + 1), *values, "\n"]))
    return bz2.compress("".join(lines).encode())


def point_to(monkeypatch, server: Server, url: str, md5: str | None = None) -> None:
    """Make torchvision fetch from here; ``md5`` in place of the true ones."""
    monkeypatch.setenv("no_proxy", "*")

    def split_list(train: str, test: str) -> dict[str, list[str]]:
        return {s: [url + name, name, md5 or server.md5(name)] for s, name in (("train", train), ("test", test))}

    archives = [f"{Path(name).name}.gz" for name in FILES["mnist"]]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list("train_32x32.mat", "test_32x32.mat"))
    monkeypatch.setattr(torchvision.datasets.USPS, "split_list", split_list("usps.bz2", "usps.t.bz2"))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [(name, md5 or server.md5(name)) for name in archives])


def fetched(data_dir, *names: str, **options) -> NumbersDataModule:
    data = NumbersDataModule(data_dir, names, download=True, max_per_source=None, **options)
    data.prepare_data()
    return data


def server_data(data: NumbersDataModule) -> tuple[torch.Tensor, torch.Tensor]:
    """All the server's images, and their digits."""
    splits = [(task, split) for task in range(5) for split in data.server_split(task)]
    return torch.cat([s.images for _, s in splits]), torch.cat([s.labels + 2 * task for task, s in splits])


def user_data(data: NumbersDataModule, user: str | int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a user, and their digits."""
    splits = [(task, split) for task in range(5) for split in data.user_split(user, task)]
    return torch.cat([s.images for _, s in splits]), torch.cat([s.labels + 2 * task for task, s in splits])


def doubled(images: np.ndarray) -> np.ndarray:
    """Twice the height and width, bilinear: each new pixel is 3/4 of the nearest old one and 1/4 of the next."""
    for axis in (-2, -1):
        images = np.moveaxis(images, axis, -1)
        before = np.concatenate([images[..., :1], images[..., :-1]], -1)
        after = np.concatenate([images[..., 1:], images[..., -1:]], -1)
        images = np.stack([(3 * images + before) / 4, (3 * images + after) / 4], -1).reshape(*images.shape[:-1], -1)
        images = np.moveaxis(images, -1, axis)
    return images


def normalized(name: str, pixels: np.ndarray) -> np.ndarray:
    """What the protocol says of raw pixels (n, 1 or 3, height, width)."""
    values = pixels.astype(float)
    if name == "mnist":
        values = (values / 255 - 0.1307) / 0.3081
    else:
        values = doubled(values) if name == "usps" else values
        values = (values[..., 2:30, 2:30] / 255 - 0.5) / 0.5
    return np.broadcast_to(values, (len(values), 3, 28, 28))


def assert_same_samples(found: tuple[torch.Tensor, torch.Tensor], images: np.ndarray, digits: np.ndarray) -> None:
    """The same images, pixel by pixel and each with its digit, in any order."""
    assert found[0].shape == images.shape
    assert found[0].dtype == torch.float32
    differences = np.abs(found[0].numpy()[:, None] - images[None]).max((2, 3, 4))
    nearest = differences.argmin(1)
    assert sorted(nearest) == list(range(len(images)))
    assert differences.min(1).max() < 1e-5
    assert found[1].tolist() == digits[nearest].tolist()
