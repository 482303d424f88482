"""Metrics by hand."""

import copy
import math

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.metrics import TaskAccuracyMatrix, average_accuracy, forgetting

NAN = math.nan
# Model by task; what lies above the diagonal must not matter to the two means.
MATRIX = torch.tensor([[0.9, 0.1, NAN], [0.7, 0.8, NAN], [0.5, 0.9, 1.0]])


def _labels(*values):
    return torch.tensor(values)


def _filled():
    matrix = TaskAccuracyMatrix(num_tasks=2)
    matrix.update(_labels(0, 1, 1, 0), _labels(0, 1, 0, 0), model=0, task=0)
    matrix.update(_labels(1), _labels(0), model=0, task=0)
    matrix.update(_labels(2, 2), _labels(2, 1), model=1, task=0)
    matrix.update(_labels(3, 3, 3), _labels(3, 3, 3), model=1, task=1)
    return matrix


def test_matrix_pools_batches_of_any_size():
    torch.testing.assert_close(
        _filled().compute(), torch.tensor([[0.6, NAN], [0.5, 1.0]]), equal_nan=True, rtol=0, atol=1e-7
    )


def test_an_empty_batch_counts_nothing():
    matrix = TaskAccuracyMatrix(num_tasks=2)
    matrix.update(_labels(), _labels(), model=1, task=0)
    matrix.update(_labels(1), _labels(0), model=1, task=1)

    torch.testing.assert_close(matrix.compute(), torch.tensor([[NAN, NAN], [NAN, 0.0]]), equal_nan=True)


def test_counts_beyond_the_integers_of_float32():
    matrix = TaskAccuracyMatrix(num_tasks=1)
    matrix.correct += 2**24
    matrix.total += 2**25
    matrix.update(_labels(1), _labels(1), model=0, task=0)

    assert matrix.correct.item() == 2**24 + 1
    assert matrix.compute().item() == pytest.approx(0.5)


def test_reset_forgets():
    matrix = _filled()
    matrix.compute()
    matrix.reset()
    matrix.update(_labels(1), _labels(1), model=0, task=0)

    torch.testing.assert_close(matrix.compute(), torch.tensor([[1.0, NAN], [NAN, NAN]]), equal_nan=True)


def test_merging_states_adds_the_counts():
    matrix, other = _filled(), TaskAccuracyMatrix(num_tasks=2)
    other.update(_labels(1, 1, 1), _labels(0, 0, 1), model=0, task=0)

    matrix.merge_state(other)

    torch.testing.assert_close(matrix.compute(), torch.tensor([[4 / 8, NAN], [0.5, 1.0]]), equal_nan=True)


def test_states_are_summed_over_processes():
    assert set(_filled()._reductions) == {"correct", "total"}
    ranks = torch.stack([_filled().total, _filled().total])

    assert all(torch.equal(reduce(ranks), 2 * ranks[0]) for reduce in _filled()._reductions.values())


def test_forward_returns_the_batch_and_adds_to_the_whole():
    matrix = _filled()

    batch = matrix(_labels(0, 0, 0, 0, 0), _labels(0, 0, 0, 0, 1), model=0, task=0)

    assert batch[0, 0].item() == pytest.approx(0.8)
    assert matrix.compute()[0, 0].item() == pytest.approx(7 / 10)


def test_a_copy_keeps_the_counts():
    matrix = copy.deepcopy(_filled())

    torch.testing.assert_close(matrix.compute(), _filled().compute(), equal_nan=True)


@pytest.mark.parametrize("index", [-1, 2, 100])
@pytest.mark.parametrize("what", ["model", "task"])
def test_an_index_out_of_range_is_refused(what, index):
    matrix = TaskAccuracyMatrix(num_tasks=2)

    with pytest.raises(MisconfigurationException, match=rf"{what} must be in 0\.\.1; got {index}"):
        matrix.update(_labels(1), _labels(1), **{"model": 0, "task": 0, what: index})

    assert not matrix.total.any()


@pytest.mark.parametrize("num_tasks", [0, -3])
def test_there_is_at_least_one_task(num_tasks):
    with pytest.raises(MisconfigurationException, match=f"num_tasks must be 1 or more; got {num_tasks}"):
        TaskAccuracyMatrix(num_tasks=num_tasks)


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        pytest.param(torch.zeros(3, 3), torch.zeros(3), id="logits instead of classes"),
        pytest.param(torch.zeros(3), torch.zeros(3, 1), id="a column"),
        pytest.param(torch.zeros(1), torch.zeros(3), id="one for all"),
        pytest.param(torch.zeros(2), torch.zeros(3), id="too few"),
    ],
)
def test_predictions_of_another_shape_are_refused(predictions, labels):
    """They would be broadcast: an accuracy of 300 %, or of something else."""
    matrix = TaskAccuracyMatrix(num_tasks=1)

    with pytest.raises(MisconfigurationException, match="shape"):
        matrix.update(predictions, labels, model=0, task=0)


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert average_accuracy(MATRIX).item() == pytest.approx((0.5 + 0.9 + 1.0) / 3)


@pytest.mark.parametrize(("divisor", "expected"), [("tasks", (0.4 - 0.1) / 3), ("earlier", (0.4 - 0.1) / 2)])
def test_forgetting_compares_the_diagonal_with_the_last_row(divisor, expected):
    assert forgetting(MATRIX, divisor).item() == pytest.approx(expected)


def test_forgetting_is_divided_by_the_number_of_tasks_by_default():
    assert forgetting(MATRIX).item() == pytest.approx(0.1)


@pytest.mark.parametrize("divisor", ["tasks", "earlier"])
def test_a_single_task_forgets_nothing(divisor):
    assert forgetting(torch.tensor([[0.7]]), divisor).item() == 0.0


def test_a_missing_accuracy_is_not_hidden():
    matrix = MATRIX.clone()
    matrix[2, 0] = NAN

    assert math.isnan(average_accuracy(matrix))
    assert math.isnan(forgetting(matrix))


def test_an_unknown_divisor_is_refused():
    with pytest.raises((ValueError, MisconfigurationException), match=r"divisor.*'task'"):
        forgetting(MATRIX, "task")
