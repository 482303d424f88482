"""Decoded images, in memory or in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

_VERSION = 3

Read = Callable[[Path], NDArray[np.uint8]]
"""Decodes an image file to (size, size, 3)."""


class ImageStore:
    """Pools of images of one size, each image decoded once.

    A cache file is named after a digest of what determines it (image files, size, Pillow's version, and ``depends``)
    and appears only when it is complete; a killed process's leftovers are overwritten. Any number of processes may
    share the folder. Complete files are never deleted; all can be recreated.
    """

    def __init__(self, folder: Path, size: int, cache_dir: Path | None = None) -> None:
        self.folder, self.size, self.cache_dir = folder, size, cache_dir
        self._pools: dict[str, Tensor] = {}

    def pool(self, name: str, files: Sequence[str], read: Read, *depends: str | int) -> Tensor:
        """A pool of images, uint8 (n, 3, size, size), decoded at the first call."""
        if name not in self._pools:
            shape = (len(files), 3, self.size, self.size)
            if self.cache_dir is None or not files:
                pool = torch.empty(shape, dtype=torch.uint8)
                with closing(self._decoded(name, files, read)) as images:
                    for row, image in enumerate(images):
                        pool[row] = torch.from_numpy(image)
            else:
                pool = self._mapped(self.cache_dir, name, files, read, depends, shape)
            self._pools[name] = pool
        return self._pools[name]

    def _decoded(self, name: str, files: Sequence[str], read: Read) -> Generator[NDArray[np.uint8]]:
        """Yield the images, (3, size, size), in order."""

        def channels_first(file: str) -> NDArray[np.uint8]:
            return np.ascontiguousarray(read(self.folder / file).transpose(2, 0, 1))

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
            try:
                images = workers.map(channels_first, files)
                yield from tqdm(images, f"Decoding {name}", len(files), unit="image", delay=3, leave=False)
            finally:
                workers.shutdown(cancel_futures=True)  # do not wait for the rest after an error or Ctrl-C

    def _mapped(
        self,
        cache_dir: Path,
        name: str,
        files: Sequence[str],
        read: Read,
        depends: Sequence[str | int],
        shape: tuple[int, ...],
    ) -> Tensor:
        """Memory-map the images, after decoding them if their file is missing or incomplete."""
        try:
            stats = [(file, stat.st_size, stat.st_mtime_ns) for file in files for stat in [os.stat(self.folder / file)]]
        except OSError as error:
            raise MisconfigurationException(f"{error.filename} cannot be read as an image: {error}") from error
        content = json.dumps([_VERSION, PIL.__version__, str(self.folder.resolve()), self.size, list(depends), stats])
        readable = re.sub(r"\W+", "-", name)
        path = cache_dir / f"{readable}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.bin"
        count = math.prod(shape)

        def complete() -> bool:
            return path.is_file() and path.stat().st_size == count

        try:
            if not complete():
                cache_dir.mkdir(parents=True, exist_ok=True)
                with FileLock(path.with_suffix(".lock")):
                    if not complete():  # otherwise another process was faster
                        self._write(path, self._decoded(name, files, read))
            return torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8).view(shape)
        except OSError as error:
            raise MisconfigurationException(
                f"Cannot store images in cache_dir={str(cache_dir)!r}: {error}. They take {count / 2**20:.0f} MiB; "
                "choose another folder, or None to hold them in memory."
            ) from error

    @staticmethod
    def _write(path: Path, images: Generator[NDArray[np.uint8]]) -> None:
        """Write images one by one, as they may exceed the memory; the file appears when it is complete."""
        partial = path.with_suffix(".partial")
        try:
            with open(partial, "wb") as file, closing(images):
                file.writelines(image.data for image in images)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # frees a full disk
