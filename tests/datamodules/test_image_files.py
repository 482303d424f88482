"""Image files of every size and kind."""

import struct
import zlib

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, pil_to_tensor, resize

from pl_personalize.datamodules.image_files import (
    center_square,
    files_below,
    is_image,
    passed_over,
    read_rgb,
    resize_shorter,
)


def noise(width, height, seed=0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy())


def square(image, size):
    return center_square(resize_shorter(image, size), size)


@pytest.mark.parametrize("shape", [(40, 40), (61, 40), (40, 61), (23, 99), (16, 16), (7, 9), (9, 7)])
@pytest.mark.parametrize("size", [16, 17])
def test_images_are_resized_and_cropped_as_torchvision_does(shape, size):
    image = noise(*shape)
    whole = resize(image, [size], InterpolationMode.BILINEAR, antialias=True)
    expected = pil_to_tensor(center_crop(whole, [size, size])).permute(1, 2, 0).numpy()
    assert np.array_equal(square(image, size), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 300), (300, 2), (1, 20_000)])
@pytest.mark.parametrize("size", [1, 8])
def test_odd_sizes_work(shape, size):
    assert square(noise(*shape), size).shape == (size, size, 3)


def test_of_a_very_long_image_the_middle_is_kept():
    image = Image.new("RGB", (1000, 2))
    image.paste((255, 0, 0), (490, 0, 510, 2))
    resized = resize_shorter(image, 10)
    assert resized.size == (80, 10)
    assert center_square(resized, 10).tolist() == [[[255, 0, 0]] * 10] * 10


def test_a_small_image_is_surrounded_by_black_where_it_is_not_resized():
    found = center_square(Image.new("RGB", (2, 4), (9, 9, 9)), 4)
    assert found[:, :, 0].tolist() == [[0, 9, 9, 0]] * 4


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 80, (80, 80, 80)),
        ("1", 1, (255, 255, 255)),
        ("LA", (80, 0), (80, 80, 80)),
        ("RGBA", (10, 20, 30, 128), (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (3, 2), colour).save(path)
    assert np.array_equal(read_rgb(path), np.broadcast_to(expected, (2, 3, 3)))


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 255])])
@pytest.mark.filterwarnings("error")
def test_palettes_become_rgb(tmp_path, transparency):
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 5, 6, 7])
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    assert np.array_equal(read_rgb(tmp_path / "a.png"), np.broadcast_to((5, 6, 7), (2, 3, 3)))


