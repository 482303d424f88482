"""The named collections of NumbersDataModule: tiny files in the real formats, from a server on localhost."""

import socket
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from collection_server import (
    COLLECTIONS,
    FILES,
    assert_same_samples,
    fetched,
    normalized,
    point_to,
    server_data,
    user_data,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.datamodules import NumbersDataModule


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
