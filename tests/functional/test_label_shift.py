"""Class priors of unlabelled samples, against QuaPy and closed forms."""

import pytest
import torch
from matplotlib import rc_context

from pl_personalize.functional.label_shift import bbse_priors, confusion, em_priors, label_shift_evidence


def drawn(priors, count=400, spread=1.5, seed=0):
    """Logits of samples with class priors under an equal source, calibrated by construction, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(priors), count, replacement=True, generator=generator)
    means = spread * torch.eye(len(priors), dtype=torch.float64)
    x = means[labels] + torch.randn(count, len(priors), generator=generator, dtype=torch.float64)
    return x @ means.T, labels


EQUAL = torch.full((3,), 1 / 3, dtype=torch.float64)


def test_em_is_quapys():
    with rc_context():  # which the import changes
        emq = pytest.importorskip("quapy.method.aggregative").EMQ
    logits, _ = drawn([0.7, 0.2, 0.1])
    expected, _ = emq.EM(EQUAL.numpy(), logits.softmax(1).numpy(), epsilon=1e-9)
    torch.testing.assert_close(em_priors(logits, EQUAL, tol=1e-10), torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_em_finds_the_priors_and_starts_from_other_sources():
    logits, _ = drawn([0.7, 0.2, 0.1], count=4000)
    found = em_priors(logits, EQUAL)
    torch.testing.assert_close(found, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), rtol=0, atol=0.03)
    source = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    torch.testing.assert_close(em_priors(logits + source.log(), source), found, rtol=0, atol=1e-4)


def test_pseudo_counts_draw_to_equal_priors():
    logits, _ = drawn([0.7, 0.2, 0.1])
    distances = [float((em_priors(logits, EQUAL, alpha=alpha) - EQUAL).abs().sum()) for alpha in (0, 10, 1000, 1e6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3


def test_harder_assignments():
    logits, labels = drawn([0.7, 0.2, 0.1])
    hard = em_priors(logits, EQUAL, scale=1e3)
    assigned = torch.bincount(logits.argmax(1), minlength=3) / len(labels)
    torch.testing.assert_close(hard, assigned.double(), rtol=0, atol=0.02)


def test_several_sets_at_once():
    sets = torch.stack([drawn(priors, count=80)[0] for priors in ([0.7, 0.2, 0.1], [0.1, 0.1, 0.8])])
    together = em_priors(sets, EQUAL, alpha=1, tol=1e-10)
    for one, found in zip(sets, together, strict=True):
        torch.testing.assert_close(em_priors(one, EQUAL, alpha=1, tol=1e-10), found, rtol=0, atol=1e-6)


def test_bbse_inverts_the_confusion():
    logits, labels = drawn([1 / 3] * 3, count=6000)
    matrix = confusion(logits, labels, torch.full((logits.shape[1],), 1 / logits.shape[1]))
    torch.testing.assert_close(matrix[1], logits[labels == 1].softmax(1).mean(0))
    priors = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(bbse_priors(matrix.T @ priors, matrix, EQUAL), priors)
    torch.testing.assert_close(bbse_priors(matrix.T @ priors, matrix, EQUAL, strength=1e6), EQUAL, rtol=0, atol=1e-4)
    user, _ = drawn([0.7, 0.2, 0.1], count=4000, seed=1)
    torch.testing.assert_close(bbse_priors(user.softmax(1).mean(0), matrix, EQUAL), priors, rtol=0, atol=0.04)


def test_the_evidence_of_a_shift():
    logits, _ = drawn([0.7, 0.2, 0.1])
    assert float(label_shift_evidence(logits, EQUAL, EQUAL)) == pytest.approx(0, abs=1e-9)
    best = label_shift_evidence(logits, EQUAL, em_priors(logits, EQUAL))
    priors = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    likelihood = ((logits.softmax(1) / EQUAL) @ priors).log().sum()
    assert float(best) >= float(label_shift_evidence(logits, EQUAL, priors)) == pytest.approx(2 * float(likelihood))