def test_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(
        MisconfigurationException, match=r"deep\.png is grayscale with more than 8 bits; convert it to 8"
    ):
        read_rgb(tmp_path / "deep.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_truncated_image_is_named(tmp_path, suffix, share):
    path = tmp_path / f"broken.{suffix}"
    noise(50, 50).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(MisconfigurationException, match=rf"broken\.{suffix} cannot be read as an image"):
        read_rgb(path)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(MisconfigurationException, match=r"a\.jpg cannot be read as an image"):
        read_rgb(tmp_path / "a.jpg")


# Which files are images


@pytest.mark.parametrize(
    "suffix",
    [
        *("png", "PNG", "Jpg", "jpeg", "jpe", "jfif", "gif", "bmp", "tif", "TIFF", "ppm", "pgm", "pbm", "webp", "avif"),
        *("jp2", "j2k", "mpo", "heic", "b.png"),
    ],
)
def test_images_are_told_by_their_suffix(suffix):
    assert is_image(f"a.{suffix}")
    assert is_image(f"class/a.{suffix}")


def test_a_blank_after_a_suffix_makes_no_other_suffix():
    assert is_image("a.png ")
    assert is_image("a.png\u00a0")


@pytest.mark.parametrize(
    "name",
    ["._a.png", ".a.png", "class/._a.png", ".png", ".DS_Store", "Thumbs.db", "a", "a.txt", "a.png.part", "a.ico"],
)
def test_hidden_files_and_others_are_no_images(name):
    assert not is_image(name)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_come_folder_by_folder_sorted_and_before_subfolders(tmp_path):
    touch(tmp_path, "z.png", "b/c.png", "B.png", "a.png", "b/a/x.txt", "b.png", "a/z.png")
    assert files_below(tmp_path) == ["B.png", "a.png", "b.png", "z.png", "a/z.png", "b/c.png", "b/a/x.txt"]


def test_files_come_as_torchvisions_image_folder_has_them(tmp_path):
    names = ["1.png", "10.png", "2.png", "a/1.png", "a/b/1.png", "a/b/0.png", "a/0.png", "b/1.png"]
    touch(tmp_path, *(f"class/{name}" for name in names))
    found = [path for path, _ in ImageFolder(tmp_path).samples]
    assert [str(tmp_path / "class" / name) for name in files_below(tmp_path / "class")] == found


@pytest.mark.parametrize("name", [".thumbnails", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"])
def test_folders_of_systems_are_passed_over(tmp_path, name):
    touch(tmp_path, "a.png", f"{name}/b.png", f"more/{name}/c.png")
    assert files_below(tmp_path) == ["a.png"]


def test_links_are_followed_but_not_round_and_round(tmp_path):
    touch(tmp_path, "here/a.png", "there/b.png")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "itself").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert files_below(tmp_path / "here") == ["a.png", "gone.png", "linked/b.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"The folder .*nothing cannot be read"):
        files_below(tmp_path / "nothing")


def test_other_suffixes_are_counted():
    said = passed_over(["a.txt", "b.TXT", "c.raw", "README", "d.png"])
    assert said.startswith("There are other files (1 with .raw, 2 with .txt, 1 with no suffix)")
    assert ".png, " in said
    assert passed_over(["d.png"]) == ""


# What is in them


@pytest.mark.parametrize(
    ("suffix", "tolerance"),
    [
        *((suffix, 0) for suffix in ("apng", "bmp", "dib", "gif", "pcx", "png", "pnm", "ppm", "sgi", "tga", "tif")),
        *((suffix, 0) for suffix in ("j2k", "jp2", "jpx", "qoi", "TIFF")),
        *((suffix, 6) for suffix in ("jfif", "jpe", "jpeg", "mpo", "webp", "avif")),
    ],
)
def test_every_format_gives_its_colours(tmp_path, suffix, tolerance):
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    image.paste((10, 220, 90), (0, 0, 8, 16))
    try:
        image.save(tmp_path / f"a.{suffix}")
    except (ValueError, KeyError, OSError):
        pytest.skip(f"This Pillow writes no {suffix}.")
    found = np.asarray(read_rgb(tmp_path / f"a.{suffix}"), int)
    assert abs(found[:, 12:] - (200, 100, 50)).max() <= tolerance
    assert abs(found[:, :4] - (10, 220, 90)).max() <= tolerance


@pytest.mark.parametrize("suffix", ["avif", "heic", "jxl", "tif"])
def test_a_format_that_pillow_does_not_read_is_named_with_the_way_out(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"of another program")
    with pytest.raises(MisconfigurationException, match=rf"a\.{suffix} cannot be read as an image: .*convert "):
        read_rgb(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_of_several_frames_the_first_counts(tmp_path, suffix):
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **options)
    assert np.array_equal(read_rgb(tmp_path / f"a.{suffix}"), np.broadcast_to((255, 0, 0), (4, 4, 3)))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_orientation_of_exif_is_ignored(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90°
    image = Image.new("RGB", (8, 16))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    found = np.asarray(read_rgb(tmp_path / f"a.{suffix}"))
    assert found.shape == (16, 8, 3)
    assert found[:8].min() > 250
    assert found[8:].max() < 5


def png_of_16_bits(path, values):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, row = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), zlib.compress(b"\0" + struct.pack(">3H", *values))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b""))


def test_colours_of_16_bits_are_brought_to_eight(tmp_path):
    values = [200 * 257, 100 * 257, 50 * 257]
    png_of_16_bits(tmp_path / "a.png", values)
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 65535\n" + struct.pack(">3H", *values))
    for name in ("a.png", "a.ppm"):
        assert np.asarray(read_rgb(tmp_path / name)).tolist() == [[[200, 100, 50]]], name


def test_a_jpeg_in_cmyk_has_the_colours_that_it_shows(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert abs(np.asarray(read_rgb(tmp_path / "a.jpg"), int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_more_than_8_bits_are_refused_in_every_mode(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "a.tif")
    with pytest.raises(MisconfigurationException, match=r"a\.tif is grayscale with more than 8 bits"):
        read_rgb(tmp_path / "a.tif")
