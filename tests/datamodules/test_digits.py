"""DigitsDataModule: who has which of the 1797 images, and what a camera does to them."""

import builtins
from collections import Counter
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits

from pl_personalize.datamodules import DigitsDataModule, digits
from pl_personalize.datamodules.digits import IMAGE_SHAPE, SERVER_PHOTOGRAPHS, photograph

TASKS = range(5)


@pytest.fixture
def numbered(monkeypatch):
    """Every image holds its own number, and the camera only adds a half to it."""
    images, target = torch.arange(1797.0).view(-1, 1, 1, 1).expand(-1, *IMAGE_SHAPE), digits._load_digits()[1]
    monkeypatch.setattr(digits, "_load_digits", lambda: (images, target))
    monkeypatch.setattr(digits, "photograph", lambda scan, seed: scan + 0.5)
    return DigitsDataModule


def numbers(split) -> list[float]:
    """The numbers, with a half for photographs; the normalisation undone."""
    return (split.images[:, 0, 0, 0] * 0.5 + 0.5).tolist()


def parts(data, task) -> dict[str, list[float]]:
    named = dict(zip(("train", "val"), data.server_split(task), strict=True))
    for user in data.users:
        named |= dict(zip((f"{user} adapt", f"{user} eval"), data.user_split(user, task), strict=True))
    return {name: numbers(split) for name, split in named.items()}


def test_tasks_and_users():
    data = DigitsDataModule()
    assert data.tasks == ("0-1", "2-3", "4-5", "6-7", "8-9")
    assert data.classes == (("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"), ("8", "9"))
    assert data.users == ("scan", "camera")
    assert data.num_classes() == 10


def test_every_digit_is_in_exactly_one_place(numbered):
    """The photographs of one digit too are all in one place: none is trained on and validated with."""
    data = numbered()
    everything = [int(n) for task in TASKS for split in parts(data, task).values() for n in set(split)]
    assert sorted(everything) == list(range(1797))


def test_only_the_server_has_several_photographs_of_a_digit(numbered):
    data = numbered()
    for task in TASKS:
        for name, split in parts(data, task).items():
            server = name in ("train", "val")
            assert set(Counter(n for n in split if n % 1).values()) <= {SERVER_PHOTOGRAPHS if server else 1}
            assert set(Counter(n for n in split if n % 1 == 0).values()) <= {1}


def test_labels_are_the_digits_place_in_the_task(numbered):
    data, target = numbered(), load_digits().target
    for task in TASKS:
        for split in (*data.server_split(task), *data.user_split(0, task), *data.user_split(1, task)):
            assert split.labels.dtype == torch.int64
            assert [2 * task + y for y in split.labels.tolist()] == [target[int(n)] for n in numbers(split)]


def test_who_sees_photographs(numbered):
    data = numbered()
    for task in TASKS:
        photographed = {name: [n % 1 == 0.5 for n in set(split)] for name, split in parts(data, task).items()}
        assert not any(photographed["scan adapt"] + photographed["scan eval"])
        assert all(photographed["camera adapt"] + photographed["camera eval"])
        for split in ("train", "val"):
            assert 0.3 < sum(photographed[split]) / len(photographed[split]) < 0.7
        server = photographed["train"] + photographed["val"]
        assert abs(2 * sum(server) - len(server)) <= 2


def test_sizes(numbered):
    data, target = numbered(), load_digits().target
    for task in TASKS:
        total = int(((target == 2 * task) | (target == 2 * task + 1)).sum())
        sizes = {name: len(set(split)) for name, split in parts(data, task).items()}
        server = sizes["train"] + sizes["val"]
        assert abs(server - total / 2) <= 2
        assert 0 <= 0.8 * server - sizes["train"] < 2
        for user in data.users:
            assert abs(sizes[f"{user} adapt"] + sizes[f"{user} eval"] - total / 4) <= 2
            assert 0 <= sizes[f"{user} adapt"] - sizes[f"{user} eval"] <= 1  # protocol 1.1: floor(n/2) to eval


