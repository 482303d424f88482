import numpy as np
import pytest
import torch

from pl_personalize.functional.labels import class_labels

PLAIN = [0, 2, 1, 2]


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64],
)
def test_every_type_of_whole_numbers_is_converted(dtype):
    for labels in (torch.tensor(PLAIN, dtype=dtype), torch.tensor(PLAIN, dtype=dtype)[:, None]):
        found = class_labels(labels, 3)
        assert found.dtype == torch.int64
        assert found.tolist() == PLAIN


@pytest.mark.parametrize(
    "labels",
    [
        PLAIN,
        tuple(PLAIN),
        [[k] for k in PLAIN],
        [float(k) for k in PLAIN],
        [torch.tensor(k) for k in PLAIN],
        np.array(PLAIN),
        np.array(PLAIN, dtype=np.uint16),
        np.array(PLAIN, dtype=">i4"),
        np.array(PLAIN, dtype=np.float32)[:, None],
    ],
)
def test_arrays_and_lists_are_converted(labels):
    found = class_labels(labels, 3)
    assert found.dtype == torch.int64
    assert found.tolist() == PLAIN


@pytest.mark.parametrize("labels", [[True, False], torch.tensor([True, False]), np.array([True, False])])
def test_truth_values_are_two_classes(labels):
    assert class_labels(labels, 2).tolist() == [1, 0]


def test_right_labels_are_not_copied():
    labels = torch.tensor(PLAIN)
    assert class_labels(labels, 3) is labels


@pytest.mark.parametrize("labels", [[], torch.zeros(0), torch.zeros(0, 1)])
def test_no_labels_are_no_labels(labels):
    found = class_labels(labels, 2)
    assert (found.dtype, found.shape) == (torch.int64, (0,))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 4], r"label 3 \(of sample 1\) is no class of the task, which has 3: labels range from 0 to 2 .*\.$"),
        ([0, -1], r"label -1 \(of sample 1\)"),
        ([255] * 4, r"label 255 \(of sample 0\).*to 2 within a task\.$"),
        ([1, 2, 3], r"label 3 .*These seem to count from 1: subtract 1\."),
        ([4, 6, 5], r"label 4 .*These seem to be numbered across all tasks: subtract 4\."),
        ([0.0, 0.5], r"label 0\.5 \(of sample 1\) is no whole number"),
        ([0.0, float("nan")], "label nan"),
        ([float("inf")], "label inf"),
        (torch.eye(3), r"got the shape \(3, 3\)\. If they are one-hot, pass argmax\(1\)"),
        (torch.zeros(4, 2), r"got the shape \(4, 2\)\.$"),
        (torch.tensor(1), r"got the shape \(\)"),
        (["cat", "dog"], "labels must be whole numbers; got a list of <U3"),
        (None, "labels must be whole numbers; got a NoneType of object"),
        ([[0], [1, 2]], "labels must be"),
        (torch.tensor([1j]), "labels must be whole numbers; got torch.complex64"),
    ],
)
def test_what_is_no_label_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        class_labels(labels, 3, offset=4)


def test_one_label_may_be_without_a_class():
    labels = torch.tensor([0, -100, 1])
    assert class_labels(labels, 2, ignored=-100) is labels
    with pytest.raises(ValueError, match=r"label 2 \(of sample 2\)"):
        class_labels(torch.tensor([0, -100, 2]), 2, ignored=-100)
