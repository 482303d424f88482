"""Image files of every size and kind."""

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, pil_to_tensor, resize

from pl_personalize.datamodules.image_files import crop_centre, read_rgb, resize_shorter


def noise(width, height, seed=0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy())


def square(image, size):
    return crop_centre(resize_shorter(image, size), size)


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
    assert crop_centre(resized, 10).tolist() == [[[255, 0, 0]] * 10] * 10


def test_a_small_image_is_surrounded_by_black_where_it_is_not_resized():
    found = crop_centre(Image.new("RGB", (2, 4), (9, 9, 9)), 4)
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
    with pytest.raises(MisconfigurationException, match=r"deep\.png is grey with more than 8 bits; convert it to 8"):
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
