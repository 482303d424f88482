"""What batch norm normalises is what counts, whatever form a layer was given it in, and wherever that is done."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pl_personalize import BatchNormStatistics, adapt_batchnorm
from pl_personalize.adaptation import estimate_batchnorm

TINY = 1e-6
WAYS = {
    "default": {},
    "at once": {"exact": True},
    "layer by layer": {"exact": True, "max_scratch_mb": TINY},
    "prior": {"exact": True, "prior_samples": 5},
}
each_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


class Last(nn.BatchNorm1d):
    """Batch norm over (N, length, channels)."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Flat(nn.BatchNorm1d):
    """The same, over rows."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


class Functional(nn.BatchNorm1d):
    """The same, by the function."""

    def forward(self, x):
        statistics = {"running_var": self.running_var, "running_mean": self.running_mean}
        rows = x.flatten(0, 1)
        return F.batch_norm(rows, **statistics, weight=self.weight, bias=self.bias, eps=self.eps).view_as(x)


class Underlying(nn.BatchNorm1d):
    """The same, by the function below."""

    def forward(self, x):
        statistics = (self.weight, self.bias, self.running_mean, self.running_var)
        return torch.batch_norm(x.transpose(1, 2), *statistics, False, 0.1, self.eps, False).transpose(1, 2)


class Copies(nn.BatchNorm1d):
    """The same, by copies of the buffers, in a precision of its own."""

    def forward(self, x):
        statistics = (self.running_mean.double(), self.running_var.double())
        x = x.transpose(1, 2).double()
        return (
            F.batch_norm(x, *statistics, self.weight.double(), self.bias.double(), eps=self.eps)
            .transpose(1, 2)
            .to(self.weight)
        )


class Recomputed(nn.Module):
    """The same, inside a checkpoint."""

    def __init__(self, channels):
        super().__init__()
        self.layer = Last(channels)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


KINDS = {kind.__name__: kind for kind in (Last, Flat, Functional, Underlying, Copies, Recomputed)}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def network(norm, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(norm(4), nn.Linear(4, 6), nn.Tanh(), norm(6)).to(dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def rows_network(dtype):
    return network(nn.BatchNorm1d, dtype)


def sequences(length, dtype=torch.float64, num_samples=9):
    shift = torch.tensor([0.0, 10.0, 20.0, 30.0])
    return (torch.randn(num_samples, length, 4, generator=torch.Generator().manual_seed(1)) + shift).to(dtype)


def assert_close(found, expected, tolerance):
    found = {name.replace("layer.", ""): value for name, value in found.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=tolerance, atol=tolerance)


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length", [1, 4, 7])
@each_way
@each_kind
def test_layers_over_sequences_are_layers_over_rows(kind, options, length, dtype):
    """Batch norm over (N, length, channels) is batch norm over its N · length rows, also where length is channels."""
    x = sequences(length, dtype)
    batches = x.split([4, 3, 2])
    options = dict(options)
    rows_options = options | {"prior_samples": length * options.get("prior_samples", 0)}
    expected = estimate_batchnorm(rows_network(dtype), [b.flatten(0, 1) for b in batches], **rows_options)

    model = network(kind, dtype)
    found = adapt_batchnorm(model, batches, **options)
    assert_close(found, expected, TOLERANCES[dtype])
    adapted = rows_network(dtype)
    expected.apply(adapted)
    wanted = adapted.eval()(x.flatten(0, 1)).view(len(x), length, 6)
    torch.testing.assert_close(model.eval()(x), wanted, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@each_kind
def test_the_first_layer_has_the_moments_of_the_data(kind):
    x = sequences(4)
    found = estimate_batchnorm(network(kind, torch.float64), x.split(2))
    mean, variance = list(found.values())[:2]
    torch.testing.assert_close(mean, x.mean((0, 1)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variance, x.flatten(0, 1).var(0), rtol=1e-9, atol=1e-9)


@each_way
def test_what_a_layer_leaves_out_does_not_count(options):
    class Masked(nn.BatchNorm1d):
        """Of (N, length, channels), in which padding is NaN."""

        def forward(self, x):
            there = ~x[..., 0].isnan()
            return torch.zeros_like(x).index_put((there,), super().forward(x[there]))

    x = sequences(5)
    there = torch.rand(9, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    x[~there] = float("nan")
    model = nn.Sequential(Masked(4)).double()
    prior, rows = options.get("prior_samples", 0), x[there]
    share = 9 / (9 + prior)
    found = estimate_batchnorm(model, x.split([4, 5]), **options)
    torch.testing.assert_close(found["0.running_mean"], share * rows.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["0.running_var"], share * rows.var(0) + 1 - share, rtol=1e-9, atol=1e-9)


@each_way
def test_a_layer_of_timm_with_its_activation(options):
    timm = pytest.importorskip("timm")
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double() + 2
    ours = nn.Sequential(timm.layers.BatchNormAct2d(3), nn.Conv2d(3, 2, 1), timm.layers.BatchNormAct2d(2)).double()
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), ours[1], nn.BatchNorm2d(2)).double()
    expected = estimate_batchnorm(plain, x.split(3), **options)
    found = estimate_batchnorm(ours, x.split(3), **options)
    for ours_name, plain_name in (("0", "0"), ("2", "3")):
        for what in ("running_mean", "running_var"):
            torch.testing.assert_close(found[f"{ours_name}.{what}"], expected[f"{plain_name}.{what}"])


@each_way
def test_a_layer_inside_a_layer_has_its_own_statistics(options):
    class Split(nn.BatchNorm1d):
        """The second half of the channels by a layer of its own, as for data of two kinds."""

        def __init__(self):
            super().__init__(2)
            self.other = nn.BatchNorm1d(2)

        def forward(self, x):
            return torch.cat([super().forward(x[:, :2]), self.other(x[:, 2:])], 1)

    x = sequences(1)[:, 0]
    model = nn.Sequential(Split()).double()
    found = estimate_batchnorm(model, x.split([4, 5]), **options)
    expected = estimate_batchnorm(nn.Sequential(nn.BatchNorm1d(4)).double(), x.split([4, 5]), **options)
    for what in ("running_mean", "running_var"):
        torch.testing.assert_close(
            torch.cat([found[f"0.{what}"], found[f"0.other.{what}"]]), expected[f"0.{what}"], rtol=1e-9, atol=1e-9
        )


@each_way
def test_a_layer_that_always_normalises_by_its_batch(options):
    class Always(nn.BatchNorm1d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, training=True, momentum=0.5)

    x = sequences(1)[:, 0]
    model = Always(4).double()
    before = copy.deepcopy(model.state_dict())
    found = estimate_batchnorm(model, x.split([4, 5]), **options)
    assert unchanged(model, before)
    expected = estimate_batchnorm(nn.BatchNorm1d(4).double(), x.split([4, 5]), **options)
    assert_close(found, expected, 1e-9)


@each_way
def test_a_layer_that_leaves_an_empty_input_alone(options):
    class Careful(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) if len(x) else x

    class Finds(nn.Module):
        """A second layer for what is positive, of which a batch may have nothing."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(4), Careful(4)

        def forward(self, x):
            return self.first(x), self.second(x[x[:, 0] > 0])

    x = sequences(1)[:, 0]
    x = torch.cat([x[x[:, 0] > 0], x[x[:, 0] <= 0]])
    number = int((x[:, 0] > 0).sum())
    found = estimate_batchnorm(Finds().double(), x.split([number, 9 - number]), **options | {"prior_samples": 0})
    torch.testing.assert_close(found["second.running_mean"], x[:number].mean(0), rtol=1e-9, atol=1e-9)


