"""What counts as a batch, its input, its labels and its logits."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pl_personalize.functional.batches import (
    LABEL_KEYS,
    as_logits,
    batch_labels,
    batch_size,
    batch_tensors,
    call_model,
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
        ({"scale": torch.tensor(2.0), "ids": ["a", "b"], "x": X}, 4),
        (({"x": X}, Y), 4),
        (_Sample(X, "a"), 4),
        (X[:0], 0),
    ],
)
def test_batch_size_is_the_length_of_the_first_tensor_with_a_dimension(batch, size):
    assert batch_size(batch) == size


@pytest.mark.parametrize("batch", [torch.tensor(1.0), [], {}, ("text", 3)])
def test_a_batch_without_a_batch_dimension_is_refused(batch):
    with pytest.raises(ValueError, match=f"batch dimension; got {type(batch).__name__}"):
        batch_size(batch)


def test_batch_tensors_keeps_the_order():
    tensors = batch_tensors({"b": X, "a": [Y, ("text", X + 1)]})

    assert all(map(torch.equal, tensors, [X, Y, X + 1]))
    assert len(tensors) == 3


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], [X, Y, X], *({"x": X, key: Y} for key in LABEL_KEYS)])
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
