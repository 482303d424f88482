"""Sums of powers of per-sample gradients equal a loop over samples, by the fastest route that is right."""

import pytest
import torch
from networks import NETWORKS, Shift, TimeFirst, make_network
from power_sums import directions, engine_of, naive_sums, sums_of
from reference import relative_error
from torch import nn

from pl_personalize.per_sample import layer_rules
from pl_personalize.per_sample.layer_rules import register_layer_rule

# What is not "closed form", by the beginning of the names of the parameters that have it.
SLOWER = {
    "functional_use": {"layer": "model"},  # all of a layer, where one of its parameters has no faster path
    "logit_shift": {"0.layer": "model"},
    "data_dependent": {"gain": "loop"},
    "recurrent": {"recurrent": "loop"},  # whether an LSTM is vectorised, torch decides
    "parametrised": {"0.par": "layer", "2.par": "layer"},  # a bias of its own is added as always
    "patched": {"0.weight": "layer"},
    "subclassed": {"0.weight": "layer", "2.weight": "layer"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_parameter_takes_the_fastest_path_that_is_right(name):
    model, x = make_network(name, 5)
    slower = SLOWER.get(name, {})

    sums, paths = sums_of(model, [x])

    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12
    for parameter, path in paths.items():
        path = "loop" if parameter.startswith("recurrent") and path == "model" else path
        expected = {found for prefix, found in slower.items() if parameter.startswith(prefix)} or {"closed form"}
        assert {path} == expected, parameter
    assert all(any(parameter.startswith(prefix) for parameter in paths) for prefix in slower)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "twice_used", "residual", "attention", "data_dependent", "logit_shift"])
def test_several_directions_add_up_over_batches_and_chunks(name, power):
    model, x = make_network(name, 7)
    right = naive_sums(model, x, power, count=3)

    for batches, scratch in (((x,), 2**20), (x.split([1, 4, 2]), 2**20), ((x,), 1), ((x,), 2000)):
        sums, _ = sums_of(model, batches, power, count=3, max_scratch_bytes=scratch)
        assert relative_error(sums, right) < 1e-12


@pytest.mark.parametrize(("dtype", "summed_in"), [("float64",) * 2, ("float32",) * 2, ("bfloat16", "float32")])
def test_sums_are_float32_or_better(dtype, summed_in):
    model, x = make_network("mlp", 6)
    right = naive_sums(model, x, 1)
    tolerance = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-2}[dtype]

    sums, _ = sums_of(model.to(getattr(torch, dtype)), [x.to(getattr(torch, dtype))])

    assert {value.dtype for value in sums.values()} == {getattr(torch, summed_in)}
    assert relative_error(sums, right) < tolerance


def test_a_first_batch_of_one_sample_does_not_decide_for_larger_ones():
    """With one sample and one step, (T, N, d) and (N, T, d) look the same."""
    torch.manual_seed(0)
    model, x = TimeFirst().double(), torch.randn(6, 1, 4, dtype=torch.float64)

    sums, paths = sums_of(model, x.split([1, 5]))

    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12
    assert paths["embed.weight"] == "closed form"


@pytest.mark.parametrize("steps", [2, 5])
def test_as_many_steps_as_samples(steps):
    torch.manual_seed(0)
    model, x = TimeFirst().double(), torch.randn(5, steps, 4, dtype=torch.float64)

    assert relative_error(sums_of(model, [x])[0], naive_sums(model, x, 1)) < 1e-12


def test_inputs_that_need_a_gradient():
    model, x = make_network("mlp", 5)
    x.requires_grad_()

    sums, _ = sums_of(model, [x])

    assert not any(value.requires_grad for value in sums.values())
    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12
    assert x.grad is None


@pytest.mark.parametrize("size", [1, 12])
@pytest.mark.parametrize("power", [1, 2])
def test_a_gradient_that_is_the_direction_itself_leaves_it_alone(power, size):
    """For two logits, each row of the check's own direction has one sign: an absolute value in place passes it."""
    torch.manual_seed(0)
    model = nn.Sequential(make_network("functional_use", 1)[0], nn.Linear(3, 2), Shift(2)).double()
    nn.init.zeros_(model[1].bias)
    model[2].shift.data[:] = torch.tensor([1.0, -1.5])
    x = torch.randn(12, 6, dtype=torch.float64)
    assert directions(model(x))[0].sign().mean(0).tolist() == [1.0, -1.0]

    sums, _ = sums_of(model, x.split(size), power)

    assert relative_error(sums, naive_sums(model, x, power)) < 1e-12


