"""Models without per-sample gradients, layers used differently in later batches, and what is left after errors."""

import pytest
import torch
from networks import MixesSamples, make_network, mlp
from power_sums import directions, engine_of, naive_sums, sums_of
from reference import relative_error
from torch import nn


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

    with pytest.raises(ValueError, match=message), engine_of(model, power) as engine:
        engine.add(x, 5, directions)

    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_output_that_is_not_finite_in_a_later_batch_is_refused():
    model, x = make_network("mlp", 4)
    with engine_of(model) as engine:
        engine.add(x, 4, directions)
        before = {name: value.clone() for name, value in engine.sums.items()}
        x[2, 0] = float("inf")
        with pytest.raises(ValueError, match="NaN or infinite"):
            engine.add(x, 4, directions)

    assert all(torch.equal(value, before[name]) for name, value in engine.sums.items())


def test_wrong_number_of_samples_is_refused():
    model, x = make_network("mlp", 4)

    with pytest.raises(ValueError, match="rows"), engine_of(model) as engine:
        engine.add(x, 3, directions)


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
    right = naive_sums(model, x, power, count=2)

    sums, paths = sums_of(model, x.split(sizes), power, count=2)

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
        sums_of(RoutesInBackward(), [x])


def test_a_wrong_direction_does_not_leave_the_engine_broken():
    """An error in one batch must not leave recorded tensors behind for the next one."""
    model, x = make_network("residual", 4)
    right = naive_sums(model, x, 1)

    def fail(logits):
        raise KeyError("labels")

    with engine_of(model) as engine:
        with pytest.raises(KeyError):
            engine.add(x, 4, fail)
        engine.add(x, 4, directions)

    assert relative_error(engine.sums, right) < 1e-12


def test_inside_only_the_engine_needs_gradients_and_outside_all_is_as_before():
    model = nn.Sequential(mlp(), nn.Dropout(), nn.BatchNorm1d(3))
    model[2].eval()
    model[0][1].bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]

    with engine_of(model, parameters={"0.3.weight": model[0][3].weight}) as engine:
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert set(engine.sums) == set(engine.routes) == {"0.3.weight"}

    assert [m.training for m in model.modules()] == modes
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"0.1.bias"}
    assert not any(m._forward_hooks for m in model.modules())
