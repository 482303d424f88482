"""Closed forms against autograd on one sample at a time."""

from copy import deepcopy

import pytest
import torch
from networks import StandardisedLinear
from torch import nn

from pl_personalize.per_sample import layer_rules
from pl_personalize.per_sample.layer_rules import find_layer_rule, raise_to, register_layer_rule

LAYERS = [
    (nn.Linear(5, 4), (5,)),
    (nn.Linear(5, 4, bias=False), (5,)),
    (nn.Linear(5, 4), (7, 5)),
    (nn.Linear(5, 1), (2, 3, 5)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    (nn.Conv1d(2, 2, 4, padding="same", dilation=3), (2, 11)),
    (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 6)),
    (nn.Conv2d(3, 4, 3), (3, 6, 6)),
    (nn.Conv2d(3, 4, 1, bias=False), (3, 5, 5)),
    (nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=4), (4, 8, 7)),
    (nn.Conv2d(3, 4, 11, stride=4, padding=2), (3, 19, 23)),
    (nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="reflect"), (2, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding="valid"), (2, 5, 5)),
    (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="replicate"), (2, 5, 5)),
    (nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=1, groups=2), (2, 3, 4, 5)),
    (nn.BatchNorm1d(4), (4,)),
    (nn.BatchNorm1d(4, eps=0.1), (4, 5)),
    (nn.BatchNorm2d(3), (3, 4, 5)),
    (nn.BatchNorm3d(3), (3, 2, 3, 2)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5)),
    (nn.ConvTranspose2d(3, 2, (3, 2), stride=2, dilation=(1, 2)), (3, 4, 3)),
    (nn.ConvTranspose2d(3, 2, 2, bias=False), (3, 4, 3)),
    (nn.ConvTranspose3d(2, 2, 2), (2, 2, 3, 2)),
    (nn.LayerNorm(5), (5,)),
    (nn.LayerNorm((4, 5), eps=0.1), (3, 4, 5)),
    (nn.LayerNorm(5, bias=False), (2, 3, 5)),
    (nn.GroupNorm(2, 4), (4, 3, 2)),
    (nn.GroupNorm(2, 4), (4,)),
    (nn.RMSNorm(5), (2, 3, 5)),
    (nn.RMSNorm((4, 5), eps=0.1), (4, 5)),
    (nn.InstanceNorm1d(3, affine=True), (3, 6)),
    (nn.InstanceNorm2d(3, affine=True, eps=0.1), (3, 4, 5)),
    (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 4, 5)),
    (nn.InstanceNorm3d(2, affine=True), (2, 2, 3, 2)),
    (nn.PReLU(), (3, 4)),
    (nn.PReLU(3), (3, 4, 2)),
    (nn.PReLU(4), (4,)),
    (nn.PReLU(), ()),
    (nn.Embedding(6, 3), (4,)),
    (nn.Embedding(6, 3, padding_idx=2), (2, 5)),
]
IDS = [f"{layer}-{shape}".replace(" ", "") for layer, shape in LAYERS]


def _prepare(layer, shape, num_samples=4):
    torch.manual_seed(0)
    layer = layer.double().eval()
    for tensor in (*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())):
        nn.init.uniform_(tensor, 0.5, 1.5) if tensor.dim() == 1 else nn.init.normal_(tensor)
    x = torch.randn(num_samples, *shape, dtype=torch.float64)
    if isinstance(layer, nn.Embedding):
        x = torch.randint(layer.num_embeddings, (num_samples, *shape))
    return layer, x, torch.randn_like(layer(x)).detach()


