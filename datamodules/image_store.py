"""Decoded images, in memory or in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
import torch
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

_VERSION = 2
_PATIENCE = 3.0  # seconds before a progress bar appears

Read = Callable[[Path], NDArray[np.uint8]]
"""Decodes an image file to (size, size, 3)."""


class ImageStore:
    """Pools of images of one size, each image decoded once.

    A cache file is named after a digest of what determines it (image files, size, Pillow's version, and ``depends``)
    and appears only when it is complete; a killed process's leftovers are overwritten. Any number of processes may
    share the folder. Complete files are never deleted; all can be recreated.

    Args:
        folder: Folder of the image files.
        size: Side length of the decoded images.
        cache_dir: Folder for memory-mapped files; by default pools are held in memory.
    """

    def __init__(self, folder: Path, size: int, cache_dir: Path | None = None) -> None:
        self.folder, self.size, self.cache_dir = folder, size, cache_dir
        self._pools: dict[str, Tensor] = {}

    def pool(self, name: str, files: Sequence[str], read: Read, *depends: str | int) -> Tensor:
        """A pool of images, uint8 (n, 3, size, size), decoded at the first call.

        Args:
            name: Name of the pool, different for different files.
            files: Image files, relative to the folder.
            read: Decoder of an image file.
            depends: What the images depend on besides the files and the size.

        Raises:
            MisconfigurationException: If a file cannot be decoded or the cache cannot be written.
        """
        if name not in self._pools:
            if self.cache_dir is None or not files:
                pool = torch.empty((len(files), 3, self.size, self.size), dtype=torch.uint8)
                with closing(self._decoded(name, files, read)) as images:
                    for row, image in enumerate(images):
                        pool[row] = torch.from_numpy(image)
            else:
                pool = self._mapped(self.cache_dir, name, files, read, depends)
            self._pools[name] = pool
        return self._pools[name]

    def _decoded(self, name: str, files: Sequence[str], read: Read) -> Generator[NDArray[np.uint8]]:
        """Yield the images, (3, size, size), in order."""

        def channels_first(file: str) -> NDArray[np.uint8]:
            return np.ascontiguousarray(read(self.folder / file).transpose(2, 0, 1))

        with (
            tqdm(total=len(files), desc=f"Decoding {name}", unit="image", delay=_PATIENCE, leave=False) as bar,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers,
        ):
            try:
                for image in workers.map(channels_first, files):
                    yield image
                    bar.update()
            finally:
                workers.shutdown(cancel_futures=True)  # do not wait for the rest after an error or Ctrl-C

    def _mapped(
        self, cache_dir: Path, name: str, files: Sequence[str], read: Read, depends: Sequence[str | int]
    ) -> Tensor:
        try:
            stats = [(file, stat.st_size, stat.st_mtime_ns) for file in files for stat in [os.stat(self.folder / file)]]
        except OSError as error:
            raise MisconfigurationException(f"{error.filename} cannot be read as an image: {error}") from error
        content = json.dumps(
            [_VERSION, PIL.__version__, str(self.folder.resolve()), self.size, list(depends), stats]
        ).encode()
        readable = re.sub(r"\W+", "-", name)
        path = cache_dir / f"{readable}-{hashlib.sha256(content).hexdigest()[:16]}.npy"
        shape = (len(files), 3, self.size, self.size)
        try:
            if (found := _open_mapped(path, shape)) is not None:
                return found
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if (found := _open_mapped(path, shape)) is not None:  # from another process
                    return found
                partial = path.with_suffix(".partial")
                try:
                    with open(partial, "wb") as file, closing(self._decoded(name, files, read)) as images:
                        _write(file, shape, images)
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)  # frees a full disk
        except OSError as error:
            raise MisconfigurationException(
                f"Cannot store images in cache_dir={str(cache_dir)!r}: {error}. They take "
                f"{np.prod(shape) / 2**20:.0f} MiB; choose another folder, or None to hold them in memory."
            ) from error
        found = _open_mapped(path, shape)
        assert found is not None
        return found


def _write(file: BinaryIO, shape: tuple[int, ...], images: Iterator[NDArray[np.uint8]]) -> None:
    """Write an array in NumPy's format image by image, so that it need not fit in memory."""
    np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for image in images:
        file.write(image.tobytes())
    file.flush()
    os.fsync(file.fileno())


def _open_mapped(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Memory-map the file as a tensor; ``None`` if it is missing or does not have the shape."""
    if not path.is_file():
        return None
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)  # copy on write, as PyTorch needs writable memory
    except (ValueError, EOFError):
        return None
    return torch.from_numpy(array) if array.shape == shape and array.dtype == np.uint8 else None
