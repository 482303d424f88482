"""Adapted statistics equal naive loops over the data, and nothing else of the model or the process changes."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import batch_norm_network
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pl_personalize import BatchNormStatistics, adapt_batchnorm
from pl_personalize.adaptation import estimate_batchnorm

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
TINY = 1e-6
SPLITS = {"one batch": [11], "single": [1] * 11, "uneven": [4, 4, 3], "one last": [5, 5, 1], "one first": [1, 10]}


class ResidualNet(nn.Module):
    """Blocks with skip connections, added in place; dropout; a block that a keyword reaches."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.dropout, self.last = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        x = self.act(self.norm1(self.stem(x)))
        y = self.dropout(self.act(self.norm2(input=self.conv1(x))))
        y = self.norm3(self.conv2(y))
        y += x
        return self.last(F.dropout(self.act(y).mean((2, 3)), 0.5, self.training))


class UsedTwice(nn.Module):
    """A layer that is called twice, with inputs that differ much, and a layer after both calls."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.middle = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.after, self.last = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.norm(3 * self.middle(x) + 5).tanh()
        return self.last(self.after(self.middle(x)))


class TwoNames(nn.Module):
    """One layer under two names, each of which is called."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm_a = nn.Linear(6, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.norm_b = self.norm_a
        self.last = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x):
        return self.last(self.norm_b(self.b(self.norm_a(self.a(x)).relu())))


def rows_net():
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.BatchNorm1d(4)
    )


def sequence_net():
    norms = [nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(3, affine=False)]
    return nn.Sequential(nn.Conv1d(2, 4, 3), norms[0], nn.Tanh(), nn.Conv1d(4, 3, 1), norms[1])


def volume_net():
    norms = [nn.BatchNorm3d(3, momentum=0.9), nn.BatchNorm3d(2, eps=0.1)]
    return nn.Sequential(nn.Conv3d(1, 3, 2), norms[0], nn.ReLU(inplace=True), nn.Conv3d(3, 2, 2), norms[1])


def sync_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU(), nn.Dropout2d(), nn.Conv2d(4, 3, 1), nn.SyncBatchNorm(3)
    )


NETWORKS = {
    "images": (batch_norm_network, (3, 10, 10)),
    "residual": (ResidualNet, (3, 6, 6)),
    "rows": (rows_net, (6,)),
    "sequences": (sequence_net, (2, 7)),
    "volumes": (volume_net, (1, 4, 4, 4)),
    "sync": (sync_net, (3, 5, 5)),
    "used twice": (UsedTwice, (6,)),
    "two names": (TwoNames, (6,)),
}
SHARED = ("used twice", "two names")
ONCE = [name for name in NETWORKS if name not in SHARED]


def made(name, num_samples=11, dtype=torch.float64):
    """A network with statistics and affine parameters away from their initial values, and data far from zero."""
    factory, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = factory().to(dtype)
        for layer in norms(model).values():
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
        return model, torch.randn(num_samples, *shape, dtype=dtype) * 2 + 1


