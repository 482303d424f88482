"""Pools of decoded images: once, in memory or in a file that is complete or not there."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from pl_personalize.datamodules.image_files import center_square, read_rgb
from pl_personalize.datamodules.image_store import ImageStore

FILES = [f"{k}.png" for k in range(20)]


class Reader:
    """Counts what it decodes."""

    def __init__(self, fail_at=None, error=OSError):
        self.read, self.fail_at, self.error, self.lock = [], fail_at, error, threading.Lock()

    def __call__(self, path):
        if path.name == self.fail_at:
            raise self.error("broken")
        with self.lock:
            self.read.append(path.name)
        return center_square(read_rgb(path), 4)


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for k, name in enumerate(FILES):
        Image.new("RGB", (4, 4), (k, 2 * k, 3)).save(images / name)
    return images


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "deep"


def expected() -> torch.Tensor:
    colours = torch.tensor([(k, 2 * k, 3) for k in range(20)], dtype=torch.uint8)
    return colours.view(-1, 3, 1, 1).expand(-1, -1, 4, 4)


def contents(cache):
    return sorted(path.suffix for path in cache.iterdir())


@pytest.mark.parametrize("cached", [False, True])
def test_images_are_decoded_once_and_in_order(folder, cache, cached):
    store, reader = ImageStore(folder, 4, cache if cached else None), Reader()
    pool = store.pool("some", FILES, reader)
    assert torch.equal(pool, expected())
    assert pool.dtype == torch.uint8
    assert store.pool("some", FILES, reader) is pool
    assert sorted(reader.read) == sorted(FILES)


def test_a_second_store_decodes_nothing(folder, cache):
    ImageStore(folder, 4, cache).pool("some", FILES, Reader(), "x", 1)
    reader = Reader()
    assert torch.equal(ImageStore(folder, 4, cache).pool("some", FILES, reader, "x", 1), expected())
    assert reader.read == []
    assert contents(cache).count(".bin") == 1


def test_a_file_is_named_after_what_it_depends_on(folder, cache):
    def names(*depends, size=4, files=FILES):
        ImageStore(folder, size, cache).pool("some", files, lambda path: center_square(read_rgb(path), size), *depends)
        return {path.name for path in cache.glob("*.bin")}

    seen = [names(), names("x"), names("y"), names("x", 1), names(size=5), names(files=FILES[:3])]
    assert list(map(len, seen)) == [1, 2, 3, 4, 5, 6]
    Image.new("RGB", (4, 4)).save(folder / FILES[2])
    os.utime(folder / FILES[2], ns=(1, 1))
    assert len(names()) == 7
    assert len(names("x")) == 8


def test_another_folder_has_other_files(folder, cache, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")  # with the same times
    ImageStore(folder, 4, cache).pool("some", FILES, Reader())
    ImageStore(copy, 4, cache).pool("some", FILES, reader := Reader())
    assert sorted(reader.read) == sorted(FILES)


def test_who_comes_second_waits_for_the_first(folder, cache):
    started, reader = threading.Event(), Reader()

    def slow(path):
        started.set()
        time.sleep(0.01)
        return reader(path)

    with ThreadPoolExecutor(2) as workers:
        first = workers.submit(ImageStore(folder, 4, cache).pool, "some", FILES, slow)
        assert started.wait(60)
        second = workers.submit(ImageStore(folder, 4, cache).pool, "some", FILES, slow)
        assert torch.equal(first.result(), second.result())
    assert sorted(reader.read) == sorted(FILES)


def test_a_pool_may_have_any_name(folder, cache):
    ImageStore(folder, 4, cache).pool("in/../out: side", FILES, Reader())
    assert [path.name[:12] for path in cache.glob("*.bin")] == ["in-out-side-"]


def test_mapped_images_may_be_written_to_without_changing_the_file(folder, cache):
    ImageStore(folder, 4, cache).pool("some", FILES, Reader())[:] = 9
    assert torch.equal(ImageStore(folder, 4, cache).pool("some", FILES, Reader()), expected())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MisconfigurationException])
def test_what_an_interruption_leaves_is_written_anew(folder, cache, error):
    with pytest.raises(error):
        ImageStore(folder, 4, cache).pool("some", FILES, Reader(fail_at="17.png", error=error))
    assert contents(cache) == [".lock"]  # a full disk is not kept full
    assert torch.equal(ImageStore(folder, 4, cache).pool("some", FILES, Reader()), expected())


def test_what_a_killed_process_leaves_is_written_anew(folder, cache):
    ImageStore(folder, 4, cache).pool("some", FILES, Reader())
    (path,) = cache.glob("*.bin")
    path.rename(path.with_suffix(".partial")).write_bytes(b"half")
    assert torch.equal(ImageStore(folder, 4, cache).pool("some", FILES, Reader()), expected())
    assert contents(cache) == [".bin", ".lock"]


def test_after_an_error_the_rest_is_not_decoded(folder):
    reader = Reader(fail_at="0.png", error=ValueError)

    def slow(path):
        time.sleep(0.002)
        return reader(path)

    with pytest.raises(ValueError, match="broken"):
        ImageStore(folder, 4).pool("some", [FILES[0], *FILES[1:] * 50], slow)
    assert len(reader.read) < 200


@pytest.mark.parametrize("damage", ["truncated", "empty", "another array"])
def test_a_damaged_file_is_written_anew(folder, cache, damage):
    ImageStore(folder, 4, cache).pool("some", FILES, Reader())
    (path,) = cache.glob("*.bin")
    if damage == "another array":
        np.save(path, np.zeros(3))
    else:
        path.write_bytes(path.read_bytes()[: 300 if damage == "truncated" else 0])
    assert torch.equal(ImageStore(folder, 4, cache).pool("some", FILES, Reader()), expected())


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        MisconfigurationException, match=r"Cannot store images in cache_dir='.*/file': .* 0 MiB; choose"
    ):
        ImageStore(folder, 4, tmp_path / "file").pool("some", FILES, Reader())


@pytest.mark.parametrize("cached", [False, True])
def test_a_missing_file_is_named(folder, cache, cached):
    with pytest.raises(MisconfigurationException, match=r"none\.png cannot be read as an image"):
        ImageStore(folder, 4, cache if cached else None).pool("some", [*FILES, "none.png"], Reader())


@pytest.mark.parametrize("cached", [False, True])
def test_no_files_are_no_images(folder, cache, cached):
    assert ImageStore(folder, 4, cache if cached else None).pool("some", [], Reader()).shape == (0, 3, 4, 4)
