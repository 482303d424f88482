"""Covariate shift of features."""

import torch

from pl_personalize.functional.discriminant import Linear
from pl_personalize.functional.feature_shift import (
    CameraShifts,
    covariate_statistic,
    nearest_centers,
    outside_directions,
    span_basis,
    standardized,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_directions_are_outside_the_span_with_unit_variance():
    mixing = normal(12, 12)
    within, span = mixing.T @ mixing, span_basis(normal(3, 12, seed=1))
    rows = outside_directions(within, span, 5)
    torch.testing.assert_close(rows @ span.T, torch.zeros(5, 3, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(rows @ within @ rows.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    inside = torch.eye(12, dtype=torch.float64) - span.T @ span
    largest = torch.linalg.eigvalsh(inside @ within @ inside).flip(0)[:5]
    torch.testing.assert_close(1 / rows.square().sum(1), largest, rtol=1e-4, atol=0)
    assert outside_directions(within, span, 100).shape == (9, 12)
    assert outside_directions(within, torch.eye(12, dtype=torch.float64), 5).shape == (0, 12)


def test_the_basis_of_dependent_rows():
    rows = normal(2, 6)
    basis = span_basis(torch.cat([rows, rows.sum(0, keepdim=True)]))
    assert basis.shape == (2, 6)
    torch.testing.assert_close(rows @ basis.T @ basis, rows)


def test_clusters_are_found():
    points = torch.cat([normal(30, 4), normal(30, 4, seed=1) + 20, normal(30, 4, seed=2) - 20])
    found = nearest_centers(points, 3)
    assert [len(found[start : start + 30].unique()) for start in (0, 30, 60)] == [1, 1, 1]
    assert len(found.unique()) == 3
    assert len(nearest_centers(points[:2], 5).unique()) == 2


def test_the_statistic_is_the_number_of_directions_without_a_shift_and_counts_the_larger_variance():
    scores, std = normal(500, 50, 8), torch.ones(8, dtype=torch.float64)
    assert abs(float(covariate_statistic(scores, std, 50).mean()) - 8) < 1
    shifted = covariate_statistic(scores[0] + 1, std, 50)
    assert shifted > 8 * 50 * 0.5
    noisy = covariate_statistic(10 * scores[0], std, 50)
    torch.testing.assert_close(noisy, covariate_statistic(scores[0], 0.1 * std, 50))


def test_a_standardized_head_is_the_head_on_standardized_features():
    head, features = Linear(normal(3, 5), normal(3, seed=1)), 3 * normal(40, 5, seed=2) + 2
    source_mean, source_std = normal(5, seed=3), normal(5, seed=4).abs() + 0.5
    mean, std = features.mean(0), features.std(0)
    folded = standardized(head, mean, std, source_mean, source_std)
    torch.testing.assert_close(folded(features), head((features - mean) / std * source_std + source_mean))


def test_dead_features_do_not_blow_up():
    head, zero = Linear(normal(3, 2), normal(3)), torch.zeros(2, dtype=torch.float64)
    for std, source in ((zero, zero), (zero, zero + 1)):
        assert torch.equal(standardized(head, zero, std, zero, source).weight, head.weight)
    torch.testing.assert_close(standardized(head, zero, zero + 1, zero, zero).weight, 0.1 * head.weight)


def test_cameras_predict_the_part_of_a_shift_that_a_class_mix_hides():
    span = span_basis(normal(3, 20))
    before = normal(200, 20, seed=1)
    moves, scales = normal(6, 20, seed=2), 0.1 * normal(6, 20, seed=3)
    after = [(before - before.mean(0)) * scales[k].exp() + before.mean(0) + moves[k] for k in range(6)]
    cameras = CameraShifts.of(before, after)
    torch.testing.assert_close(cameras.shifts, moves)
    torch.testing.assert_close(cameras.log_ratios, scales)
    mix = 5 * normal(3, seed=4) @ span  # what a class mix adds, inside the span
    shift, ratio = cameras.predict(0.5 * moves[1] + 0.5 * moves[4] + mix, span, before.std(0), strength=1e-9)
    torch.testing.assert_close(shift, 0.5 * (moves[1] + moves[4]), rtol=0, atol=1e-5)
    torch.testing.assert_close(ratio, (0.5 * (scales[1] + scales[4])).exp(), rtol=0, atol=1e-5)
    assert len(cameras.select(torch.tensor([0, 2])).shifts) == 2
