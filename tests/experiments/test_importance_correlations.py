"""Correlations of importances, with their ties, scales and degenerate rows."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats


@pytest.fixture
def correlations(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    return importlib.import_module("importance_study.pairs").correlations


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_correlations_are_those_of_scipy_at_any_scale(correlations, scale):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 200, generator=generator).mul(2).exp() * (torch.rand(4, 200, generator=generator) > 0.5)

    pearson, spearman = correlations(rows * scale)

    np.testing.assert_allclose(pearson, np.corrcoef(rows.double()), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(spearman, stats.spearmanr(rows, axis=1)[0], rtol=1e-10, atol=1e-12)


def test_constant_rows_have_no_correlation(correlations):
    for matrix in correlations(torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [1.0, 2.0, 4.0]])):
        assert np.isnan(matrix[:2]).all()
        assert np.isnan(matrix[2, :2]).all()
        assert matrix[2, 2] == pytest.approx(1.0)
