"""Standardisation and random parts of batches."""

import pytest
import torch
from torchvision.transforms.v2 import Normalize

from pl_personalize.datamodules.scenes import normalize, random_crops


def noise(n=6, side=24) -> torch.Tensor:
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_images_are_normalized_as_for_networks_of_imagenet():
    images = noise()
    expected = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])(images / 255)
    assert torch.allclose(normalize(images), expected, atol=1e-6)
    assert images.dtype == torch.uint8


def test_random_crops_follow_from_the_seed():
    images = noise()
    before, state = images.clone(), torch.get_rng_state()
    found = random_crops(images, 3)
    assert torch.equal(found, random_crops(images, 3))
    assert not torch.equal(found, random_crops(images, 4))
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_crops_are_parts_of_the_sizes_and_ratios_of_training():
    """On ramps over both axes, the ends of a part tell where it lies."""
    side, n = 240, 300
    ramp = torch.arange(side, dtype=torch.uint8).expand(side, side)
    image = torch.stack([ramp, ramp.T, torch.zeros_like(ramp)])
    found = random_crops(image.expand(n, -1, -1, -1), 1).float()
    width = (found[:, 0, 0, -1] - found[:, 0, 0, 0]).abs() + 1
    height = (found[:, 1, -1, 0] - found[:, 1, 0, 0]).abs() + 1
    area, ratio = width * height / side**2, width / height

    assert float(area.min()) == pytest.approx(0.08, abs=0.03)
    assert float(area.max()) > 0.9
    assert float(area.mean()) == pytest.approx(0.52, abs=0.05)
    assert 0.72 < float(ratio.min()) < 0.8
    assert 1.25 < float(ratio.max()) < 1.38
    mirrored = found[:, 0, 0, -1] < found[:, 0, 0, 0]
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.1)
    assert bool((found[:, 1, -1, 0] > found[:, 1, 0, 0]).all())  # never upside down


@pytest.mark.parametrize("side", [1, 2, 3])
def test_random_crops_of_tiny_images_work(side):
    assert random_crops(noise(8, side), 0).shape == (8, 3, side, side)
