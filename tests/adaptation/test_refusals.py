"""What cannot be adapted, layers that are not reached, and submodules."""

import warnings

import pytest
import torch
from adaptation_cases import OPTIONS, assert_close, assert_unchanged, everything, made, mixed, one_train_batch
from torch import nn

from pl_personalize import adapt_batchnorm
from pl_personalize.adaptation import estimate_batchnorm

# What cannot be adapted, and what is not


@pytest.mark.parametrize("exact", [False, True])
def test_without_batch_norm_there_is_a_warning_and_nothing_changes(exact):
    model = nn.Sequential(nn.Linear(6, 3), nn.GroupNorm(1, 3), nn.Dropout())
    before = everything(model)
    with pytest.warns(UserWarning, match="Sequential has no batch-norm layers"):
        found = adapt_batchnorm(model, iter([torch.zeros(2, 6)]), exact=exact)
    assert_unchanged(model, before)
    assert (dict(found), found.num_samples) == ({}, 0)


def test_a_layer_without_running_statistics_is_refused_by_name():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False))
    before = everything(model)
    with pytest.raises(ValueError, match="'1' keeps no running statistics"):
        adapt_batchnorm(model, [torch.ones(4, 6)])
    assert_unchanged(model, before)


def test_a_lazy_layer_is_refused_until_it_has_seen_its_first_input():
    model, x = nn.Sequential(nn.Linear(6, 3), nn.LazyBatchNorm1d()), torch.randn(5, 6)
    with pytest.raises(ValueError, match="'1' is lazy"):
        adapt_batchnorm(model, [x])
    model.eval()(x)
    assert_close(adapt_batchnorm(model, [x]), one_train_batch(model, x), 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_data_that_are_not_finite_are_refused(options, bad):
    model, x = mixed("images")
    x[7, 1, 2, 2] = bad
    before = everything(model)
    with pytest.raises(ValueError, match="running_mean of the batch-norm layer '1' is not finite"):
        adapt_batchnorm(model, x.split(4), **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_that_the_forward_does_not_reach_keep_their_statistics(options):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = made("rows")[0], nn.BatchNorm1d(3)
            self.unused.running_mean.fill_(2)

        def forward(self, x):
            return self.used(x)

    model, (_, x) = Branches(), made("rows")
    before = everything(model)
    with pytest.warns(UserWarning, match="does not reach the batch-norm layers unused,"):
        found = adapt_batchnorm(model, x.split(4), **options)
    assert found.layers == ["used.1", "used.5"]
    assert_unchanged(model, before, but=set(found))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_below_a_module_alone(options):
    """Others normalise by the statistics that they have."""
    model, x = made("images")
    part = nn.Sequential(model[:4], model[4:])
    with torch.no_grad():
        hidden = model[:4].eval()(x)
    expected = estimate_batchnorm(model[4:], hidden.split(4), **options)
    before = everything(part)
    found = adapt_batchnorm(part, x.split(4), module="1", **options)
    assert found.layers == ["4", "9"]
    assert_close(found, expected, 1e-12)
    assert_unchanged(part, before, but={f"1.{name}" for name in found})


def test_an_unknown_module_is_named():
    with pytest.raises(ValueError, match=r"no module 'features'; it has 0, 1, "):
        adapt_batchnorm(made("rows")[0], [torch.zeros(2, 6)], module="features")


def test_a_module_without_batch_norm():
    model, x = made("rows")
    before = everything(model)
    with pytest.warns(UserWarning, match="no batch-norm layers"):
        assert dict(adapt_batchnorm(model, [x], module="0")) == {}
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_samples": -1}, "prior_samples.*-1"),
        ({"prior_samples": float("inf")}, "prior_samples.*inf"),
        ({"prior_samples": float("nan")}, "prior_samples.*nan"),
        ({"max_scratch_mb": 0}, "max_scratch_mb.*0"),
        ({"max_scratch_mb": float("nan")}, "max_scratch_mb.*nan"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adapt_batchnorm(made("rows")[0], [torch.zeros(2, 6)], **options)


def test_no_warning_where_all_is_well():
    model, x = made("residual")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in OPTIONS.values():
            adapt_batchnorm(model, x.split(4), **options)
