"""The objectives' gradients with respect to the logits, against autograd and by hand."""

import math

import pytest
import torch

from pl_personalize.functional.objectives import (
    draw_labels,
    expected_fisher_cotangents,
    fisher_cotangents,
    label_cotangent,
    mas_cotangent,
)

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [-40.0, 30.0, 2.0], [3.0, 1.0, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5, 4), (6,)])
def test_mas_is_the_gradient_of_the_squared_norm(shape):
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    right = torch.autograd.grad(logits.square().sum(), logits)[0]

    torch.testing.assert_close(mas_cotangent(logits.detach()), right)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_label_cotangent_is_the_gradient_of_the_negative_log_likelihood(dtype):
    logits, labels = LOGITS.clone().requires_grad_(), torch.tensor([0, 2, 1, 1])
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    right = torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(label_cotangent(LOGITS, labels.to(dtype)), right, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(torch.tensor([0, 3, 1, 1]), id="class too large"),
        pytest.param(torch.tensor([0, -100, 1, 1]), id="negative"),
        pytest.param(torch.tensor([0, 2, 1]), id="too few"),
        pytest.param(torch.tensor([0.5, 2.0, 1.0, 1.0]), id="no integers"),
        pytest.param(torch.tensor([1]), id="one for all"),
        pytest.param(torch.tensor([[0], [2], [1], [1]]), id="a column"),
        pytest.param(torch.tensor([[1, 0, 0]] * 4), id="one-hot"),
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(labels):
    with pytest.raises(ValueError, match="label"):
        label_cotangent(LOGITS, labels)


def test_expected_fisher_squares_sum_to_the_expectation_over_classes():
    chances = LOGITS.softmax(1)
    right = torch.zeros_like(LOGITS)
    for c in range(3):
        score = chances - torch.eye(3, dtype=torch.float64)[c]
        right += chances[:, c : c + 1] * score.square()

    directions = list(expected_fisher_cotangents(LOGITS))

    assert [d.shape for d in directions] == [LOGITS.shape] * 3
    torch.testing.assert_close(sum(d.square() for d in directions), right)
    # The variance of a Bernoulli variable: p (1 - p).
    torch.testing.assert_close(right, chances * (1 - chances))


def test_fisher_squares_sum_to_the_mean_over_draws():
    labels = draw_labels(LOGITS.softmax(1), 5, torch.Generator().manual_seed(4))
    right = sum(label_cotangent(LOGITS, labels[:, k]).square() for k in range(5)) / 5

    directions = list(fisher_cotangents(LOGITS, 5, torch.Generator().manual_seed(4)))

    assert len(directions) == 5
    torch.testing.assert_close(sum(d.square() for d in directions), right)


def test_sampled_labels_follow_the_softmax():
    draws = 20_000

    labels = draw_labels(LOGITS.softmax(1), draws, torch.Generator().manual_seed(1))

    assert labels.shape == (4, draws)
    shares = torch.stack([(labels == c).double().mean(1) for c in range(3)], dim=1)
    torch.testing.assert_close(shares, LOGITS.softmax(1), atol=5 * math.sqrt(0.25 / draws), rtol=0)


def test_sampled_labels_come_from_the_generator_alone():
    state = torch.get_rng_state()

    first, again, other = (draw_labels(LOGITS.softmax(1), 50, torch.Generator().manual_seed(s)) for s in (7, 7, 8))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_labels_come_from_the_global_generator_by_default():
    with torch.random.fork_rng():
        torch.manual_seed(7)

        assert torch.equal(
            draw_labels(LOGITS.softmax(1), 50, None),
            draw_labels(LOGITS.softmax(1), 50, torch.Generator().manual_seed(7)),
        )


MAPS = torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_label_cotangent_of_maps_is_that_of_the_sum_over_counted_positions():
    labels = torch.randint(0, 3, (2, 2, 4), generator=torch.Generator().manual_seed(0))
    labels[0, 1] = -100
    logits = MAPS.clone().requires_grad_()
    right = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), logits)[0]

    torch.testing.assert_close(label_cotangent(MAPS, labels, may_ignore=True), right, atol=1e-15, rtol=1e-12)
    with pytest.raises(ValueError, match="from -100 to"):
        label_cotangent(MAPS, labels)
    with pytest.raises(ValueError, match=r"one for each of 2 samples and its positions, \(2, 2, 4\)"):
        label_cotangent(MAPS, labels[:, 0])


def test_labels_of_maps_follow_the_softmax_of_each_position():
    labels = draw_labels(MAPS.softmax(1), 20_000, torch.Generator().manual_seed(1))

    assert labels.shape == (2, 2, 4, 20_000)
    shares = torch.stack([(labels == c).double().mean(-1) for c in range(3)], dim=1)
    torch.testing.assert_close(shares, MAPS.softmax(1), atol=5 * math.sqrt(0.25 / 20_000), rtol=0)


def test_expected_fisher_of_maps_has_one_direction_for_each_position_and_class():
    chances = MAPS.softmax(1)

    directions = list(expected_fisher_cotangents(MAPS))

    assert len(directions) == 2 * 4 * 3
    torch.testing.assert_close(sum(d.square() for d in directions), chances * (1 - chances))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_confident_label_keeps_its_relative_precision(dtype):
    """Less all others, not probability less 1: that would be 0 in the logits' type."""
    margin = {torch.float16: 10.0}.get(dtype, 25.0)
    logits, precision = torch.tensor([[margin, 0.0]], dtype=dtype), 4 * torch.finfo(dtype).eps
    chance = 1 / (1 + math.exp(-margin))
    right = torch.tensor([[-1.0, 1.0]], dtype=torch.float64) * math.exp(-margin) * chance

    score, expected = label_cotangent(logits, torch.tensor([0])), next(expected_fisher_cotangents(logits))

    assert (score.dtype, expected.dtype) == (dtype, dtype)
    torch.testing.assert_close(score.double(), right, rtol=precision, atol=0)
    torch.testing.assert_close(expected.double(), right * chance**0.5, rtol=precision, atol=0)
