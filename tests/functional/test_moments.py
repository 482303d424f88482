"""Moments of channels: additive, in float64, and what means and variances follow from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pl_personalize.functional.moments import channel_moments, mean_and_variance, pooled_statistics

SHAPES = [(5, 3), (1, 3), (4, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 2), (3, 1, 2)]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_equal_a_loop_over_channels(shape, dtype):
    x = drawn(*shape).to(dtype)
    found = channel_moments(x)
    assert found.dtype == torch.float64
    assert found.shape == (3, shape[1])
    for channel in range(shape[1]):
        values = [float(v) for v in x[:, channel].flatten()]
        assert found[0, channel] == len(values)
        assert float(found[1, channel]) == pytest.approx(sum(values), rel=1e-12, abs=1e-12)
        assert float(found[2, channel]) == pytest.approx(sum(v * v for v in values), rel=1e-12)


def test_memory_layout_does_not_matter():
    x = drawn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channel_moments(last), channel_moments(x), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(channel_moments(x.transpose(2, 3)), channel_moments(x), rtol=1e-14, atol=1e-14)


def test_a_batch_without_samples_counts_nothing():
    assert channel_moments(torch.zeros(0, 3, 4)).tolist() == [[0.0] * 3] * 3


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_moments_add_up_over_batches(sizes, seed):
    x = drawn(sum(sizes), 2, 3, seed=seed)
    parts = sum(channel_moments(part) for part in x.split(sizes))
    torch.testing.assert_close(parts, channel_moments(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unbiased", [True, False])
def test_mean_and_variance_are_those_of_torch(shape, unbiased):
    x = drawn(*shape) * 3 + 7
    rows = x.transpose(0, 1).flatten(1)
    mean, variance = mean_and_variance(channel_moments(x), unbiased=unbiased)
    torch.testing.assert_close(mean, rows.mean(1), rtol=1e-12, atol=1e-12)
    expected = rows.var(1, unbiased=unbiased) if rows.shape[1] > 1 else torch.zeros(shape[1], dtype=torch.float64)
    torch.testing.assert_close(variance, expected, rtol=1e-10, atol=1e-12)


def test_running_statistics_of_a_train_mode_layer_are_the_unbiased_ones():
    x, layer = drawn(4, 3, 5), nn.BatchNorm1d(3, momentum=1.0).double()
    layer(x)
    mean, variance = mean_and_variance(channel_moments(x), unbiased=True)
    torch.testing.assert_close(mean, layer.running_mean)
    torch.testing.assert_close(variance, layer.running_var)


@pytest.mark.parametrize("unbiased", [True, False])
def test_a_single_value_has_variance_zero(unbiased):
    mean, variance = mean_and_variance(channel_moments(torch.tensor([[3.0, -2.0]])), unbiased=unbiased)
    assert mean.tolist() == [3.0, -2.0]
    assert variance.tolist() == [0.0, 0.0]


def test_a_constant_channel_has_no_negative_variance():
    """E[x²] - E[x]² rounds to either side of zero."""
    for value in (0.1, 1 / 3, 1e3 / 7, -12345.678):
        _, variance = mean_and_variance(channel_moments(torch.full((7, 1), value)), unbiased=True)
        assert 0 <= float(variance) <= 1e-15 * value**2 * 10


def test_float32_data_far_from_zero_lose_nothing():
    """Sums in float32 would leave no digit of this variance."""
    x = (drawn(4000, 2) + 1000).float()
    mean, variance = mean_and_variance(channel_moments(x), unbiased=True)
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, x.double().var(0), rtol=1e-7, atol=0)


@given(
    sizes=st.lists(st.just(6), min_size=1, max_size=4),
    shifts=st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_pooled_statistics_are_those_of_the_mixture(sizes, shifts, seed):
    """Of sources of one size, with biased variances: exactly those of all samples together."""
    parts = [drawn(n, 3, seed=seed + k) + shifts[k] for k, n in enumerate(sizes)]
    mean, variance = pooled_statistics([p.mean(0) for p in parts], [p.var(0, unbiased=False) for p in parts])
    joined = torch.cat(parts)
    torch.testing.assert_close(mean, joined.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variance, joined.var(0, unbiased=False), rtol=1e-10, atol=1e-12)


def test_pooled_statistics_keep_the_dtype_and_are_computed_in_float64():
    means = [torch.tensor([10000.0]), torch.tensor([10001.0])]
    mean, variance = pooled_statistics(means, [torch.tensor([0.5]), torch.tensor([1.5])])
    assert (mean.dtype, variance.dtype) == (torch.float32, torch.float32)
    assert (mean.item(), variance.item()) == (10000.5, 1.25)


def test_one_source_stays_what_it_is():
    mean, variance = pooled_statistics([torch.tensor([0.1, -3.0])], [torch.tensor([0.3, 0.0])])
    assert mean.tolist() == torch.tensor([0.1, -3.0]).tolist()
    assert variance.tolist() == torch.tensor([0.3, 0.0]).tolist()
