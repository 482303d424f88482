"""Batches that are lists of samples, as detectors take them."""

import pytest
import torch
from torch import nn

from pl_personalize import BatchNormStatistics, adapt_batchnorm
from pl_personalize.adaptation import estimate_batchnorm

WAYS = {
    "default": {},
    "at once": {"exact": True},
    "layer by layer": {"exact": True, "max_scratch_mb": 1e-6},
    "prior": {"prior_samples": 16},
    "exact with a prior": {"exact": True, "prior_samples": 16},
}
each_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


class Detector(nn.Module):
    """Takes a list of images of any sizes, padded to the largest; in training with a list of what is on each."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

    def forward(self, images, targets=None):
        assert targets is None or len(targets) == len(images)
        height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
        padded = images[0].new_zeros(len(images), 3, height, width)
        for row, image in zip(padded, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return self.head(self.bn(self.conv(padded)).relu()).mean((2, 3))


def detector():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Detector().double()


def images(number=13, sizes=((8, 8),)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *sizes[k % len(sizes)], generator=generator).double() + k / 5 for k in range(number)]


def split(items, size=8):
    return [items[start : start + size] for start in range(0, len(items), size)]


FORMS = {
    "images and targets": lambda part: (part, [{"boxes": torch.zeros(k % 3, 4)} for k in range(len(part))]),
    "images and nothing": lambda part: (part, [{}] * len(part)),
    "tuples": lambda part: (tuple(part), tuple({"label": 1} for _ in part)),
    "a dict": lambda part: {"images": part, "targets": [{"boxes": torch.zeros(1, 4)} for _ in part]},
}


def assert_close(found, expected):
    assert dict(found).keys() == dict(expected).keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@each_way
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_lists_of_images_count_as_stacked_images_do(form, options):
    """The size of a batch is neither the number of channels of its first image nor that of its parts."""
    parts = split(images())
    model = detector()
    expected = estimate_batchnorm(detector(), [torch.stack(part) for part in parts], **options)
    found = adapt_batchnorm(model, [form(part) for part in parts], **options)
    assert found.num_samples == expected.num_samples == 13
    assert_close(found, expected)
    assert_close(BatchNormStatistics.of(model), expected)


@torch.no_grad()
@pytest.mark.parametrize("prior", [0, 13])
def test_the_first_layer_has_the_moments_of_all_images(prior):
    model, pictures = detector(), images()
    seen = model.conv(torch.stack(pictures)).transpose(0, 1).flatten(1)
    found = adapt_batchnorm(model, [(part, [{}] * len(part)) for part in split(pictures)], prior_samples=prior)
    share = 1.0 if prior == 0 else 0.5
    torch.testing.assert_close(found["bn.running_mean"], share * seen.mean(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["bn.running_var"], share * seen.var(1) + 1 - share, rtol=1e-9, atol=1e-9)


@each_way
def test_lists_of_images_of_several_sizes(options):
    """The largest image is in each batch, so that each is padded to the same size."""
    pictures = images(12, sizes=[(6, 9), (9, 5), (7, 7)])
    padded = torch.zeros(12, 3, 9, 9).double()
    for row, image in zip(padded, pictures, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    expected = estimate_batchnorm(detector(), padded.split(6), **options)
    found = estimate_batchnorm(detector(), [(part, [{}] * 6) for part in split(pictures, 6)], **options)
    assert found.num_samples == 12
    assert_close(found, expected)
