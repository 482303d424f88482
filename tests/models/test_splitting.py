"""Any network taken apart into body and head."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from pl_personalize import estimate_importance
from pl_personalize.models import ConvHead, split

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Deep(nn.Module):
    """A head inside a module inside a module, after a dropout, with a frozen layer and an adapter."""

    def __init__(self):
        super().__init__()
        self.first, self.adapter = nn.Linear(6, 5), nn.Linear(5, 5, bias=False)
        self.first.requires_grad_(False)
        self.last = nn.ModuleDict({"drop": nn.Dropout(0.5), "out": nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))})

    def forward(self, x):
        x = self.first(x)
        return self.last["out"](self.last["drop"]((x + self.adapter(x)).relu()))


class Functional(nn.Module):
    """What does something with the logits of `last`, once or as often as `calls` says."""

    def __init__(self, after=lambda logits: logits, calls=1):
        super().__init__()
        self.first, self.last, self.after, self.calls = nn.Linear(6, 3), nn.Linear(3, 3), after, calls

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.calls):
            x = self.last(x)
        return self.after(x)


def test_a_module_is_taken_apart_and_stays_as_it_is():
    module = Deep()
    module.last["out"].eval()
    state, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    wanted = module.eval()(X)
    for m, training in zip(module.modules(), modes, strict=True):
        m.training = training

    network = split(module, "last.out.1", X)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == [
        "body.adapter.weight", "body.last.out.0.weight", "body.last.out.0.bias", "head.weight", "head.bias",
    ]  # fmt: skip
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == [
        "body.first.weight", "body.first.bias",
    ]  # fmt: skip
    assert network.body.last["drop"].training
    assert not network.body.last["out"].training
    assert torch.equal(network.eval()(X), wanted)
    assert torch.equal(network.head(network.body(X)), wanted)

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    network.new_head(7)
    assert network(X).shape == (4, 7)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.state_dict().keys() == state.keys()
    assert [m.training for m in module.modules()] == modes


def test_importances_of_the_body_are_the_modules():
    module = Deep()
    found = estimate_importance(split(module, "last.out.1", X), [X], "mas", module="body")
    wanted = estimate_importance(module, [X], "mas", exclude=["last.out.1"])
    assert list(found) == list(wanted) == ["adapter.weight", "last.out.0.weight", "last.out.0.bias"]
    assert all(torch.allclose(found[name], wanted[name]) for name in wanted)


def convolutional(*after):
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), *after)


@pytest.mark.parametrize(
    "module",
    [
        convolutional(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        convolutional(nn.AvgPool2d(6), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(5, 4, 1), nn.Flatten()),
    ],
    ids=["mean", "pooling", "pooled before"],
)
def test_a_convolution_trades_places_with_the_mean_over_positions(module):
    at = "2"
    network = split(module.eval(), at, IMAGES)
    assert isinstance(network.head, ConvHead)
    torch.testing.assert_close(network(IMAGES), module(IMAGES))
    assert torch.equal(network.head.weight, module[int(at)].weight)
    assert network.new_head(2).weight.shape == (2, 5, 1, 1)
    assert network(IMAGES).shape == (4, 2)


def test_taking_apart_draws_nothing():
    module, state = convolutional(nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.get_rng_state()
    split(module, "2", IMAGES)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fc", r"'fc' is not in the module. Its last ones are 'first', 'adapter', 'last.out.1'"),
        ("", r"'' is not in the module"),
        ("last.out.0", r"'last.out.0' is a LayerNorm"),
        ("last.out", r"'last.out' is a Sequential"),
        ("first", r"must return the logits \(4, 5\) of its head 'first'; it returned \(4, 3\)"),
    ],
)
def test_a_head_that_is_none(name, message):
    with pytest.raises(ValueError, match=message):
        split(Deep(), name, X)


def tied():
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    module[1].weight = module[0].weight
    return module


def registered_twice():
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    return module.append(module[1])


def normalised():
    return nn.Sequential(nn.Linear(6, 6), weight_norm(nn.Linear(6, 6)))


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (tied(), "1", r"'1.weight' of the head is also '0.weight' of the body"),
        (registered_twice(), "1", r"'1.weight' of the head is also '2.weight' of the body"),
        (normalised(), "1", r"has the parameters parametrizations.weight.original0, .* \(weight norm"),
        (Functional(calls=2), "last", r"must be called once .* of the Functional; it was called 2 times"),
        (Functional(calls=0), "last", r"it was called 0 times"),
        (Functional(torch.nn.functional.softplus), "last", r"Functional processes the output of 'last' further"),
        (Functional(lambda logits: 2 * logits), "last", r"processes the output of 'last' further"),
        (Functional(lambda logits: logits.view(4, 3, 1)), "last", r"must return the logits \(4, 3\) .* \(4, 3, 1\)"),
        (Functional(lambda logits: {"logits": logits}), "last", r"it returned dict"),
        (nn.Linear(6, 3), "", r"It has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_apart(module, name, message):
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        split(module, name, X)
    assert module.state_dict().keys() == before.keys()
    assert module(X) is not None


def test_the_message_has_what_the_module_says_of_features_in_place_of_logits():
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Sequential processes the output of '1' further") as caught:
        split(module, "1", X)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert str(caught.value).endswith(f"({caught.value.__cause__})")


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 3}], ids=str)
def test_other_convolutions_are_no_heads(options):
    layer = nn.Conv2d(6, 4, **{"kernel_size": 1} | options)
    with pytest.raises(ValueError, match="'1' is a Conv2d"):
        split(nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()), "1", IMAGES)


def test_relu_between_a_convolution_and_the_mean_is_refused():
    module = convolutional(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="processes the output of '2' further"):
        split(module, "2", IMAGES)


# Subclasses of linear layers and convolutions


class Casting(nn.Linear):
    """What some libraries have for layers in several precisions."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class CastingConvolution(nn.Conv2d):
    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.001 * super().forward(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=1, keepdim=True)
        return torch.nn.functional.conv2d(x, weight, self.bias)