def norms(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def one_train_batch(model, x):
    """Train-mode batch norm with momentum 1 on one batch; all else in eval mode."""
    model = copy.deepcopy(model).eval()
    for layer in norms(model).values():
        layer.train()
        layer.momentum = 1.0
    with torch.no_grad():
        model(x)
    return {name: value for name, value in model.state_dict().items() if "running" in name}


def naive_statistics(model, batches):
    """Each call of a layer normalises by its own batch; mean and unbiased variance of all that the layer saw."""
    model, seen = copy.deepcopy(model).eval(), {}
    for name, layer in norms(model).items():

        def forward(input, name=name, layer=layer):
            seen.setdefault(name, []).append(input.double().clone().transpose(0, 1).flatten(1))
            return F.batch_norm(input, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)

        layer.forward = forward
    with torch.no_grad():
        for batch in batches:
            model(batch)
    found = {}
    for name, parts in seen.items():
        found[f"{name}.running_mean"] = torch.cat(parts, 1).mean(1)
        found[f"{name}.running_var"] = torch.cat(parts, 1).var(1)
    return found


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_close(found, expected, tolerance):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_identical(found, expected):
    assert set(found) == set(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


# exact=True


@pytest.mark.parametrize("scratch", [256, TINY], ids=["at once", "layer by layer"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ONCE)
def test_exact_equals_one_batch_of_everything_whatever_the_batches(name, dtype, scratch):
    model, x = made(name, dtype=dtype)
    expected = one_train_batch(model, x)
    shuffled = x[torch.randperm(11, generator=torch.Generator().manual_seed(2))]
    for split, order in [*((s, x) for s in SPLITS.values()), ([4, 4, 3], shuffled), ([11], x.flip(0))]:
        adapted = copy.deepcopy(model).train()
        found = adapt_batchnorm(adapted, list(order.split(split)), exact=True, max_scratch_mb=scratch)
        assert_close(found, expected, TOLERANCES[dtype])
        assert_identical({n: v for n, v in adapted.state_dict().items() if "running" in n}, found)
        assert {value.dtype for value in found.values()} == {dtype}
        assert found.num_samples == 11


@pytest.mark.parametrize("scratch", [256, TINY], ids=["at once", "layer by layer"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_exact_of_a_layer_that_is_called_twice(name, dtype, scratch):
    """Each call normalises by its own moments over all data; those of both are pooled."""
    model, x = made(name, dtype=dtype)
    expected = naive_statistics(model, [x])
    for split in SPLITS.values():
        found = estimate_batchnorm(model, x.split(split), exact=True, max_scratch_mb=scratch)
        assert_close(found, expected, TOLERANCES[dtype])


def test_the_references_agree():
    for name in ONCE:
        model, x = made(name)
        assert_close(naive_statistics(model, [x]), one_train_batch(model, x), 1e-12)


def test_where_it_is_done_at_once_the_forward_runs_once_on_everything():
    model, x = made("rows")
    sizes = []

    def forward(model, batch):
        sizes.append(len(batch))
        return model(batch)

    estimate_batchnorm(model, x.split([4, 4, 3]), exact=True, forward=forward)
    assert sizes == [2, 11]  # the first to measure
    sizes.clear()
    estimate_batchnorm(model, x.split([4, 4, 3]), exact=True, forward=forward, max_scratch_mb=TINY)
    assert sizes == [4, 4, 3] * 3  # two layers, and a pass that finds no more


@pytest.mark.parametrize("at_once", [True, False])
def test_activations_that_do_not_fit_are_not_made_at_once(at_once):
    """Data of 3 · 36 values a row, activations of 4 · 36: a budget between the two and one beyond both."""
    model, x = made("residual")
    largest = []
    handle = model.norm1.register_forward_hook(lambda m, args, out: largest.append(len(out)))
    bytes_of_data = x.numel() * 8
    scratch = (bytes_of_data * (10 if at_once else 2)) / 2**20
    found = estimate_batchnorm(model, x.split([4, 4, 3]), exact=True, max_scratch_mb=scratch)
    handle.remove()
    assert max(largest) == (11 if at_once else 4)
    assert_close(found, one_train_batch(model, x), 1e-9)


@st.composite
def cases(draw):
    """A small CNN, data, and a division of them."""
    layers, channels = [], draw(st.integers(1, 3))
    size = draw(st.integers(3, 6))
    first = channels
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.integers(1, 4))
        layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=draw(st.booleans())))
        momentum = draw(st.sampled_from([0.1, None, 1.0, 0.0]))
        layers.append(nn.BatchNorm2d(out, momentum=momentum, affine=draw(st.booleans())))
        layers.append(draw(st.sampled_from([nn.ReLU(inplace=True), nn.Tanh(), nn.Dropout(0.3)])))
        channels = out
    if draw(st.booleans()):
        layers += [nn.Flatten(), nn.Linear(channels * size * size, 3), nn.BatchNorm1d(3)]
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    return nn.Sequential(*layers).to(dtype), (first, size, size), sizes, dtype, draw(st.integers(0, 2**16))


@settings(max_examples=40)
@given(case=cases())
def test_exact_on_random_networks(case):
    model, shape, sizes, dtype, seed = case
    x = torch.randn(sum(sizes), *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = one_train_batch(model, x)
    # Few values behind a layer with a tiny variance: what float32 lost there is made larger by the layers after it.
    tolerance = 2e-3 if dtype == torch.float32 else 1e-9
    for scratch in (256, TINY):
        found = estimate_batchnorm(model, x.split(sizes), exact=True, max_scratch_mb=scratch)
        assert_close(found, expected, tolerance)


@settings(max_examples=30)
@given(case=cases())
def test_pooled_moments_on_random_networks(case):
    model, shape, sizes, dtype, seed = case
    sizes = [size + 1 for size in sizes]
    x = torch.randn(sum(sizes), *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = estimate_batchnorm(model, x.split(sizes))
    assert_close(found, naive_statistics(model, x.split(sizes)), 2e-3 if dtype == torch.float32 else 1e-9)


@torch.no_grad()
def test_exact_on_images_of_several_sizes():
    """Batches that cannot be joined: layer by layer, each channel pooled over all positions."""
    model, _ = made("residual")
    norm = model.norm1
    batches = [torch.randn(2, 3, 5, 5).double(), torch.randn(3, 3, 4, 6).double()]
    found = estimate_batchnorm(model, batches, exact=True)
    seen = torch.cat([model.stem(x).transpose(0, 1).flatten(1) for x in batches], 1)
    torch.testing.assert_close(found["norm1.running_mean"], seen.mean(1))
    torch.testing.assert_close(found["norm1.running_var"], seen.var(1))
    mean, var = seen.mean(1), seen.var(1, unbiased=False)
    hidden = [
        model.conv1(F.batch_norm(model.stem(x), mean, var, norm.weight, norm.bias, eps=norm.eps).relu())
        for x in batches
    ]
    seen = torch.cat([h.transpose(0, 1).flatten(1) for h in hidden], 1)
    torch.testing.assert_close(found["norm2.running_mean"], seen.mean(1))
    torch.testing.assert_close(found["norm2.running_var"], seen.var(1))


@pytest.mark.parametrize("in_middle", [True, False], ids=["data fit", "nothing fits"])
def test_exact_of_a_model_that_works_in_place_on_its_input(in_middle):
    """Passes are made over batches that are kept: each must see what the loader gave."""

    class Normalises(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = made("residual")[0]

        def forward(self, x):
            x -= 3.0
            x /= 0.5
            return self.net(x)

    model, (_, x) = Normalises(), made("residual")
    expected = one_train_batch(model, x.clone())
    scratch = x.numel() * 8 * (2 if in_middle else 0.1) / 2**20
    loader = DataLoader(TensorDataset(x), batch_size=4)  # collates anew whenever it is read
    found = estimate_batchnorm(model, loader, exact=True, max_scratch_mb=scratch)
    assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_exact_of_a_model_that_takes_batches_of_one_size_alone(size):
    """It can be run neither on everything at once nor on a few samples to see what that takes."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = made("rows")[0]
            self.shift = torch.arange(6.0 * size).view(size, 6)

        def forward(self, x):
            return self.net(x + self.shift)

    model, (_, x) = Fixed(), made("rows", 12)
    expected = one_train_batch(model.net, x + model.shift.repeat(12 // size, 1))
    found = estimate_batchnorm(model, x.split(size), exact=True)
    assert_close({n.removeprefix("net."): v for n, v in found.items()}, expected, 1e-9)
    assert found.num_samples == 12


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


# What a batch and a dataloader may be


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = made("rows")[0]

    def forward(self, left, right, scale=1.0):
        return self.net(scale * left + right)


@pytest.mark.parametrize("scratch", [256, TINY])
@pytest.mark.parametrize("exact", [False, True])
def test_kinds_of_batches(exact, scratch):
    """Labels are garbage, of any shape: they are not looked at."""
    model, x = made("rows")
    parts = x.split([4, 4, 3])
    expected = estimate_batchnorm(model, parts, exact=exact)
    nan = torch.full((11,), float("nan")).split([4, 4, 3])
    garbage = {
        "labels": list(zip(parts, nan, strict=True)),
        "list": [[part, None] for part in parts],
        "text": [(part, ["cat"] * len(part)) for part in parts],
        "scalar": [(part, torch.tensor(-1)) for part in parts],
        "ragged": [(part, torch.zeros(k, 2)) for k, part in enumerate(parts)],
        "boxes": [(part, [{"boxes": torch.zeros(2, 4)}] * len(part)) for part in parts],
    }
    for kind, batches in garbage.items():
        found = estimate_batchnorm(model, batches, exact=exact, max_scratch_mb=scratch)
        assert_close(found, expected, 1e-9)
        assert found.num_samples == 11, kind
    both = TwoInputs()
    dicts = [{"left": part / 2, "right": part / 2, "labels": label} for part, label in zip(parts, nan, strict=True)]
    found = estimate_batchnorm(both, dicts, exact=exact, max_scratch_mb=scratch)
    assert_close({n.removeprefix("net."): v for n, v in found.items()}, expected, 1e-9)
    own = estimate_batchnorm(
        model, [{"image": part} for part in parts], exact=exact, forward=lambda m, b: m(b["image"])
    )
    assert_close(own, expected, 1e-9)


def test_what_belongs_to_one_batch_stays_with_it():
    """A number beside the tensors, other in each batch: batches with these cannot be joined."""
    model, x = TwoInputs(), made("rows")[1]
    batches = [{"left": x[:5], "right": x[:5], "scale": 3.0}, {"left": x[5:], "right": x[5:], "scale": -1.0}]
    joined = torch.cat([4 * x[:5], 0 * x[5:]])
    expected = one_train_batch(model.net, joined)
    for scratch in (TINY, 256):
        found = estimate_batchnorm(model, batches, exact=True, max_scratch_mb=scratch)
        assert_close({n.removeprefix("net."): v for n, v in found.items()}, expected, 1e-9)


def test_dicts_in_which_the_entries_come_in_another_order():
    model, x = made("rows")
    batches = [{"left": x[:5], "right": 0 * x[:5]}, {"right": 0 * x[5:], "left": x[5:]}]
    expected = one_train_batch(model, 2 * x)
    for scratch in (TINY, 256):
        found = estimate_batchnorm(
            model, batches, exact=True, max_scratch_mb=scratch, forward=lambda m, b: m(2 * b["left"] + b["right"])
        )
        assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("scratch", [256, TINY])
@pytest.mark.parametrize("exact", [False, True])
def test_kinds_of_dataloaders(exact, scratch):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(x)

    model, x = made("rows", 12)
    sources = {
        "generator": (part for part in x.split(4)),
        "iterator": iter(x.split(4)),
        "map": map(torch.clone, x.split(4)),
        "tuple": x.split(4),
        "loader": DataLoader(TensorDataset(x, torch.full((12,), -1)), batch_size=4),
        "iterator of a loader": iter(DataLoader(x, batch_size=4)),
        "stream": DataLoader(Stream(), batch_size=4),
    }
    expected = estimate_batchnorm(model, x.split(4), exact=exact)
    for kind, source in sources.items():
        found = estimate_batchnorm(model, source, exact=exact, max_scratch_mb=scratch)
        assert found.num_samples == 12, kind
        assert_close(found, expected, 1e-9)


def test_exact_with_a_loader_that_shuffles_anew_in_each_pass():
    model, x = made("images")
    loader = DataLoader(TensorDataset(x), batch_size=4, shuffle=True)
    found = estimate_batchnorm(model, loader, exact=True, max_scratch_mb=TINY)
    assert_close(found, one_train_batch(model, x), 1e-9)


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        adapt_batchnorm(made("rows")[0], ["images"])


def test_the_progress_bar_changes_nothing():
    model, x = made("rows")
    assert_identical(estimate_batchnorm(model, x.split(4), progress=True), estimate_batchnorm(model, x.split(4)))


# Nothing else changes


def everything(model):
    return {
        "state": state(model),
        "identity": [id(t) for t in (*model.parameters(), *model.buffers())],
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), "forward" in vars(m))
            for m in model.modules()
        ],
        "momentum": [(m.momentum, m.track_running_stats) for m in norms(model).values()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


def assert_unchanged(model, before, *, but=()):
    now = everything(model)
    assert {k for k in before if k != "state" and before[k] != now[k]} == set()
    changed = {n for n, value in now["state"].items() if not torch.equal(value, before["state"][n])}
    assert changed == set(but)


def mixed(name):
    """Modes, requires_grad, gradients and hooks of all kinds."""
    model, x = made(name)
    for k, module in enumerate(model.modules()):
        module.training = k % 2 == 0
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if k % 3 == 1 else None
    next(iter(norms(model).values())).register_forward_hook(lambda *_: None)
    next(iter(norms(model).values())).register_forward_pre_hook(lambda *_: None)
    return model, x


def draws_and(batches, error=None):
    """Batches of a loader that augments, and fails at the end if told to."""
    for batch in batches:
        torch.rand(2), np.random.rand(2), random.random()
        yield batch
    if error is not None:
        raise error


OPTIONS = {
    "default": {},
    "at once": {"exact": True},
    "layer by layer": {"exact": True, "max_scratch_mb": TINY},
    "prior": {"prior_samples": 4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_only_running_statistics_change(name, options):
    model, x = mixed(name)
    before = everything(model)
    estimate_batchnorm(model, draws_and(x.split(4)), **options)
    assert_unchanged(model, before)
    found = adapt_batchnorm(model, draws_and(x.split(4)), **options)
    names = {n for n in before["state"] if "running" in n}
    assert_unchanged(model, before, but=names)
    assert set(found) == {n for n in names if not n.startswith("norm_b")}


class Again:
    """A loader that can be read several times, and fails in a certain pass."""

    def __init__(self, batches, error, fails_in=1):
        self.batches, self.error, self.fails_in, self.passes = batches, error, fails_in, 0

    def __iter__(self):
        self.passes += 1
        yield from draws_and(self.batches, self.error if self.passes >= self.fails_in else None)


@pytest.mark.parametrize("error", [RuntimeError("damaged image"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_loader_that_fails_leaves_all_as_it_was(options, error):
    model, x = mixed("images")
    before = everything(model)
    fails_in = 3 if options.get("max_scratch_mb") == TINY else 1
    with pytest.raises(type(error)):
        adapt_batchnorm(model, Again(list(x.split(4)), error, fails_in), **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_forward_that_fails_leaves_all_as_it_was(options):
    def forward(model, batch):
        model(batch)
        raise RuntimeError("out of memory")

    model, x = mixed("images")
    before = everything(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapt_batchnorm(model, x.split(4), forward=forward, **options)
    assert_unchanged(model, before)


def test_other_buffers_that_the_forward_changes_are_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(6))

        def forward(self, x):
            self.calls += 1
            self.last = x[0]
            return self.norm(x)

    model, x = Counts(), torch.randn(5, 6)
    calls, last = model.calls, model.last
    adapt_batchnorm(model, [x])
    assert model.calls is calls
    assert model.last is last
    assert (calls.item(), last.tolist()) == (0, [0.0] * 6)
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))


def test_batches_of_the_caller_are_left_alone():
    model, x = made("residual")
    batches, before = list(x.split(4)), x.clone()
    for options in OPTIONS.values():
        estimate_batchnorm(model, batches, **options)
    assert torch.equal(torch.cat(batches), before)


def test_frozen_parameters():
    model, x = made("images")
    expected = estimate_batchnorm(model, x.split(4))
    model.requires_grad_(False).eval()
    before = everything(model)
    assert_identical(adapt_batchnorm(model, x.split(4)), expected)
    assert_unchanged(model, before, but=set(expected))


@pytest.mark.parametrize("name", NETWORKS)
def test_training_goes_on_after_adaptation_in_inference_mode(name):
    model, x = made(name)
    expected = {key: estimate_batchnorm(model, x.split(4), **options) for key, options in OPTIONS.items()}
    for key, options in OPTIONS.items():
        copied = copy.deepcopy(model).train()
        with torch.inference_mode():
            found = adapt_batchnorm(copied, x.split(4), **options)
        assert_identical(found, expected[key])
        assert not any(t.is_inference() for t in (*copied.buffers(), *copied.parameters(), *found.values()))
        copied(x).square().sum().backward()
        before = state(copied)
        torch.optim.SGD(copied.parameters(), 0.1).step()
        assert any(not torch.equal(v, before[n]) for n, v in copied.named_parameters())


def test_data_made_in_inference_mode():
    model, x = made("images")
    with torch.inference_mode():
        batches = [part.clone() for part in x.split(4)]
        inside = estimate_batchnorm(model, batches)
    assert batches[0].is_inference()
    assert_identical(inside, estimate_batchnorm(model, batches))


@pytest.mark.parametrize("exact", [False, True])
def test_autocast_around_it_is_off(exact):
    model, x = made("images", dtype=torch.float32)
    expected = estimate_batchnorm(model, x.split(4), exact=exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(adapt_batchnorm(model, x.split(4), exact=exact), expected)
    own = estimate_batchnorm(
        model, x.split(4), forward=lambda m, b: torch.autocast("cpu", torch.bfloat16)(m)(b), exact=exact
    )
    assert (own["4.running_mean"] - expected["4.running_mean"]).abs().max() > 1e-4
    assert_close(own, expected, 0.1)


def test_grad_mode_off_around_it():
    model, x = made("rows")
    with torch.no_grad():
        adapt_batchnorm(model, [x])
    assert model(x).requires_grad


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model(how, options):
    model, x = made("images")
    expected = estimate_batchnorm(model, x.split(4), **options)
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        compiled.compile(backend="eager")
    compiled.eval()
    with torch.no_grad():
        before = compiled(x)
    found = adapt_batchnorm(compiled, x.split(4), **options)
    assert_close({n.removeprefix("_orig_mod."): v for n, v in found.items()}, expected, 1e-9)
    torch.testing.assert_close(model[4].running_var, expected["4.running_var"])
    with torch.no_grad():
        after = compiled(x)
    torch._dynamo.reset()
    reference, _ = made("images")
    expected.apply(reference)
    torch.testing.assert_close(after, reference.eval()(x))
    assert not torch.allclose(after, before)


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


# Several processes


class Reduction:
    """Sums over processes that were found out before; what one process brings, where they were not."""

    def __init__(self, totals):
        self.calls, self.totals = [], totals

    def __call__(self, total):
        k = len(self.calls)
        self.calls.append(total.clone())
        return (self.totals[k] if k < len(self.totals) else total).clone()


def both_processes(estimate):
    """Run ``estimate(rank, all_reduce)`` for both until the sums of all their reductions are known."""
    totals = []
    while True:
        runs = [Reduction(totals), Reduction(totals)]
        results = []
        for rank, run in enumerate(runs):
            try:
                results.append(estimate(rank, run))
            except ValueError as error:
                results.append(error)
        numbers = {len(run.calls) for run in runs}
        if numbers == {len(totals)}:
            return results
        k = len(totals)
        totals.append(runs[0].calls[k] + runs[1].calls[k])


@pytest.mark.parametrize("name", ["images", "rows", "used twice"])
def test_two_processes_share_the_data(name):
    model, x = made(name, 12)
    shares = [[x[0:3], x[6:9]], [x[3:6], x[9:12]]]
    results = both_processes(lambda rank, reduce: estimate_batchnorm(model, shares[rank], all_reduce=reduce))
    for found in results:
        assert_close(found, estimate_batchnorm(model, x.split(3)), 1e-12)
        assert found.num_samples == 12


@pytest.mark.filterwarnings("ignore:The forward does not reach")  # while the sums are not known
@pytest.mark.parametrize("name", ["images", "rows", "used twice"])
def test_two_processes_exactly_whatever_each_has(name):
    model, x = made(name)
    for sizes in ([6, 5], [10, 1], [11, 0]):
        shares = [[p for p in part.split(4) if len(p)] for part in x.split(sizes)]
        results = both_processes(
            lambda rank, reduce, s=shares: estimate_batchnorm(model, s[rank], exact=True, all_reduce=reduce)
        )
        for found in results:
            assert_close(found, naive_statistics(model, [x]), 1e-9)
            assert found.num_samples == 11


def test_two_processes_without_any_sample_both_refuse():
    model, _ = made("rows")
    for exact in (False, True):
        results = both_processes(
            lambda rank, reduce, e=exact: estimate_batchnorm(model, [], exact=e, all_reduce=reduce)
        )
        assert all("no samples" in str(error) for error in results)
