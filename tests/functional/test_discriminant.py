"""Linear discriminant analysis against scikit-learn, and calibration against known answers."""

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from pl_personalize.functional.discriminant import (
    ClassMoments,
    Linear,
    best_factors,
    best_scale,
    calibration,
    combined,
    linear_discriminant,
)


def samples(count=200, classes=4, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator) % 3 % classes  # unequal frequencies
    labels[:classes] = torch.arange(classes)
    centers = 2 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing
    return centers[labels] + noise + 5, labels


@pytest.mark.parametrize("shrinkage", [0.001, 0.3, 0.95])
def test_it_is_scikit_learns_classifier(shrinkage):
    features, labels = samples()
    found = linear_discriminant(ClassMoments.of(features, labels, 4), shrinkage)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features.numpy(), labels.numpy())
    expected = torch.from_numpy(oracle.predict_log_proba(features.numpy()))
    torch.testing.assert_close(found(features).log_softmax(1), expected, rtol=1e-8, atol=1e-8)


def test_full_shrinkage_is_the_nearest_mean():
    features, labels = samples()
    moments = ClassMoments.of(features, labels, 4)
    found = linear_discriminant(moments, 1.0)
    variance = moments.within.diagonal().mean()
    distances = torch.cdist(features, moments.means).square() / (2 * variance)
    expected = (moments.priors.log() - distances).log_softmax(1)
    torch.testing.assert_close(found(features).log_softmax(1), expected)


def test_moments_add_up_over_batches():
    features, labels = samples()
    whole = ClassMoments.of(features, labels, 4)
    parts = [ClassMoments.of(f, y, 4) for f, y in zip(features.split(33), labels.split(33), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    for one, other in zip(whole, total, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(whole.minus(parts[0]), ClassMoments.of(features[33:], labels[33:], 4), strict=True):
        torch.testing.assert_close(one, other)
    centered = torch.cat([features[labels == k] - features[labels == k].mean(0) for k in range(4)])
    within = centered.T @ centered
    torch.testing.assert_close(whole.within, within / len(labels))


def test_a_covariance_that_is_singular_without_shrinkage():
    features, labels = samples(count=10, width=30)
    moments = ClassMoments.of(features, labels, 4)
    assert linear_discriminant(moments, 0.0) is None
    assert torch.isfinite(linear_discriminant(moments, 0.1).weight).all()


def calibrated(count=20_000, seed=1):
    """Logits, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_the_scale_undoes_a_temperature():
    logits, labels = calibrated()
    assert best_scale(logits / 4, labels) == pytest.approx(4, rel=0.03)
    assert best_factors([logits / 4], labels) == [best_scale(logits / 4, labels)]


def test_separable_samples_have_a_finite_scale():
    logits = torch.eye(3, dtype=torch.float64).repeat(5, 1)
    assert 1 < best_scale(logits, torch.arange(3).repeat(5)) < 10


def test_two_maps_are_combined():
    logits, labels = calibrated()
    first = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    factors = best_factors([first, (logits - first) / 2], labels)
    assert factors == pytest.approx([1, 2], rel=0.05)
    one, two = (Linear(torch.full((2, 3), value), torch.full((2,), value)) for value in (1.0, 10.0))
    assert combined([one, two], [2, 3]).weight.unique().tolist() == [32]
    assert combined([one, two], [2, 3]).bias.unique().tolist() == [32]


def test_calibration_finds_scale_and_bias():
    logits, labels = calibrated()
    bias = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    scale, shift = calibration((logits - bias) / 2, labels)
    assert scale == pytest.approx(2, rel=0.03)
    torch.testing.assert_close(shift, bias, rtol=0, atol=0.1)
    few = calibration((logits - bias)[:30] / 2, labels[:30], strength=1e6)
    torch.testing.assert_close(few[1], torch.zeros_like(bias), rtol=0, atol=1e-3)