def test_splits_follow_from_the_split_seed_alone():
    torch.manual_seed(1)
    first = DigitsDataModule(seed=0)
    torch.manual_seed(2)
    again, other = DigitsDataModule(seed=9, task=3, user=1), DigitsDataModule(split_seed=28)
    again.user_split(1, 4)  # the order in which splits are asked for does not matter

    for one, two, different in zip(
        [*first.server_split(1), *first.user_split(1, 2)],
        [*again.server_split(1), *again.user_split(1, 2)],
        [*other.server_split(1), *other.user_split(1, 2)],
        strict=True,
    ):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
        assert not torch.equal(one.images, different.images)


def test_images_are_normalised_rgb():
    data = DigitsDataModule()
    scans, cameras = data.user_split("scan", 0)[0].images, data.user_split("camera", 0)[0].images
    for images in (scans, cameras):
        assert images.shape[1:] == IMAGE_SHAPE
        assert images.dtype == torch.float32
        assert images.min() >= -1
        assert images.max() <= 1
    assert float(scans.min()) == -1
    assert torch.equal(scans[:, 0], scans[:, 2])
    assert not torch.equal(cameras[:, 0], cameras[:, 2])


def test_a_scan_is_the_handwritten_digit():
    """8×8 brought to 16×16: means over 2×2 pixels are near the original, and the order is scikit-learn's."""
    images, labels = digits._load_digits()
    original = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    small = torch.nn.functional.avg_pool2d(images[:, 0], 2)
    assert labels.tolist() == load_digits().target.tolist()
    assert float((small - original).abs().mean()) < 0.1
    nearest = torch.cdist(small[:300].flatten(1), original[:300].flatten(1)).argmin(1)
    assert nearest.tolist() == list(range(300))


# The camera


@pytest.fixture(scope="module")
def scan():
    return digits._load_digits()[0][7]


def test_a_photograph_depends_on_scan_and_seed_alone(scan):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = photograph(scan, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(photograph(scan.clone(), 3), one)
    assert not torch.equal(photograph(scan, 4), one)
    assert not torch.equal(photograph(scan.flip(2), 3), one)


def test_the_servers_photographs_of_a_digit_differ():
    train, _ = DigitsDataModule().server_split(0)
    photos = train.images[(train.images[:, 0] != train.images[:, 2]).flatten(1).any(1)]
    assert len(photos) > 100
    assert len({photo.numpy().tobytes() for photo in photos}) == len(photos)


def test_photographs_are_images_in_range_and_unlike_the_scan():
    scans = digits._load_digits()[0][:100]
    before = scans.clone()
    photos = torch.stack([photograph(scan, k) for k, scan in enumerate(scans)])

    assert torch.equal(scans, before)
    assert photos.shape == scans.shape
    assert photos.min() >= 0
    assert photos.max() <= 1
    assert photos.isfinite().all()
    assert float((photos - scans).abs().flatten(1).mean(1).min()) > 0.02
    channels = photos.flatten(2).mean(2)
    assert float((channels.amax(1) - channels.amin(1)).mean()) > 0.01  # coloured
    assert all(not torch.equal(a, b) for a, b in pairwise(photos))


def test_a_photograph_shows_the_digit():
    """What is bright in the scan is set off from what is dark, else there would be nothing to learn."""
    scans = digits._load_digits()[0][:100]
    photos = torch.stack([photograph(scan, k) for k, scan in enumerate(scans)]).mean(1).flatten(1)
    grey = scans.mean(1).flatten(1)
    correlation = torch.tensor(
        [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(grey, photos, strict=True)]
    )
    assert float(correlation.abs().min()) > 0.3


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    digits._load_digits.cache_clear()
    real = builtins.__import__

    def no_sklearn(name, *args, **options):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(MisconfigurationException, match=r"pip install 'pl-personalize\[experiments\]'"):
        DigitsDataModule(task=0).setup("fit")