class WrittenOut(nn.BatchNorm1d):
    def forward(self, x):
        return (x - self.running_mean) / (self.running_var + self.eps).sqrt()


class Exchanged(nn.BatchNorm1d):
    """Statistics of another kind of data in the place of its own."""

    def forward(self, x):
        self.running_mean = torch.ones_like(self.running_mean)
        return super().forward(x)


class Skipped(nn.BatchNorm1d):
    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", [WrittenOut, Exchanged, Skipped])
@each_way
def test_layers_that_normalise_in_a_way_of_their_own_are_refused(options, kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(kind(4)))
    before, mean = copy.deepcopy(model.state_dict()), model[2][0].running_mean
    x = sequences(1, torch.float32)[:, 0]
    with pytest.raises(
        ValueError, match=rf"layer '2\.0' \({__name__}\.{kind.__name__}\) .* its forward does not pass.*module="
    ):
        adapt_batchnorm(model, x.split(3), **options)
    assert unchanged(model, before)
    assert model[2][0].running_mean is mean
    assert not any("forward" in vars(module) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt_batchnorm(model, x.split(3), module="1", **options)


@each_way
def test_a_layer_whose_buffers_another_module_uses_is_not_reached(options):
    class Borrows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.after = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.after(F.batch_norm(x, self.layer.running_mean, self.layer.running_var))

    model, x = Borrows().double(), sequences(1)[:, 0]
    with pytest.warns(UserWarning, match="does not reach the batch-norm layers layer,"):
        found = adapt_batchnorm(model, x.split(3), **options)
    assert found.layers == ["after"]


@each_way
@each_kind
def test_a_model_that_is_run_with_other_buffers(kind, options):
    """What the layers have in the forward is what counts as a prior."""
    model, x = network(kind, torch.float64), sequences(4)
    other = {name: value + 1 for name, value in model.state_dict().items() if "running" in name}
    before = copy.deepcopy(model.state_dict())
    found = estimate_batchnorm(
        model, x.split([4, 5]), forward=lambda m, batch: torch.func.functional_call(m, other, (batch,)), **options
    )
    assert unchanged(model, before)
    model.load_state_dict(before | other)
    expected = estimate_batchnorm(model, x.split([4, 5]), **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@each_way
def test_a_forward_that_was_put_in_place_of_a_layers_own(options):
    def rows(x):
        return nn.BatchNorm1d.forward(layer, x.flatten(0, 1)).view_as(x)

    layer, x = nn.BatchNorm1d(4).double(), sequences(4)
    layer.forward = rows
    found = adapt_batchnorm(layer, x.split(4), **options)
    assert layer.forward is rows
    share = 9 / (9 + options.get("prior_samples", 0))
    torch.testing.assert_close(found["running_mean"], share * x.mean((0, 1)), rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_a_layer_is_torchs_to_refuse():
    model = nn.Sequential(nn.BatchNorm1d(4))
    for wrong in (torch.zeros(3, 5), torch.zeros(4)):
        with pytest.raises((RuntimeError, ValueError)):  # PyTorch's own
            adapt_batchnorm(model, [sequences(1, torch.float32)[:, 0], wrong])
        assert model[0].running_mean.tolist() == [0] * 4


def test_statistics_of_copies_are_those_of_the_buffers_precision():
    """A model in bfloat16 whose layers compute in float64."""
    x = sequences(3, torch.bfloat16)
    found = estimate_batchnorm(nn.Sequential(Copies(4)).bfloat16(), x.split(4))
    wanted = x.double().mean((0, 1)).bfloat16()
    assert found["0.running_mean"].dtype == torch.bfloat16
    assert torch.equal(found["0.running_mean"], wanted)


# Half precision


class Halves(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(2) if norm is None else norm
        self.last = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.last(self.norm(x))


@each_way
def test_a_variance_that_float16_cannot_hold(options):
    model = Halves().half()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)).half() * 500
    said = r"running_var of the batch-norm layer 'norm' reaches \d{6}, .*float16 .* 65504.*layer\.float\(\)"
    with pytest.raises(ValueError, match=said):
        adapt_batchnorm(model, x.split(16), **options)
    assert unchanged(model, before)

    model.norm.float()
    found = adapt_batchnorm(model, x.split(16), **options)
    prior = options.get("prior_samples", 0)
    wanted = (64 * x.double().var(0) + prior) / (64 + prior)
    torch.testing.assert_close(found["norm.running_var"], wanted.float(), rtol=1e-6, atol=0)
    assert {found[f"last.{what}"].dtype for what in ("running_mean", "running_var")} == {torch.float16}


def test_a_single_batch_beyond_float16_is_refused_even_where_the_whole_is_not():
    """Normalised by an infinite variance, what later layers see would be 0."""
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(1)).half()
    x[:8] *= 500
    assert x[:8].double().var(0).min() > 65504 > x.double().var(0).max()
    with pytest.raises(ValueError, match="'norm' reaches"):
        estimate_batchnorm(Halves().half(), x.split(8))
    estimate_batchnorm(Halves().half(), [x])
    estimate_batchnorm(Halves().half(), x.split(8), exact=True)


def test_a_variance_below_what_float16_holds_is_zero():
    x = torch.tensor([[1e-5, 1.0], [2e-5, 2.0]]).half()
    found = adapt_batchnorm(nn.BatchNorm1d(2).half(), [x])
    assert found["running_var"].tolist() == [0.0, 0.5]


def test_statistics_of_float32_that_a_model_in_float16_cannot_hold():
    statistics = BatchNormStatistics({"running_mean": torch.ones(2), "running_var": torch.tensor([1.0, 7e4])})
    model = nn.BatchNorm1d(2).half()
    with pytest.raises(ValueError, match=r"running_var.* reaches 70000, .*float16.* 65504"):
        statistics.apply(model)
    assert (model.running_mean.tolist(), model.running_var.tolist()) == ([0, 0], [1, 1])


def test_an_average_that_float16_cannot_hold():
    """Sources whose means are far apart."""
    parts = [{"running_mean": torch.full((2,), mean), "running_var": torch.ones(2)} for mean in (-300.0, 300.0)]
    assert BatchNormStatistics.average(parts)["running_var"].tolist() == [90001.0, 90001.0]
    halves = [{name: value.half() for name, value in part.items()} for part in parts]
    with pytest.raises(ValueError, match=r"running_var.* reaches 90001, .*float16.* 65504"):
        BatchNormStatistics.average(halves)


class Nested(nn.BatchNorm1d):
    """Batch norm of what another batch norm returns."""

    def __init__(self):
        super().__init__(1)
        self.inner = nn.BatchNorm1d(1)

    def forward(self, x):
        return super().forward(self.inner(x))


@each_way
def test_a_layer_inside_another_keeps_its_inputs_to_itself(options):
    # The inner layer normalizes by a mean of 0, which is the running mean of the outer one.
    x = torch.tensor([[-3.0], [3.0]], dtype=torch.float64)
    layer = Nested().double().eval()
    found = estimate_batchnorm(layer, [x], **options)
    share = 2 / (2 + options.get("prior_samples", 0))
    scale = share * 9 + 1 - share if options.get("exact") else 9
    expected = {"inner.running_var": 18.0, "running_var": 18 / (scale + layer.eps)}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].item(), share * value + 1 - share)
