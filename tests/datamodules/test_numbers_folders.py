"""Folders of images as sources of NumbersDataModule."""

from pathlib import Path

import numpy as np
import pytest
from collection_server import assert_same_samples, fetched, normalized, user_data
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from pl_personalize.datamodules import NumbersDataModule

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
