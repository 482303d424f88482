"""Rows of pools: what an index gives, and that nothing is copied before."""

import pytest
import torch

from pl_personalize.datamodules import ImageRows, LabelledImages
from pl_personalize.datamodules.labelled_images import concatenate, join, random_split

FIRST, SECOND = torch.arange(6).view(6, 1, 1, 1), torch.arange(100, 104).view(4, 1, 1, 1)


def values(images) -> list[int]:
    return images.flatten().tolist()


def both() -> ImageRows:
    return join([ImageRows([FIRST], torch.tensor([5, 1])), ImageRows([SECOND], torch.tensor([3, 0, 3]))])


def test_rows_are_read_by_index_slice_and_number():
    images = both()
    assert images.shape == (5, 1, 1, 1)
    assert len(images) == 5
    assert images.dtype == torch.int64
    assert values(images[torch.tensor([2, 0, 4, 1])]) == [103, 5, 103, 1]
    assert values(images[1:4]) == [1, 103, 100]
    assert [values(images[k]) for k in (0, 3, -1)] == [[5], [100], [103]]
    assert images[torch.tensor([], dtype=torch.long)].shape == (0, 1, 1, 1)


def test_a_choice_of_a_choice_shares_the_pools():
    images = both().select(torch.tensor([4, 1]))
    assert values(images[:]) == [103, 1]
    assert images.pools[0] is FIRST
    assert images.pools[1] is SECOND


def test_a_common_pool_stays_one():
    joined = join([ImageRows([FIRST], torch.tensor([k])) for k in range(6)])
    assert len(joined.pools) == 1
    assert values(joined[:]) == list(range(6))


def test_different_sizes_are_refused():
    with pytest.raises(ValueError, match="one image shape and dtype"):
        ImageRows([FIRST, torch.zeros(2, 3, 1, 1)], torch.tensor([0]))


def test_sets_are_concatenated_and_divided_without_copies():
    parts = [LabelledImages(ImageRows([pool], torch.arange(4)), torch.arange(4)) for pool in (FIRST, SECOND)]
    whole = concatenate(parts)
    first, rest = random_split(whole, 0.5, 1)
    assert first.images.pools[0] is FIRST
    plain = random_split(LabelledImages(whole.images[:], whole.labels), 0.5, 1)
    for found, expected in zip((first, rest), plain, strict=True):
        assert torch.equal(found.images[:], expected.images)
        assert torch.equal(found.labels, expected.labels)


def test_tensors_and_rows_do_not_mix():
    with pytest.raises(TypeError, match="all tensors or all ImageRows"):
        concatenate([LabelledImages(FIRST, torch.arange(6)), LabelledImages(both(), torch.arange(5))])
