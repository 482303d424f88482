"""Models without per-sample gradients, layers used differently in later batches, and what is left after errors."""

import pytest
import torch
from networks import MixesSamples, make_network, mlp
from reference import relative_error
from torch import nn

from pl_personalize.functional.batches import call_model
from pl_personalize.per_sample.power_sums import PerSamplePowerSums


def _engine(model, power=1, forward=call_model, max_scratch_bytes=2**20, parameters=None):
    return PerSamplePowerSums(
        model,
        parameters or dict(model.named_parameters()),
        power=power,
        forward=forward,
        max_scratch_bytes=max_scratch_bytes,
    )


def _directions(logits, count=1):
    """Fixed gradients of an objective with respect to the logits, different for each entry."""
    return [(logits + k).sin() + 0.5 for k in range(count)]


def _naive_sums(model, x, power, count=1):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(x.shape[0]):
        logits = model.eval()(x[i : i + 1])
        for direction in _directions(logits.detach(), count):
            gradients = torch.autograd.grad(
                logits, list(parameters.values()), direction, retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += gradient.abs() ** power
    return total


def _sums(model, batches, power=1, count=1, **options):
    with _engine(model, power, **options) as engine:
        for batch in batches:
            engine.add(batch, batch.shape[0], lambda logits: _directions(logits, count))
    return engine.sums, engine.routes


class _Returns(nn.Module):
    """A linear layer and something done to all its rows at once."""

    def __init__(self, change, inputs=6):
        super().__init__()
        self.layer, self.change = nn.Linear(inputs, 3), change

    def forward(self, x):
        return self.change(self.layer(x))


def _batch_norm_after_relu():
    return nn.Sequential(
        nn.Linear(6, 4), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), nn.Linear(4, 3)
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(MixesSamples(), r"'norm' \(BatchNorm1d\).*track_running_stats=False", id="batch norm"),
        pytest.param(_batch_norm_after_relu(), r"'2\.0' \(BatchNorm1d\)", id="nested"),
        pytest.param(_Returns(lambda y: y - y.mean(0)), "mixes the samples of a batch", id="centres"),
        pytest.param(_Returns(lambda y: y.cumsum(0)), "mixes the samples of a batch", id="cumulates"),
        pytest.param(_Returns(lambda y: y.flip(0)), "mixes the samples of a batch", id="reorders"),
        pytest.param(_Returns(lambda y: y.repeat_interleave(2, 0)), "rows", id="twice the rows"),
        pytest.param(_Returns(lambda y: torch.cat([y, y])), "rows|mixes", id="twice the batch"),
        pytest.param(_Returns(lambda y: y[:1]), "rows|mixes", id="one row"),
        pytest.param(_Returns(lambda y: y / 0), "NaN or infinite", id="infinite"),
        pytest.param(_Returns(lambda y: y * float("nan")), "NaN or infinite", id="nan"),
        pytest.param(_Returns(lambda y: y.detach()), "gradient", id="detached"),
        pytest.param(_Returns(lambda y: torch.rand_like(y) * y), "random", id="random"),
        pytest.param(_Returns(lambda y: (y, y)), "must return .*logits.*tuple", id="tuple"),
    ],
)
@pytest.mark.parametrize("power", [1, 2])
def test_what_has_no_per_sample_gradient_is_refused(model, message, power):
    torch.manual_seed(0)
    x = torch.randn(5, 6)

    with pytest.raises(ValueError, match=message), _engine(model, power) as engine:
        engine.add(x, 5, _directions)

    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_output_that_is_not_finite_in_a_later_batch_is_refused():
    model, x = make_network("mlp", 4)
    with _engine(model) as engine:
        engine.add(x, 4, _directions)
        before = {name: value.clone() for name, value in engine.sums.items()}
        x[2, 0] = float("inf")
        with pytest.raises(ValueError, match="NaN or infinite"):
            engine.add(x, 4, _directions)

    assert all(torch.equal(value, before[name]) for name, value in engine.sums.items())


def test_wrong_number_of_samples_is_refused():
    model, x = make_network("mlp", 4)

    with pytest.raises(ValueError, match="rows"), _engine(model) as engine:
        engine.add(x, 3, _directions)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("sizes", [[3, 3], [1] * 6, [6]], ids=str)
def test_a_layer_that_is_used_otherwise_in_a_later_batch_takes_the_loop(sizes, power):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.last = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(3, 3)

        def forward(self, x):
            y, left = x.new_zeros(x.shape[0], 3), x[:, 0] > 0
            y[left], y[~left] = self.left(x[left]), self.right(x[~left])
            return self.last(y)

    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(6, 6, dtype=torch.float64)
    x[:, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    right = _naive_sums(model, x, power, count=2)

    sums, paths = _sums(model, x.split(sizes), power, count=2)

    assert relative_error(sums, right) < 1e-12
    assert paths["right.weight"] == paths["right.bias"] == "loop"
    assert paths["last.weight"] == "closed form"


class RoutesInBackward(nn.Module):
    """Changes what a layer has seen in its batches of more than two, which the backward pass alone can notice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.first(x) * 1.0
        y = self.last(hidden)
        if len(x) > 2:
            hidden.add_(0.0)
        return y


def test_what_shows_in_the_backward_pass_of_a_later_batch_is_refused_by_name():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"'last' \(Linear\) was used differently.*in place.*exclude"):
        _sums(RoutesInBackward(), [x])


def test_a_wrong_direction_does_not_leave_the_engine_broken():
    """An error in one batch must not leave recorded tensors behind for the next one."""
    model, x = make_network("residual", 4)
    right = _naive_sums(model, x, 1)

    def fail(logits):
        raise KeyError("labels")

    with _engine(model) as engine:
        with pytest.raises(KeyError):
            engine.add(x, 4, fail)
        engine.add(x, 4, _directions)

    assert relative_error(engine.sums, right) < 1e-12


def test_inside_only_the_engine_needs_gradients_and_outside_all_is_as_before():
    model = nn.Sequential(mlp(), nn.Dropout(), nn.BatchNorm1d(3))
    model[2].eval()
    model[0][1].bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]

    with _engine(model, parameters={"0.3.weight": model[0][3].weight}) as engine:
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert set(engine.sums) == set(engine.routes) == {"0.3.weight"}

    assert [m.training for m in model.modules()] == modes
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"0.1.bias"}
    assert not any(m._forward_hooks for m in model.modules())
