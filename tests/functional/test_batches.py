"""What counts as a batch, its input, its labels and its logits."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from pl_personalize.functional.batches import (
    LABEL_KEYS,
    as_logits,
    batch_labels,
    batch_size,
    batch_tensors,
    call_model,
    concatenate_batches,
    copy_batch,
    has_listed_samples,
    join_batch,
    slice_batch,
    split_batch,
)

X = torch.arange(12.0).view(4, 3)
Y = torch.tensor([0, 1, 2, 0])


@dataclass
class _Sample:
    x: torch.Tensor
    name: str


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (X, 4),
        ((X, Y), 4),
        ([X], 4),
        ({"x": X, "labels": Y}, 4),
        ({"scale": torch.tensor(2.0), "ids": ["a", "b", "c", "d"], "x": X}, 4),
        (({"x": X}, Y), 4),
        (_Sample(X, "a"), 4),
        (X[:0], 0),
    ],
)
def test_batch_size_is_what_all_fields_agree_on(batch, size):
    assert batch_size(batch) == size


@pytest.mark.parametrize("batch", [torch.tensor(1.0), [], {}, ("text", 3)])
def test_a_batch_without_a_batch_dimension_is_refused(batch):
    with pytest.raises(ValueError, match=f"batch dimension; got {type(batch).__name__}"):
        batch_size(batch)


def test_batch_tensors_keeps_the_order():
    tensors = batch_tensors({"b": X, "a": [Y, ("text", X + 1)]})

    assert all(map(torch.equal, tensors, [X, Y, X + 1]))
    assert len(tensors) == 3


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], *({"x": X, key: Y} for key in LABEL_KEYS)])
def test_batch_labels(batch):
    assert batch_labels(batch) is Y


@pytest.mark.parametrize("batch", [X, (X,), [X], (X, "cat"), (X, None), {"x": X}])
def test_a_batch_without_labels_is_refused(batch):
    with pytest.raises(ValueError, match=f"true labels are needed.*{type(batch).__name__}"):
        batch_labels(batch)


class _Affine(nn.Module):
    def forward(self, x, shift=0.0):
        return 2 * x + shift


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, 2 * X),
        ((X, Y), 2 * X),
        ([X], 2 * X),
        ({"x": X, "labels": Y}, 2 * X),
        ({"shift": 1.0, "x": X, "y": Y, "target": Y}, 2 * X + 1),
    ],
)
def test_call_model(batch, expected):
    assert torch.equal(call_model(_Affine(), batch), expected)


@pytest.mark.parametrize("output", [X, SimpleNamespace(logits=X), {"logits": X, "loss": Y}])
def test_as_logits(output):
    assert as_logits(output) is X


@pytest.mark.parametrize("output", [(X, Y), {"scores": X}, SimpleNamespace(), None, torch.tensor(1.0)])
def test_an_output_without_logits_is_refused(output):
    with pytest.raises(ValueError, match=rf"must return .*logits.* {type(output).__name__}\. Pass forward="):
        as_logits(output)


def test_slicing_cuts_what_has_one_row_for_each_sample_and_nothing_else():
    mask, scale = torch.ones(3, 3), torch.tensor(2.0)
    batch = {"x": X, "nested": [Y, "text"], "mask": mask, "scale": scale}

    rows = split_batch(batch, 4)
    part = slice_batch(batch, 4, slice(1, 3))

    assert [id(row) for row in rows] == [id(X), id(Y)]
    assert torch.equal(part["x"], X[1:3])
    assert torch.equal(part["nested"][0], Y[1:3])
    assert part["nested"][1] == "text"
    assert part["mask"] is mask
    assert part["scale"] is scale
    assert batch["x"] is X


@pytest.mark.parametrize("batch", [X, (X, Y), [X, [Y]], {"x": X, "y": Y}, ({"x": X}, Y), _Sample(X, "a")])
def test_joining_the_split_rows_gives_the_batch(batch):
    doubled = join_batch(batch, 4, [2 * row for row in split_batch(batch, 4)])

    assert type(doubled) is type(batch)
    assert all(map(torch.equal, batch_tensors(doubled), [2 * tensor for tensor in batch_tensors(batch)]))
    assert torch.equal(batch_tensors(batch)[0], X)


def test_a_dict_that_is_no_set_of_keyword_arguments_is_explained():
    with pytest.raises(ValueError, match=r"entries \['image'\] .* of Linear: .*forward=lambda model, batch"):
        call_model(nn.Linear(2, 1), {"image": torch.zeros(1, 2), "label": torch.zeros(1)})


def test_a_list_of_clips_is_not_read_as_its_first_item():
    clips = [torch.zeros(16, 3, 4, 4) for _ in range(4)]
    with pytest.raises(ValueError, match=r"list of 4 tensors, the first of shape \(16, 3, 4, 4\).*Stack samples"):
        call_model(nn.Identity(), clips)
    assert call_model(nn.Identity(), clips[:2]) is clips[0]  # an image and its target


def test_packed_sequences_are_refused_by_name():
    batch = (pack_sequence([torch.ones(3), torch.ones(2)]), torch.tensor([3, 2]))
    for refuse in (lambda: slice_batch(batch, 2, slice(0, 1)), lambda: copy_batch(batch)):
        with pytest.raises(ValueError, match=r"PackedSequence cannot be divided.*padded"):
            refuse()


# Batches of more than tensors with rows


def _images(count, channels=3, size=5):
    return [torch.full((channels, size, size + k % 2), float(k)) for k in range(count)]


_Pair = namedtuple("_Pair", ["x", "y"])


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        pytest.param((_images(8), [{}] * 8), 8, id="detector"),
        pytest.param((tuple(_images(8)), tuple({"boxes": torch.zeros(k % 3, 4)} for k in range(8))), 8, id="zipped"),
        pytest.param((_images(4), [{"boxes": torch.zeros(3, 4)}] * 4), 4, id="as many boxes as channels"),
        pytest.param((_images(3), [{}] * 3), 3, id="as many images as channels"),
        pytest.param((_images(2), ["a", "b"]), 2, id="names"),
        pytest.param(([torch.zeros(8, 2), torch.zeros(8, 5)], torch.zeros(8)), 8, id="towers"),
        pytest.param(([torch.zeros(2, 5), torch.zeros(2, 5)], torch.zeros(2)), 2, id="two towers of two"),
        pytest.param((X, {"name": ["a", "b", "c", "d"], "box": [Y, Y]}), 4, id="collated dict of lists"),
        pytest.param((X, [("a", "b", "c", "d"), ("e", "f", "g", "h")]), 4, id="collated pairs of strings"),
        pytest.param((X, Y, torch.tensor(2.0), 3, None, "text"), 4, id="what says nothing"),
        pytest.param({"x": X, "positions": torch.zeros(1, 3)}, 4, id="a constant that broadcasts"),
        pytest.param((X[:1], Y[:1]), 1, id="one sample"),
        pytest.param(_Pair(X, Y), 4, id="named tuple"),
        pytest.param(UserDict(x=X, y=Y), 4, id="mapping"),
        pytest.param((X, torch.zeros(9, 6)), 4, id="boxes of all"),
        pytest.param({"x": X, "targets": torch.zeros(9, 6)}, 4, id="boxes of all, in a dict"),
        pytest.param({"positions": torch.zeros(1, 9), "x": X}, 4, id="a constant in front"),
        pytest.param({"text": ["a", "b"]}, 2, id="strings alone"),
        pytest.param((X, X.shape), 4, id="a shape"),
        pytest.param((torch.zeros(1, 3, 8, 8), torch.zeros(5, 4)), 1, id="one image and its boxes"),
        pytest.param({"x": X, "positions": torch.zeros(1, 9)}, 4, id="a constant that broadcasts"),
        pytest.param([torch.zeros(8, 3, 5, 5) for _ in range(3)], 8, id="three collated views"),
        pytest.param([{"x": X}, {"y": Y}], 4, id="collated dicts of inputs and targets"),
        pytest.param((pack_sequence([torch.ones(3), torch.ones(2)]), torch.tensor([3, 2])), 2, id="packed sequence"),
        pytest.param([torch.zeros(8, 3, 5, 5), torch.zeros(8)], 8, id="collated pair"),
        pytest.param(tuple(torch.zeros(8, 3, 5, 5) for _ in range(3)), 8, id="three views"),
    ],
)
def test_the_size_of_batches_of_all_forms(batch, size):
    assert batch_size(batch) == size


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3), "boxes": torch.zeros(5, 4)}, "'pixel_values': 1, 'boxes': 5"),
        ({"boxes": torch.zeros(5, 4), "pixel_values": torch.zeros(1, 3)}, "'pixel_values': 1, 'boxes': 5"),
        ({"edge_index": torch.zeros(2, 7), "x": torch.zeros(10, 3)}, "'edge_index': 2, 'x': 10"),
        ((X, Y, torch.ones(3)), "item 0: 4, item 1: 4, item 2: 3"),
        ((X, Y, [0.5, 0.5]), "item 0: 4, item 1: 4, item 2: 2"),
        ((X, {"a": Y, "b": Y[:3]}, Y), "item 1: several sizes"),
        ((_images(8),), "may be one of 3 or 8 samples"),
        (_images(8), "may be one of 3 or 8 samples"),
        ([{"x": torch.zeros(3)}, {"x": torch.zeros(3)}], "may be one of 2 or 3 samples"),
        ([(torch.zeros(3, 5, 5), 1), (torch.zeros(3, 5, 5), 0)], "may be one of 2 or 3 samples"),
    ],
)
def test_a_batch_of_unclear_size_is_refused_by_its_fields(batch, message):
    with pytest.raises(ValueError, match=message):
        batch_size(batch)


def test_slicing_takes_the_items_of_lists_of_samples():
    images, names = _images(4), ("a", "b", "c", "d")
    batch = {"images": images, "names": names, "y": Y}

    part, picked = slice_batch(batch, 4, slice(1, 3)), slice_batch(batch, 4, [3, 0])

    assert [id(image) for image in part["images"]] == [id(image) for image in images[1:3]]
    assert part["names"] == ("b", "c")
    assert torch.equal(part["y"], Y[1:3])
    assert picked["names"] == ("d", "a")
    assert picked["images"][0] is images[3]
    assert has_listed_samples(batch, 4)
    assert not has_listed_samples({"x": X, "names": names}, 4)


def test_slicing_leaves_towers_together_even_where_they_are_as_many_as_samples():
    towers = [torch.arange(4.0).view(2, 2), torch.arange(6.0).view(2, 3)[:, :2]]

    (first, second), y = slice_batch((towers, Y[:2]), 2, slice(1, 2))

    assert torch.equal(first, towers[0][1:])
    assert torch.equal(second, towers[1][1:])
    assert torch.equal(y, Y[1:2])


def test_images_as_many_as_channels_are_images():
    images = _images(3)

    part, _ = slice_batch((images, [{}] * 3), 3, slice(0, 2))

    assert len(part) == 2
    assert part[0] is images[0]


def test_batches_with_lists_are_concatenated():
    images, names = _images(5), ["a", "b", "c", "d", "e"]
    batches = [(images[:3], names[:3], "train"), (images[3:], names[3:], "train")]

    whole = concatenate_batches(batches)

    assert [id(image) for image in whole[0]] == [id(image) for image in images]
    assert whole[1:] == (names, "train")
    assert batch_size(whole) == 5
    assert concatenate_batches([batches[0], (images[3:], names[3:], "test")]) is None


# Where the labels are


@dataclass
class _Labelled:
    x: torch.Tensor
    target: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "labels"),
    [
        ((X, X, Y), 2),
        ((X, X, Y), -1),
        ((X, X, Y), lambda batch: batch[2]),
        ({"x": X, "y": X, "mine": Y}, "mine"),
        (_Labelled(X, Y), "target"),
        (_Pair(X, Y), "y"),
    ],
)
def test_labels_are_where_they_are_said_to_be(batch, labels):
    assert batch_labels(batch, labels) is Y


@pytest.mark.parametrize(
    ("batch", "labels", "message"),
    [
        ((X, X, Y), None, r"batch of 3 items \(tuple\).*labels=2"),
        (_Labelled(X, Y), None, "_Labelled.*labels="),
        ({"label": X, "y": Y}, None, "label and y.*labels="),
        ((X, Y), 2, "no tensor 2"),
        ({"x": X}, "mine", "no tensor 'mine'"),
        (_Labelled(X, Y), "label", "no tensor 'label'"),
        ((X, Y), lambda batch: batch[1].tolist(), "returned no tensor"),
    ],
)
def test_labels_that_are_not_there_or_not_clear_are_refused(batch, labels, message):
    with pytest.raises(ValueError, match=message):
        batch_labels(batch, labels)


def test_a_key_of_labels_is_no_argument_of_the_model():
    assert torch.equal(call_model(_Affine(), {"x": X, "mine": Y}, "mine"), 2 * X)


def test_an_object_as_a_batch_needs_a_forward():
    with pytest.raises(ValueError, match=r"type _Labelled.*forward=lambda"):
        call_model(_Affine(), _Labelled(X, Y))
