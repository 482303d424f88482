"""The named collections of NumbersDataModule: tiny files in the real formats, from a server on localhost."""

import bz2
import gzip
import hashlib
import io
import socket
import struct
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

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


@pytest.fixture
def server(running_server, monkeypatch):
    point_to(monkeypatch, running_server, running_server.url)
    running_server.requests.clear()
    return running_server


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


def assert_names_it(error: pytest.ExceptionInfo, name: str, data_dir: Path) -> None:
    assert error.type is MisconfigurationException
    assert f"data set {name!r}" in str(error.value)
    assert str(data_dir.resolve()) in str(error.value)


# Fetching and reading


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_download_puts_every_file_in_its_place(server, tmp_path, name):
    fetched(tmp_path, name)
    for file in FILES[name]:
        assert (tmp_path / file).is_file()


@pytest.mark.parametrize("name", COLLECTIONS)
def test_the_server_has_the_training_images_value_by_value(server, tmp_path, name):
    found = server_data(fetched(tmp_path, name))
    assert_same_samples(found, normalized(name, server.pixels[name, "train"]), server.digits[name, "train"])


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_user_has_the_test_images_value_by_value(server, tmp_path, name):
    found = user_data(fetched(tmp_path, name))
    assert_same_samples(found, normalized(name, server.pixels[name, "test"]), server.digits[name, "test"])


def test_three_collections_are_three_users_and_one_server(server, tmp_path):
    data = fetched(tmp_path, *COLLECTIONS)
    assert data.users == COLLECTIONS
    for name in COLLECTIONS:
        expected = normalized(name, server.pixels[name, "test"])
        assert_same_samples(user_data(data, name), expected, server.digits[name, "test"])
    expected = np.concatenate([normalized(name, server.pixels[name, "train"]) for name in COLLECTIONS])
    digits = np.concatenate([server.digits[name, "train"] for name in COLLECTIONS])
    assert_same_samples(server_data(data), expected, digits)


def test_svhn_has_label_10_in_its_file_and_digit_0_in_memory(server, tmp_path):
    data = fetched(tmp_path, "svhn")
    stored = scipy.io.loadmat(tmp_path / "SVHN" / "test_32x32.mat")
    assert sorted(set(stored["y"].flatten().tolist())) == list(range(1, 11))
    zeros = stored["X"][2:30, 2:30, :, stored["y"][:, 0] == 10].transpose(3, 2, 0, 1)
    splits = data.user_split("svhn", "0-1")
    images, labels = (torch.cat(parts) for parts in zip(*splits, strict=True))
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    assert_same_samples((images[labels == 0], labels[labels == 0]), (zeros / 255 - 0.5) / 0.5, np.zeros(2))


def test_mnist_and_usps_have_three_equal_channels_and_svhn_has_not(server, tmp_path):
    data = fetched(tmp_path, *COLLECTIONS)
    equal = {name: bool((user_data(data, name)[0][:, :1] == user_data(data, name)[0]).all()) for name in COLLECTIONS}
    assert equal == {"mnist": True, "usps": True, "svhn": False}


def test_loaders_give_images_and_labels_of_a_fetched_collection(server, tmp_path):
    data = fetched(tmp_path, "svhn", task="0-1", user="svhn", batch_size=2)
    data.setup("fit")
    data.setup("test")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 28, 28)
    assert labels.dtype == torch.int64
    assert sum(len(batch[1]) for loader in data.test_dataloader() for batch in loader) == 10


# Fetching no more than is needed


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_second_call_does_not_fetch_again(server, tmp_path, name):
    data = fetched(tmp_path, name)
    assert {request.strip("/").removesuffix(".gz") for request in server.requests} == {
        Path(file).name for file in FILES[name]
    }
    server.requests.clear()
    data.prepare_data()
    server_data(data)
    user_data(data)
    fetched(tmp_path, name)
    assert server.requests == []