class _TwoShifts(nn.Module):
    """Two parameters whose gradients are one and the same tensor: squared in place, it is to the fourth power."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1, 3)), nn.Parameter(torch.zeros(1, 3))

    def forward(self, x):
        return x + self.a + self.b


class _TwoShiftsInALoop(_TwoShifts):
    def forward(self, x):
        return super().forward(x) if float(x.detach().sum()) < 1e9 else x  # nothing that could be vectorised


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("layer", [_TwoShifts, _TwoShiftsInALoop])
def test_parameters_whose_gradients_are_one_tensor(layer, power):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3), layer()).double(), torch.randn(5, 6, dtype=torch.float64)

    sums, _ = sums_of(model, [x], power, count=2)

    assert relative_error(sums, naive_sums(model, x, power, count=2)) < 1e-12


def test_maps_as_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.ConvTranspose2d(4, 3, 2)).double()
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)

    assert relative_error(sums_of(model, [x])[0], naive_sums(model, x, 1)) < 1e-12


def test_a_hook_of_the_user_is_respected():
    model, x = make_network("mlp", 5)
    model[1].register_forward_hook(lambda module, args, output: output.square())
    model[3].register_forward_pre_hook(lambda module, args: (args[0] * 3,))

    sums, paths = sums_of(model, [x])

    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12
    assert (paths["1.weight"], paths["3.weight"]) == ("layer", "closed form")


def test_a_part_under_no_grad_or_detached_gets_what_autograd_gives():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            with torch.no_grad():
                x = self.stem(x).tanh()
            return self.last(self.middle(x) + self.middle(x).detach())

    torch.manual_seed(0)
    model, x = Partly().double(), torch.randn(5, 6, dtype=torch.float64)

    sums, _ = sums_of(model, [x])

    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12
    assert {name for name, value in sums.items() if not value.any()} == {
        f"{layer}.{parameter}" for layer in ("stem", "unused") for parameter in ("weight", "bias")
    }


@pytest.mark.parametrize("first", ["silent", "loud"])
def test_an_input_without_influence_beside_one_with(first):
    """Samples whose gradients are exactly zero are no reason to leave the closed form, or to miss that it is wrong."""
    model, x = make_network("subclassed", 6)
    with torch.no_grad():
        model[0].bias.copy_(torch.full((5,), -3.0))
    x[:2] = 0.0
    x = x if first == "silent" else x.flip(0)
    x[-3:] *= 20

    sums, _ = sums_of(model, [x])

    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12


class _Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0, -1.0]))

    def forward(self, x):
        return x * self.weight


def _right(layer, x, grad):
    return {"weight": x * grad}


def _wrong(layer, x, grad):
    return {"weight": 1.01 * x * grad}


def _broken(layer, x, grad):
    raise RuntimeError("not for these shapes")


@pytest.mark.parametrize(("rule", "path"), [(_right, "closed form"), (_wrong, "layer"), (_broken, "layer")])
def test_a_rule_is_checked_before_it_is_believed(monkeypatch, rule, path):
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))
    register_layer_rule(_Gain)(rule)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), _Gain()).double(), torch.randn(5, 4, dtype=torch.float64)

    sums, paths = sums_of(model, [x])

    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12
    assert paths == {"0.weight": "closed form", "0.bias": "closed form", "1.weight": path}


def test_a_wrong_shortcut_is_noticed(monkeypatch):
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))

    def shortcut(layer, x, grad, power, sums):
        sums["weight"].add_((x * grad).sum(0).abs())
        return True

    register_layer_rule(_Gain, power_sum=shortcut)(_right)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), _Gain()).double(), torch.randn(5, 4, dtype=torch.float64)

    sums, paths = sums_of(model, [x])

    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12
    assert paths["1.weight"] == "layer"


class Kinked(nn.Module):
    """At its kink; which side a sample is on depends on rounding, and here, reliably, on the size of its batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.inner(x)
        on_kink = hidden - hidden.detach()
        return self.outer(hidden.tanh() + torch.relu(on_kink + 1e-7 * (len(x) - 1.5)))


@pytest.mark.parametrize("power", [1, 2])
def test_samples_that_are_rounded_otherwise_alone_take_no_slower_path(power):
    torch.manual_seed(0)
    model, x = Kinked(), torch.randn(5, 4)

    with engine_of(model, power) as engine:
        engine.add(x, 5, directions)

    assert set(engine.routes.values()) == {"closed form"}


class _DividesByBatchSize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.size = len(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.size


class DividesByBatchSize(nn.Module):
    """As where a learned step of quantisation has its gradient divided by the number of activations."""

    def __init__(self, slope):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)
        self.slope = nn.PReLU() if slope else nn.ReLU()

    def forward(self, x):
        return self.outer(_DividesByBatchSize.apply(self.slope(self.inner(x))))


@pytest.mark.parametrize("slope", [False, True], ids=["relu", "prelu"])
@pytest.mark.parametrize("power", [1, 2])
def test_a_backward_pass_that_knows_the_size_of_the_batch_takes_a_slower_path(power, slope):
    torch.manual_seed(0)
    model, x = DividesByBatchSize(slope), torch.randn(5, 4)
    right = naive_sums(model, x, power)

    with engine_of(model, power) as engine:
        engine.add(x, 5, directions)

    assert relative_error(engine.sums, right) < 1e-5


def test_parameters_without_entries():
    class WithEmpty(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty, self.last = nn.Parameter(torch.empty(0)), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(x)

    torch.manual_seed(0)
    model, x = WithEmpty().double(), torch.randn(5, 6, dtype=torch.float64)

    sums, _ = sums_of(model, [x])

    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12


class Repeated(nn.Module):
    """A token that is repeated, not expanded: with a copy for each sample the shapes would not fit."""

    def __init__(self):
        super().__init__()
        self.token, self.last = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.cat([self.token.repeat(x.shape[0], 1, 1), x], 1).tanh().sum(1))


class UsedTwice(nn.Module):
    """A token that counts for each sample and for the batch."""

    def __init__(self):
        super().__init__()
        self.token, self.last = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last((x.sum(1) * self.token).tanh()) + self.token[0, :3] ** 2


@pytest.mark.parametrize("make", [Repeated, UsedTwice])
def test_tokens_that_cannot_be_copied_take_a_slower_path(make):
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(5, 2, 4, dtype=torch.float64)
    sums, paths = sums_of(model, [x])
    assert relative_error(sums, naive_sums(model, x, 1)) < 1e-12
    assert paths["token"] in ("layer", "model")
    assert paths["last.weight"] == "closed form"
    assert "token" not in vars(model)
