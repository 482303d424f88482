"""What rounding explains of a difference between gradients, and what it does not."""

import pytest
import torch

from pl_personalize.per_sample.comparison import beyond_rounding, rounding_of_sums

EPS = torch.finfo(torch.float32).eps


def wrong(errors, sizes, power=1, dtype=torch.float32, **options):
    return beyond_rounding(errors, sizes, dict.fromkeys(errors, 4), dtype, power, **options)


@pytest.mark.parametrize("power", [1, 2])
def test_a_thousandth_of_what_is_right(power):
    sizes = {"a.weight": 1.0, "b.weight": 2.0}
    assert wrong({"a.weight": 0.9e-3, "b.weight": 1.8e-3}, sizes, power) == []
    assert wrong({"a.weight": 1.1e-3, "b.weight": 1.8e-3}, sizes, power) == ["a.weight"]
    assert wrong({"a.weight": float("nan"), "b.weight": 0.0}, sizes, power) == ["a.weight"]


@pytest.mark.parametrize("power", [1, 2])
def test_where_the_true_gradient_is_zero_the_module_gives_the_scale(power):
    sizes = {"a.weight": 1.0, "a.bias": 0.0, "b.bias": 0.0}
    left = 0.9 * (8 * EPS) ** power
    assert wrong({"a.weight": 0.0, "a.bias": left, "b.bias": 0.0}, sizes, power) == []
    assert wrong({"a.weight": 0.0, "a.bias": 2 * left, "b.bias": left}, sizes, power) == ["a.bias", "b.bias"]
    assert wrong({"a.weight": 0.0, "a.bias": 0.0, "b.bias": left}, sizes, power, exhausted=["b.bias"]) == []


def test_what_is_left_of_a_sum_is_allowed_to_each_of_four_entries():
    sizes, left = {"a.weight": 1e-3, "a.bias": 0.0}, {"a.bias": 1e-4}
    assert wrong({"a.weight": 0.0, "a.bias": 1.9e-4}, sizes, left=left) == []
    assert wrong({"a.weight": 0.0, "a.bias": 2.1e-4}, sizes, left=left) == ["a.bias"]
    assert wrong({"a.weight": 1.9e-4, "a.bias": 0.0}, sizes, left=left) == ["a.weight"]


def test_what_is_left_of_a_square_grows_with_what_is_squared():
    gradient, rest = 1e-2, 1e-4  # of each of the four entries
    size, most = 2 * gradient**2, 2 * ((gradient + rest) ** 2 - gradient**2)
    for error, expected in ((0.99 * most, []), (1.2 * most, ["a.bias"])):
        assert wrong({"a.bias": error}, {"a.bias": size}, power=2, left={"a.bias": rest}) == expected
    assert wrong({"a.bias": 1.9 * rest**2}, {"a.bias": 0.0}, power=2, left={"a.bias": rest}) == []
    assert wrong({"a.bias": 2.1 * rest**2}, {"a.bias": 0.0}, power=2, left={"a.bias": rest}) == ["a.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
def test_rounding_of_a_sum_is_that_of_the_numbers_that_cancel(dtype, last):
    grad = torch.tensor([[[3.0, -3.0], [4.0, -4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]], dtype=dtype)
    grad = grad.transpose(1, 2) if last else grad
    mean_square = (6**2 + 8**2) / 3  # of the first sample, which has most
    assert rounding_of_sums(grad, 3) == pytest.approx(8 * torch.finfo(dtype).eps * mean_square**0.5)


def test_rounding_where_no_dimension_is_that_of_the_entries():
    grad = torch.tensor([[3.0, -5.0], [1.0, 1.0]])
    assert rounding_of_sums(grad, 4) == pytest.approx(8 * EPS * 8 / 4)
    assert rounding_of_sums(grad[:, 0], 4) == pytest.approx(8 * EPS * 3 / 4)


def test_rounding_of_what_has_no_size():
    assert rounding_of_sums(torch.tensor([[float("inf"), 1.0]]), 2) == 0.0
    assert rounding_of_sums(torch.tensor([[float("nan"), 1.0]]), 2) == 0.0
    assert rounding_of_sums(torch.zeros(2, 0), 2) == 0.0
    assert rounding_of_sums(torch.ones(2, 3), 0) == 0.0
    assert rounding_of_sums(torch.ones(2, 2).to_sparse(), 2) == 0.0
    assert 0 < rounding_of_sums(torch.full((1, 2, 100), 60000.0, dtype=torch.float16), 2) < 60000 * 100