def _by_autograd(layer, x, grad):
    """For each parameter (n, *shape): the gradients of one sample at a time."""
    names = [name for name, _ in layer.named_parameters()]
    x, grad = x.contiguous(), grad.contiguous()  # torch's instance norm is wrong for one sample in another layout
    rows = [
        torch.autograd.grad(layer(x[i : i + 1]), list(layer.parameters()), grad[i : i + 1]) for i in range(x.shape[0])
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(names)}


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "expanded gradient"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=IDS)
def test_rules_equal_autograd_on_one_sample_at_a_time(layer, shape, layout):
    layer, x, grad = _prepare(layer, shape)
    if layout == "permuted" and x.dim() > 1:  # as channels_last: the same values, other strides
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    elif layout == "expanded gradient":  # what the backward of a sum gives
        grad = grad.flatten()[0].expand(grad.shape)
    right = _by_autograd(layer, x, grad)
    x_before, grad_before = x.clone(), grad.clone()
    rule = find_layer_rule(layer)

    gradients = rule.per_sample(layer, x, grad)

    for name, value in right.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-12, atol=1e-12)
    for power in (1, 2) if rule.power_sum is not None else ():
        sums = {name: torch.ones_like(value[0]) for name, value in right.items()}
        assert rule.power_sum(layer, x, grad, power, sums)
        for name, value in right.items():
            torch.testing.assert_close(sums[name], 1 + value.abs().pow(power).sum(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, x_before)
    assert torch.equal(grad, grad_before)


SHORTCUTS = [(layer, shape) for layer, shape in LAYERS if find_layer_rule(layer).power_sum is not None]


def test_shortcuts_exist_where_gradients_are_large():
    convolutions = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
    assert {type(layer) for layer, _ in SHORTCUTS} == convolutions | {nn.Linear, nn.Embedding}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("layer", "shape"), SHORTCUTS, ids=str)
def test_shortcuts_add_to_those_parameters_alone_that_count(layer, shape, power):
    layer, x, grad = _prepare(layer, shape)
    right = _by_autograd(layer, x, grad)
    for name, value in right.items():
        sums = {name: torch.zeros_like(value[0])}
        assert find_layer_rule(layer).power_sum(layer, x, grad, power, sums)
        torch.testing.assert_close(sums[name], value.abs().pow(power).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("layer", "shape"), SHORTCUTS, ids=str)
def test_shortcuts_in_half_precision_sum_in_single(layer, shape, power):
    """A square of half precision would vanish below 2e-4 and overflow above 256."""
    layer, x, grad = _prepare(layer, shape)
    small = 1e-4
    right = {name: value.abs().pow(power).sum(0) for name, value in _by_autograd(layer, x, grad * small).items()}
    layer = deepcopy(layer).to(torch.bfloat16)
    sums = {name: torch.zeros(value.shape) for name, value in right.items()}

    half = x if isinstance(layer, nn.Embedding) else x.to(torch.bfloat16)
    assert find_layer_rule(layer).power_sum(layer, half, (grad * small).to(torch.bfloat16), power, sums)

    for name, value in right.items():
        assert (sums[name] - value).norm() < 5e-2 * value.norm()


CONVOLUTIONS = [(layer, shape) for layer, shape in LAYERS if hasattr(layer, "kernel_size")]
CONVOLUTIONS.append((nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=2, dilation=3), (2, 4, 3)))


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=str)
def test_the_batched_product_for_gpus_equals_autograd(layer, shape):
    layer, x, grad = _prepare(layer, shape)
    found = layer_rules.batched_weight_gradients(layer, x, grad)
    torch.testing.assert_close(found, _by_autograd(layer, x, grad)["weight"], rtol=1e-12, atol=1e-12)


def _patched():
    layer = nn.Linear(3, 2)
    layer.forward = lambda x: x
    return layer


class _RenamedLinear(nn.Linear):
    """Computes what Linear computes."""


@pytest.mark.parametrize(
    ("layer", "parent"),
    [
        (nn.Linear(3, 2), nn.Linear),
        (_RenamedLinear(3, 2), nn.Linear),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(3, 2), nn.Linear),
        (nn.BatchNorm2d(3), nn.BatchNorm2d),
        (StandardisedLinear(3, 2), None),
        (_patched(), None),
        (nn.RMSNorm(3), nn.RMSNorm),
        (nn.Bilinear(3, 2, 2), None),
        (nn.Identity(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_rule_belongs_to_the_forward_that_runs(layer, parent):
    rule = find_layer_rule(layer)

    assert rule is (None if parent is None else layer_rules._RULES[parent.forward])


def test_registering_a_rule_for_a_new_layer(monkeypatch):
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

        def forward(self, x):
            return x * self.weight

    def scale(layer, x, grad):
        return {"weight": x * grad}

    assert find_layer_rule(Scale()) is None
    assert register_layer_rule(Scale)(scale) is scale
    assert find_layer_rule(Scale()).per_sample is scale
    assert find_layer_rule(Scale()).power_sum is None


@pytest.mark.parametrize(("power", "expected"), [(1, [3.0, 0.0, 2.0]), (2, [9.0, 0.0, 4.0])])
def test_power_is_a_new_tensor(power, expected):
    tensor = torch.tensor([-3.0, 0.0, 2.0])

    assert raise_to(tensor, power).tolist() == expected
    assert tensor.tolist() == [-3.0, 0.0, 2.0]
