"""Correlations against scipy and numpy, with the ties, scales and degenerate rows that importances have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pl_personalize.functional.correlation import average_ranks, pearson_matrix, spearman_matrix


def importances(*shape, zeros=0.5, scale=1.0, seed=0, dtype=torch.float32):
    """Heavy-tailed, non-negative, and many exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=dtype).mul(2).exp() * scale
    return values * (torch.rand(*shape, generator=generator) >= zeros)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 50), (2, 3, 20)], ids=str)
def test_ranks_are_those_of_scipy(shape, dtype):
    values = importances(*shape).to(dtype)
    found = average_ranks(values)
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), stats.rankdata(values.double().numpy(), axis=-1))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_ranks_of_any_ties_are_those_of_scipy(values):
    found = average_ranks(torch.tensor(values))
    assert found.tolist() == stats.rankdata(values).tolist()
    assert float(found.sum()) == len(values) * (len(values) + 1) / 2


def test_ranks_are_exact_where_float32_would_not_be():
    found = average_ranks(torch.arange(2**24 + 3, dtype=torch.float64))
    assert found[-3:].tolist() == [2**24 + 1, 2**24 + 2, 2**24 + 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_matrices_are_those_of_numpy_and_scipy(zeros, scale, dtype):
    rows = importances(4, 500, zeros=zeros, scale=scale, dtype=dtype)
    reference = rows.double().numpy()
    assert np.allclose(pearson_matrix(rows).numpy(), np.corrcoef(reference), rtol=1e-10, atol=1e-12)
    assert np.allclose(spearman_matrix(rows).numpy(), stats.spearmanr(reference, axis=1)[0], rtol=1e-10, atol=1e-12)


def test_values_whose_squares_would_vanish_still_correlate():
    rows = importances(2, 100, zeros=0.0, dtype=torch.float64)
    tiny = rows * torch.tensor([[1e-200], [1e200]], dtype=torch.float64)
    torch.testing.assert_close(pearson_matrix(tiny), pearson_matrix(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-8])
@pytest.mark.parametrize("matrix", [pearson_matrix, spearman_matrix])
def test_a_constant_row_correlates_with_nothing(matrix, constant):
    rows = importances(3, 1000)
    rows[1] = constant
    found = matrix(rows)
    assert found[1].isnan().all()
    assert found[:, 1].isnan().all()
    torch.testing.assert_close(found[[0, 2]][:, [0, 2]], matrix(rows[[0, 2]]))


def test_rows_correlate_perfectly_with_themselves_and_never_more():
    rows = importances(3, 10_001)
    for matrix in (pearson_matrix, spearman_matrix):
        assert float(matrix(torch.cat([rows, -rows])).abs().max()) <= 1
        torch.testing.assert_close(matrix(rows).diagonal(), torch.ones(3, dtype=torch.float64))


def test_what_has_no_correlation_is_refused():
    with pytest.raises(ValueError, match=r"got the shape \(5,\)"):
        pearson_matrix(torch.ones(5))
    with pytest.raises(ValueError, match=r"got the shape \(3, 1\)"):
        spearman_matrix(torch.ones(3, 1))
    with pytest.raises(ValueError, match="A NaN has no rank; there are 1 among 4"):
        spearman_matrix(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
