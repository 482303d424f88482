"""Pooled moments, prior samples, and batches of a single value."""

import copy

import pytest
import torch
import torch.nn.functional as F
from adaptation_cases import (
    NETWORKS,
    SPLITS,
    TINY,
    TOLERANCES,
    assert_close,
    assert_identical,
    made,
    naive_statistics,
    norms,
    one_train_batch,
    state,
)
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize import BatchNormStatistics, adapt_batchnorm
from pl_personalize.adaptation import estimate_batchnorm

# The default


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [2, 3, 2, 4]], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_default_pools_moments_over_batches_that_normalise_by_themselves(name, sizes, dtype):
    model, x = made(name, dtype=dtype)
    expected = naive_statistics(model, x.split(sizes))
    found = adapt_batchnorm(model.train(), x.split(sizes))
    assert_close(found, expected, TOLERANCES[dtype])
    assert_close({n: v for n, v in model.state_dict().items() if n in found}, expected, TOLERANCES[dtype])
    assert found.num_samples == 11


def test_the_first_layer_depends_on_no_batch_size_and_later_ones_do():
    """What the documentation says of the default."""
    model, x = made("rows")
    whole, small = estimate_batchnorm(model, [x]), estimate_batchnorm(model, x.split([3, 3, 3, 2]))
    torch.testing.assert_close(small["1.running_mean"], whole["1.running_mean"])
    torch.testing.assert_close(small["1.running_var"], whole["1.running_var"])
    assert (small["5.running_var"] - whole["5.running_var"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_with_a_single_batch_the_default_is_exact(name):
    model, x = made(name)
    assert_close(estimate_batchnorm(model, [x]), estimate_batchnorm(model, x.split([4, 7]), exact=True), 1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_momentum_and_old_statistics_do_not_matter(exact):
    model, x = made("images")
    expected = estimate_batchnorm(model, x.split([4, 4, 3]), exact=exact)
    for momentum in (None, 0.0, 0.5, 1.0):
        for layer in norms(model).values():
            layer.momentum = momentum
            layer.running_mean.add_(1)
            layer.running_var.mul_(3)
            layer.num_batches_tracked.add_(5)
        assert_identical(estimate_batchnorm(model, x.split([4, 4, 3]), exact=exact), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_order_of_batches_does_not_matter(name):
    model, x = made(name, 12)
    batches = list(x.split(4))
    for order in ([2, 0, 1], [1, 2, 0]):
        found = estimate_batchnorm(model, [batches[k] for k in order])
        assert_close(found, estimate_batchnorm(model, batches), 1e-12)


@torch.no_grad()
def test_a_last_batch_of_one_image_behind_no_spatial_dimensions():
    """It cannot be normalised by itself; it is normalised by all so far, itself included, and counts like others."""
    model, x = made("rows")
    found = estimate_batchnorm(model.train(), x.split([5, 5, 1]))

    first, second = (lambda t: model[0](t)), (lambda t: model[4](t.relu()))
    inputs = [first(part) for part in x.split([5, 5, 1])]
    affine = {"weight": model[1].weight, "bias": model[1].bias, "eps": model[1].eps}
    hidden = [second(F.batch_norm(h, None, None, training=True, **affine)) for h in inputs[:2]]
    everything = torch.cat(inputs)
    mean, var = everything.mean(0), everything.var(0, unbiased=False)
    hidden.append(second(F.batch_norm(inputs[2], mean, var, **affine)))
    expected = {
        "1.running_mean": mean,
        "1.running_var": everything.var(0),
        "5.running_mean": torch.cat(hidden).mean(0),
        "5.running_var": torch.cat(hidden).var(0),
    }
    assert_close(found, expected, 1e-9)


@torch.no_grad()
def test_a_first_batch_of_one_image_normalises_by_the_present_statistics():
    model, x = made("rows")
    found = estimate_batchnorm(model, x.split([1, 10]))
    everything = model[0](x)
    torch.testing.assert_close(found["1.running_mean"], everything.mean(0))
    torch.testing.assert_close(found["1.running_var"], everything.var(0))
    affine = {"weight": model[1].weight, "bias": model[1].bias, "eps": model[1].eps}
    hidden = torch.cat(
        [
            F.batch_norm(everything[:1], model[1].running_mean, model[1].running_var, **affine),
            F.batch_norm(everything[1:], None, None, training=True, **affine),
        ]
    )
    torch.testing.assert_close(found["5.running_mean"], model[4](hidden.relu()).mean(0))


# prior_samples


@pytest.mark.parametrize("prior", [0.5, 3, 40])
def test_the_prior_counts_as_so_many_samples(prior):
    model, x = made("images")
    old, new = BatchNormStatistics.of(model), estimate_batchnorm(model, x.split([4, 4, 3]))
    found = adapt_batchnorm(model, x.split([4, 4, 3]), prior_samples=prior)
    assert_close(found, {n: (prior * old[n] + 11 * new[n]) / (prior + 11) for n in new}, 1e-12)
    assert found.num_samples == 11
    assert_identical(BatchNormStatistics.of(model), found)


def naive_exact_with_prior(model, x, prior):
    """One batch of everything; each layer normalises by the blend of old and new (biased) statistics."""
    model, found, share = copy.deepcopy(model).eval(), {}, len(x) / (len(x) + prior)
    for name, layer in norms(model).items():

        def forward(input, name=name, layer=layer):
            rows = input.transpose(0, 1).flatten(1)

            def blend(new, old):
                return share * new + (1 - share) * old

            found[f"{name}.running_mean"] = blend(rows.mean(1), layer.running_mean)
            found[f"{name}.running_var"] = blend(rows.var(1), layer.running_var)
            variance = blend(rows.var(1, unbiased=False), layer.running_var)
            return F.batch_norm(input, found[f"{name}.running_mean"], variance, layer.weight, layer.bias, eps=layer.eps)

        layer.forward = forward
    with torch.no_grad():
        model(x)
    return found


@pytest.mark.parametrize("scratch", [256, TINY], ids=["at once", "layer by layer"])
@pytest.mark.parametrize("name", ["images", "residual", "rows"])
def test_exact_with_a_prior(name, scratch):
    model, x = made(name)
    expected = naive_exact_with_prior(model, x, 7)
    for split in SPLITS.values():
        found = estimate_batchnorm(model, x.split(split), exact=True, prior_samples=7, max_scratch_mb=scratch)
        assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_a_huge_prior_keeps_the_old_statistics(exact):
    model, x = made("residual")
    old = BatchNormStatistics.of(model)
    assert_close(adapt_batchnorm(model, x.split(4), exact=exact, prior_samples=1e15), old, 1e-10)


@pytest.mark.parametrize("exact", [False, True])
def test_broken_old_statistics_are_forgotten(exact):
    """Adapting without a prior is a way out of statistics that have become infinite or NaN."""
    model, x = made("images")
    expected = estimate_batchnorm(model, x.split([4, 7]), exact=exact)
    model[1].running_mean.fill_(float("nan"))
    model[4].running_var.fill_(float("inf"))
    assert_close(adapt_batchnorm(model, x.split([4, 7]), exact=exact), expected, 1e-9)


# One image in all, none


@pytest.mark.parametrize("exact", [False, True])
def test_one_image_with_spatial_dimensions(exact):
    model, x = made("residual", 1)
    found = adapt_batchnorm(model, [x], exact=exact)
    assert_close(found, one_train_batch(model, x), 1e-9)
    assert found.num_samples == 1


@pytest.mark.parametrize("exact", [False, True])
def test_one_row_is_refused_by_the_name_of_the_layer(exact):
    model, x = made("rows", 1)
    before = state(model)
    with pytest.raises(ValueError, match=r"'1' saw a single value for each channel.*prior_samples="):
        adapt_batchnorm(model, [x], exact=exact)
    assert_identical(model.state_dict(), before)


@pytest.mark.parametrize("exact", [False, True])
def test_one_row_and_a_prior_blend_the_mean_and_keep_the_variance(exact):
    model, x = made("rows", 1)
    old = BatchNormStatistics.of(model)
    first = model[0](x)[0]
    found = adapt_batchnorm(model, [x], exact=exact, prior_samples=3)
    torch.testing.assert_close(found["1.running_mean"], (3 * old["1.running_mean"] + first) / 4)
    for layer in ("1", "5"):
        torch.testing.assert_close(found[f"{layer}.running_var"], old[f"{layer}.running_var"])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "data",
    [lambda: [], lambda: iter(()), lambda: DataLoader(TensorDataset(torch.zeros(0, 6))), lambda: [torch.zeros(0, 6)]],
    ids=["list", "iterator", "loader", "empty batch"],
)
def test_no_samples_are_refused(data, exact):
    model, _ = made("rows", dtype=torch.float32)
    before = state(model)
    with pytest.raises(ValueError, match="no samples"):
        adapt_batchnorm(model, data(), exact=exact)
    assert_identical(model.state_dict(), before)


@pytest.mark.parametrize("exact", [False, True])
def test_empty_batches_between_others_do_not_count(exact):
    model, x = made("rows")
    found = estimate_batchnorm(model, [x[:0], x[:4], x[:0], x[4:]], exact=exact)
    assert_close(found, estimate_batchnorm(model, [x[:4], x[4:]], exact=exact), 1e-12)
    assert found.num_samples == 11