@pytest.mark.parametrize("name", COLLECTIONS)
def test_only_what_is_missing_is_fetched(server, tmp_path, name):
    fetched(tmp_path, name)
    (tmp_path / FILES[name][-1]).unlink()
    server.requests.clear()
    fetched(tmp_path, name)
    assert {request.strip("/").removesuffix(".gz") for request in server.requests} <= {Path(FILES[name][-1]).name}
    assert (tmp_path / FILES[name][-1]).is_file()


@pytest.mark.parametrize("name", COLLECTIONS)
def test_without_download_nothing_is_fetched_and_nothing_raised_if_all_is_there(server, tmp_path, name):
    fetched(tmp_path, name)
    server.requests.clear()
    data = NumbersDataModule(tmp_path, [name], max_per_source=None)
    data.prepare_data()
    assert_same_samples(user_data(data), normalized(name, server.pixels[name, "test"]), server.digits[name, "test"])
    assert server.requests == []


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_data_folder_below_home_is_one_folder(server, tmp_path, monkeypatch, name):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    data = fetched("~/data", name)
    assert len(user_data(data)[1]) == 20
    data = NumbersDataModule("~/data", [name])
    data.prepare_data()


# What goes wrong


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_wrong_md5_is_a_misconfiguration(server, tmp_path, monkeypatch, name):
    point_to(monkeypatch, server, server.url, md5="0" * 32)
    with pytest.raises(MisconfigurationException, match="Cannot download or read") as error:
        fetched(tmp_path, name)
    assert_names_it(error, name, tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_file_with_a_wrong_md5_is_not_taken_by_the_next_call(server, tmp_path, monkeypatch, name):
    point_to(monkeypatch, server, server.url, md5="0" * 32)
    for _ in range(3):  # the first may stop at the training file, and the second at the test file
        with pytest.raises(MisconfigurationException, match="Cannot download or read") as error:
            fetched(tmp_path, name)
        assert_names_it(error, name, tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_an_unreachable_server_is_a_misconfiguration(server, tmp_path, monkeypatch, name):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: every connection is refused
        point_to(monkeypatch, server, f"http://127.0.0.1:{unused.getsockname()[1]}/")
        with pytest.raises(MisconfigurationException, match="refused") as error:
            fetched(tmp_path, name)
    assert_names_it(error, name, tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_server_without_the_file_is_a_misconfiguration(server, tmp_path, monkeypatch, name):
    point_to(monkeypatch, server, f"{server.url}nowhere/")
    with pytest.raises(MisconfigurationException, match="404") as error:
        fetched(tmp_path, name)
    assert_names_it(error, name, tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"], ids=["nothing", "ssh"])
def test_a_server_that_does_not_speak_http_is_a_misconfiguration(server, tmp_path, monkeypatch, name, answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        point_to(monkeypatch, server, f"http://127.0.0.1:{listener.getsockname()[1]}/")
        with pytest.raises(MisconfigurationException) as error:
            fetched(tmp_path, name)
        thread.join(5)
    assert_names_it(error, name, tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_transfer_that_breaks_off_is_a_misconfiguration(server, tmp_path, monkeypatch, name):
    point_to(monkeypatch, server, f"{server.url}short/")
    with pytest.raises(MisconfigurationException, match="Cannot download or read") as error:
        fetched(tmp_path, name)
    assert_names_it(error, name, tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_after_a_transfer_that_broke_off_the_next_call_fetches_the_whole(server, tmp_path, monkeypatch, name):
    point_to(monkeypatch, server, f"{server.url}short/")
    with pytest.raises(MisconfigurationException):
        fetched(tmp_path, name)
    point_to(monkeypatch, server, server.url)
    found = user_data(fetched(tmp_path, name))
    assert_same_samples(found, normalized(name, server.pixels[name, "test"]), server.digits[name, "test"])


@pytest.mark.parametrize("length", [0, 2, 3, 10, 0.5, -1], ids=lambda length: f"length {length}")
@pytest.mark.parametrize("file", [file for name in COLLECTIONS for file in FILES[name][-2:]])
def test_a_truncated_file_is_a_misconfiguration(server, tmp_path, file, length):
    name = file.split("/", 1)[0].lower()
    fetched(tmp_path, name)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: length if length != 0.5 else len(content) // 2])
    data = NumbersDataModule(tmp_path, [name])
    data.prepare_data()
    read = server_data if "train" in file or file.endswith("usps.bz2") else user_data
    with pytest.raises(MisconfigurationException, match="Cannot read") as error:
        read(data)
    assert_names_it(error, name, tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_web_page_in_place_of_a_file_is_a_misconfiguration(server, tmp_path, name):
    fetched(tmp_path, name)
    (tmp_path / FILES[name][-1]).write_text("<!DOCTYPE html><html><body>Please log in.</body></html>")
    with pytest.raises(MisconfigurationException, match="Cannot read") as error:
        user_data(NumbersDataModule(tmp_path, [name]))
    assert_names_it(error, name, tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
@pytest.mark.parametrize("stage", ["prepare", "server", "user"])
def test_missing_files_are_named_with_the_two_ways_to_get_them(server, tmp_path, name, stage):
    data = NumbersDataModule(tmp_path, [name])
    with pytest.raises(MisconfigurationException, match=r"Download it with download=True .*, or put these") as error:
        {"prepare": data.prepare_data, "server": partial(server_data, data), "user": partial(user_data, data)}[stage]()
    assert_names_it(error, name, tmp_path)
    assert all(file in str(error.value) for file in FILES[name])
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", [file for name in COLLECTIONS for file in FILES[name]])
def test_of_several_files_only_the_missing_one_is_named(server, tmp_path, file):
    name = file.split("/", 1)[0].lower()
    fetched(tmp_path, name)
    (tmp_path / file).unlink()
    with pytest.raises(MisconfigurationException) as error:
        NumbersDataModule(tmp_path, [name]).prepare_data()
    assert_names_it(error, name, tmp_path)
    assert [other for other in FILES[name] if other in str(error.value)] == [file]


# Folders


COLOUR = (30, 60, 90)


def draw(mode: str) -> Image.Image:
    """One colour, in a mode of PIL."""
    if mode == "L":
        return Image.new("L", (32, 32), 60)
    if mode == "RGBA":
        return Image.new("RGBA", (32, 32), (*COLOUR, 128))
    return Image.new("RGB", (32, 32), COLOUR).convert(mode, palette=Image.Palette.ADAPTIVE)


@pytest.fixture
def folder(tmp_path):
    """A folder with one black image of each digit and split."""
    for split in ("train", "test"):
        for digit in range(10):
            (tmp_path / "own" / split / str(digit)).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "own" / split / str(digit) / "black.png")
    return tmp_path / "own"


def folder_image(folder: Path, digit: int = 4) -> np.ndarray:
    """The only test image of a digit."""
    images, digits = user_data(NumbersDataModule(sources=[folder]))
    assert digits.tolist().count(digit) == 1
    return images[digits == digit][0].numpy()


@pytest.mark.parametrize(("mode", "colour"), [("L", (60, 60, 60)), ("RGB", COLOUR), ("RGBA", COLOUR), ("P", COLOUR)])
def test_a_folder_may_have_images_of_any_mode(folder, mode, colour):
    image = draw(mode)
    assert image.mode == mode
    image.save(folder / "test" / "4" / "black.png")
    found = folder_image(folder)
    assert found.shape == (3, 28, 28)
    for channel, value in zip(found, colour, strict=True):
        np.testing.assert_allclose(channel, (value / 255 - 0.5) / 0.5, atol=1e-6)


def test_a_folder_image_of_32_by_32_is_cropped_to_its_middle(folder):
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "test" / "4" / "black.png")
    expected = normalized("own", pixels.transpose(2, 0, 1)[None])[0]
    np.testing.assert_allclose(folder_image(folder), expected, atol=1e-6)


def test_a_folder_image_of_16_by_16_is_doubled_bilinearly(folder):
    pixels = np.random.default_rng(2).integers(0, 16, (16, 16, 3), dtype=np.uint8) * 16
    Image.fromarray(pixels).save(folder / "test" / "4" / "black.png")
    expected = normalized("usps", pixels.transpose(2, 0, 1)[None])[0]
    np.testing.assert_allclose(folder_image(folder), expected, atol=1e-6)


def test_a_folder_image_that_is_larger_and_oblong_becomes_square(folder):
    pixels = np.zeros((40, 90, 3), dtype=np.uint8)
    pixels[:, :45, 0] = 200
    pixels[20:, :, 1] = 100
    Image.fromarray(pixels).save(folder / "test" / "4" / "black.png")
    grey = (folder_image(folder) * 0.5 + 0.5) * 255
    for column, value in ((0, 200), (12, 200), (15, 0), (27, 0)):
        np.testing.assert_allclose(grey[0, :, column], value, atol=1e-3)
    for row, value in ((0, 0), (12, 0), (15, 100), (27, 100)):
        np.testing.assert_allclose(grey[1, row], value, atol=1e-3)


def test_suffixes_may_be_upper_case(folder):
    (folder / "test" / "4" / "black.png").unlink()
    Image.new("RGB", (32, 32), COLOUR).save(folder / "test" / "4" / "A.PNG")
    assert folder_image(folder)[0, 0, 0] == pytest.approx((30 / 255 - 0.5) / 0.5, abs=1e-6)


def test_stray_files_in_a_folder_are_left_alone(folder):
    for stray in ("Thumbs.db", ".DS_Store", "notes.txt", "4.json"):
        (folder / "test" / "4" / stray).write_bytes(b"not an image")
        (folder / "test" / stray).write_bytes(b"not an image")
        (folder / stray).write_bytes(b"not an image")
    (folder / "test" / "more").mkdir()
    np.testing.assert_allclose(folder_image(folder), -1)
    assert sorted(user_data(NumbersDataModule(sources=[folder]))[1].tolist()) == list(range(10))


def test_a_digit_with_nothing_but_stray_files_is_named(folder):
    (folder / "test" / "7" / "black.png").rename(folder / "test" / "7" / "notes.txt")
    with pytest.raises(MisconfigurationException, match=r"has no images of the digits \[7\]"):
        user_data(NumbersDataModule(sources=[folder]))


def test_a_folder_with_nothing_but_stray_files_has_no_images(folder):
    for image in (folder / "test").rglob("*.png"):
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(MisconfigurationException, match="No images found in"):
        user_data(NumbersDataModule(sources=[folder]))


def test_a_grey_image_of_16_bits_is_scaled_or_refused_by_name(folder):
    path = folder / "test" / "4" / "black.png"
    Image.fromarray(np.full((32, 32), 60 * 257, dtype=np.uint16)).save(path)
    try:
        found = folder_image(folder)
    except MisconfigurationException as error:
        assert "4/black.png" in str(error)  # noqa: PT017
    else:
        np.testing.assert_allclose(found, (60 / 255 - 0.5) / 0.5, atol=1e-6)


def test_an_image_cut_off_anywhere_is_named(folder):
    path = folder / "test" / "4" / "black.png"
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    for length in (0, 10, 30, 40, 60, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:length])
        with pytest.raises(MisconfigurationException, match=r"4/black\.png cannot be read as an image"):
            user_data(NumbersDataModule(sources=[folder]))


def test_a_folder_beside_a_collection_is_normalized_on_its_own(server, tmp_path, folder):
    data = fetched(tmp_path, str(folder), "mnist")
    assert data.users == ("own", "mnist")
    np.testing.assert_allclose(user_data(data, "own")[0].numpy(), -1)
    expected = normalized("mnist", server.pixels["mnist", "test"])
    assert_same_samples(user_data(data, "mnist"), expected, server.digits["mnist", "test"])


# Which files of a folder


def test_hidden_companions_of_images_are_no_digits(folder):
    for name in ("._black.png", ".0-thumb.png", ".DS_Store", "Thumbs.db"):
        (folder / "test" / "4" / name).write_bytes(b"\0\5\x16\7" + bytes(60))
        (folder / "train" / "4" / name).write_bytes(b"\0\5\x16\7" + bytes(60))
    np.testing.assert_allclose(folder_image(folder), -1)
    data = NumbersDataModule(sources=[folder])
    assert sum(len(split.labels) for task in range(5) for split in data.server_split(task)) == 10


@pytest.mark.parametrize("suffix", ["tif", "gif", "ppm", "jfif", "jpe", "jp2", "TIFF"])
def test_every_suffix_of_an_image_is_read(folder, suffix):
    image = folder / "test" / "4" / "black.png"
    image.unlink()
    draw("RGB").save(image.with_suffix(f".{suffix}"))
    found = folder_image(folder)
    for channel, value in zip(found, COLOUR, strict=True):
        np.testing.assert_allclose(channel, (value / 255 - 0.5) / 0.5, atol=0.02)


def test_images_in_subfolders_are_read_after_the_others(folder):
    place = folder / "test" / "4"
    (place / "a" / "deeper").mkdir(parents=True)
    (place / ".cache").mkdir()
    for value, name in ((10, "z.png"), (20, "a/x.png"), (30, "a/deeper/y.png"), (99, ".cache/w.png")):
        Image.new("L", (32, 32), value).save(place / name)
    images, digits = NumbersDataModule(sources=[folder])._read(str(folder), False)
    assert images[digits == 4][:, 0, 0, 0].tolist() == [0, 10, 20, 30]


@pytest.mark.parametrize("name", ["broken.tif", "a/broken.JPG", "broken.heic"])
def test_a_broken_image_is_named_and_never_passed_over(folder, name):
    path = folder / "train" / "4" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"no image")
    with pytest.raises(MisconfigurationException, match=rf"4/{name} cannot be read as an image"):
        NumbersDataModule(sources=[folder]).server_split(2)


def test_a_folder_without_readable_images_says_what_is_there_and_what_is_read(folder):
    (folder / "test" / "7" / "black.png").rename(folder / "test" / "7" / "black.nef")
    with pytest.raises(MisconfigurationException, match=r"digits \[7\]\. .*1 with \.nef.*images end in .*\.png, "):
        user_data(NumbersDataModule(sources=[folder]))
    for image in (folder / "test").rglob("*.png"):
        image.rename(image.with_suffix(".raw"))
    with pytest.raises(MisconfigurationException, match=r"No images found in .*9 with \.raw"):
        user_data(NumbersDataModule(sources=[folder]))


@pytest.mark.parametrize("name", ["04", "4 ", "4\u00a0", "\uff14"])
def test_a_folder_that_writes_a_digit_otherwise_is_refused(folder, name):
    (folder / "train" / name).mkdir()
    draw("RGB").save(folder / "train" / name / "a.png")
    with pytest.raises(MisconfigurationException, match="rename it to '4' or move"):
        NumbersDataModule(sources=[folder]).server_split(2)


@pytest.mark.parametrize("name", ["10", "background", ".4"])
def test_folders_of_other_classes_are_left_alone(folder, name):
    (folder / "train" / name).mkdir()
    draw("RGB").save(folder / "train" / name / "a.png")
    data = NumbersDataModule(sources=[folder])
    assert sum(len(split.labels) for task in range(5) for split in data.server_split(task)) == 10
