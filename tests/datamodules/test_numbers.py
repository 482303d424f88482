"""NumbersDataModule on small files in the real layouts."""

import pytest
import torch
from digit_files import write_mnist, write_photos
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.datamodules import NumbersDataModule


@pytest.fixture
def data_dir(tmp_path):
    """MNIST as torchvision has it, and a folder of colour images; every image has its digit as its brightness."""
    write_mnist(tmp_path)
    write_photos(tmp_path / "photos")
    return tmp_path


def numbers(data_dir, **options) -> NumbersDataModule:
    return NumbersDataModule(data_dir, [str(data_dir / "photos"), "mnist"], **options)


def test_each_source_is_a_user_named_after_it(data_dir):
    data = numbers(data_dir)
    assert data.users == ("photos", "mnist")
    assert data.tasks == ("0-1", "2-3", "4-5", "6-7", "8-9")


def test_images_are_normalized_as_in_the_protocol(data_dir):
    data = numbers(data_dir, max_per_source=None)
    mnist = torch.cat([split.images for split in data.user_split("mnist", "4-5")])
    photos = torch.cat([split.images for split in data.user_split("photos", "4-5")])
    assert mnist.shape == photos.shape == (8, 3, 28, 28)
    expected = {round((digit / 255 - 0.1307) / 0.3081, 4) for digit in (4, 5)}
    assert {round(float(value), 4) for value in mnist.unique()} == expected
    assert {round(float(value), 4) for value in photos[:, 1].unique()} == {
        round((10 * digit / 255 - 0.5) / 0.5, 4) for digit in (4, 5)
    }
    assert photos[:, 2].unique().tolist() == [1.0]


def test_server_and_users_have_the_sizes_of_the_protocol(data_dir):
    data = numbers(data_dir)
    train, val = data.server_split(0)
    assert (len(train.labels), len(val.labels)) == (19, 5)  # floor(0.8 * 24), the rest
    adapt, evaluation = data.user_split("mnist", 0)
    assert (len(adapt.labels), len(evaluation.labels)) == (4, 4)
    assert set(torch.cat([train.labels, val.labels]).tolist()) == {0, 1}


def test_the_cap_is_for_each_task_and_source(data_dir):
    train, val = numbers(data_dir, max_per_source=5).server_split("8-9")
    images = torch.cat([train.images, val.images])
    assert len(images) == 10
    assert int((images[:, 2] == 1).all((1, 2)).sum()) == 5  # the photographs


def test_labels_belong_to_their_images(data_dir):
    images, labels = numbers(data_dir).user_split("photos", "6-7")[0]
    found = ((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long() - 6
    assert torch.equal(found, labels)


def test_each_seed_may_have_a_division_of_its_own(data_dir):
    data = numbers(data_dir, split_seed="seed", user=0)
    first, again, other = data.view(seed=1, user=0), data.view(seed=1, user=0), data.view(seed=2, user=0)

    for load in (lambda view: view.server_split(0)[0], lambda view: view.user_split(0, 0)[0]):
        assert torch.equal(load(first).images, load(again).images)
        assert not torch.equal(load(first).images, load(other).images)
    assert first.view(user=0).server_split(0)[0].images is first.server_split(0)[0].images
    expected = numbers(data_dir, split_seed=2).server_split(0)[0].images
    assert torch.equal(other.server_split(0)[0].images, expected)


def test_splits_follow_from_the_split_seed(data_dir):
    first, second, other = (numbers(data_dir, split_seed=seed).server_split(0)[0] for seed in (1, 1, 2))
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.labels, other.labels) or not torch.equal(first.images, other.images)


def test_a_missing_collection_is_named_with_the_two_ways_to_get_it(tmp_path):
    data = NumbersDataModule(tmp_path, ["mnist"], task=0)
    with pytest.raises(
        MisconfigurationException, match=r"'mnist' is not in .*MNIST/raw/train-.*download=True.*torchvision"
    ):
        data.setup("fit")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"has no folder train and no folder test in .*/none"):
        NumbersDataModule(tmp_path, [str(tmp_path / "none")]).server_split(0)


def test_a_digit_without_images_is_named(data_dir):
    for path in (data_dir / "photos" / "test" / "7").iterdir():
        path.unlink()
    with pytest.raises(MisconfigurationException, match=r"has no images of the digits \[7\]"):
        numbers(data_dir).user_split("photos", 0)


def test_an_unreadable_image_is_named(data_dir):
    (data_dir / "photos" / "train" / "3" / "2.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(MisconfigurationException, match=r"3/2\.png cannot be read as an image"):
        numbers(data_dir).server_split(0)


@pytest.mark.parametrize("sources", [[], ["mnist", "mnist"]])
def test_sources_are_distinct(data_dir, sources):
    with pytest.raises(MisconfigurationException, match="sources must be one or more with different names"):
        NumbersDataModule(data_dir, sources)
