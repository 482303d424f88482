"""Small scenes and a server with small collections, made once."""

import gzip
import shutil
import threading
from functools import partial
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from collection_server import (
    COLLECTIONS,
    COUNTS,
    SHAPES,
    Handler,
    Server,
    idx,
    libsvm,
    mat,
    point_to,
)
from scene_files import names_by_colour, write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder in MIT Indoor's layout; not to be changed."""
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def copy(scenes, tmp_path):
    """Scenes that may be changed."""
    return shutil.copytree(scenes, tmp_path / "copy")


@pytest.fixture(scope="session")
def scene_names(scenes):
    """The name of the image that has a colour."""
    return names_by_colour(scenes)


@pytest.fixture(scope="session")
def textured_scenes(tmp_path_factory):
    """The same with random images."""
    return write_scenes(tmp_path_factory.mktemp("textured"), textured=True)


@pytest.fixture
def plain_distortions(monkeypatch):
    """Distortions that say what they were asked for: the image's colour goes by user and seed."""
    from pl_personalize.datamodules import distortions

    calls = []

    def distort(image, name, *, severity=3, seed):
        calls.append((image.shape, name, severity, seed))
        distorted = image.copy()
        distorted[..., 2] = 10 * severity + distortions.DISTORTIONS.index(name)
        distorted[..., 1] = seed % 251
        return distorted

    monkeypatch.setattr(distortions, "distort", distort)
    return calls


@pytest.fixture(scope="module")
def running_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("served"))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        digits = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), COUNTS[split]))
        for name in COLLECTIONS:
            pixels = rng.integers(0, 256, (len(digits), *SHAPES[name]), dtype=np.uint8)
            # Twice the size is 9/16, 3/16, 3/16 and 1/16 of four pixels: with multiples of 16 there is nothing to round
            pixels = pixels // 16 * 16 if name == "usps" else pixels
            server.pixels[name, split], server.digits[name, split] = pixels, digits
        (server.folder / f"{split}_32x32.mat").write_bytes(mat(server.pixels["svhn", split], digits))
        usps = "usps.bz2" if split == "train" else "usps.t.bz2"
        (server.folder / usps).write_bytes(libsvm(server.pixels["usps", split], digits))
        prefix = "train" if split == "train" else "t10k"
        for part, array in (("images-idx3", server.pixels["mnist", split][:, 0]), ("labels-idx1", digits)):
            (server.folder / f"{prefix}-{part}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, server_data=server)) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        http.shutdown()
        thread.join()


@pytest.fixture
def server(running_server, monkeypatch):
    point_to(monkeypatch, running_server, running_server.url)
    running_server.requests.clear()
    return running_server