class DropsBefore(nn.Linear):
    """The plain layer in eval mode alone."""

    def forward(self, x):
        return super().forward(torch.nn.functional.dropout(x, 0.5, self.training))


class TakesTwo(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_that_computes_the_same_is_a_head(bias, dtype):
    module = nn.Sequential(nn.Linear(6, 4), Casting(4, 3, bias=bias)).to(dtype)
    x, random_state = X.to(dtype), torch.get_rng_state()
    wanted = module(x)
    network = split(module, "1", x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module[1].training
    assert module[1].weight.dtype == dtype
    assert torch.equal(network(x), wanted)
    assert torch.equal(network.head.weight, module[1].weight)
    assert type(network.new_head(2)) is nn.Linear
    assert network(x).shape == (4, 2)


def test_a_subclass_of_a_convolution_that_computes_the_same_is_a_head():
    convolution = CastingConvolution(5, 4, 1)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    network = split(module, "1", IMAGES)
    assert isinstance(network.head, ConvHead)
    torch.testing.assert_close(network(IMAGES), module(IMAGES))


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (Scaled(6, 3), "Linear"),
        (DropsBefore(6, 3), "Linear"),
        (TakesTwo(6, 3), "Linear"),
        (Standardised(6, 3, 1), "Conv2d"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_subclass_that_computes_something_else_is_named(layer, plain):
    name = type(layer).__name__
    said = rf"'1' is a {name} \({__name__}\.{name}\), whose forward differs from that of torch\.nn\.{plain}"
    with pytest.raises(ValueError, match=said):
        split(nn.Sequential(nn.Linear(6, 6), layer), "1", X)


def test_a_forward_that_was_put_in_place_of_a_layers_own_counts():
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    module[1].forward = lambda x: nn.Linear.forward(module[1], x).exp()
    with pytest.raises(ValueError, match=r"'1' is a Linear .* differs from"):
        split(module, "1", X)
