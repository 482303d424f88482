"""`estimate_importance` leaves the model and the random number generators as they were."""

import random

import numpy as np
import pytest
import torch
from networks import MixesSamples, batch_norm_network, make_network, mlp
from torch import nn

from pl_personalize import estimate_importance

# The model is left as it was


class _Traced(nn.Module):
    """Counts its forwards in a buffer, in place or in a new tensor."""

    def __init__(self, network, in_place=True):
        super().__init__()
        self.network, self.in_place = network, in_place
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.network(x)


def _model_with_a_state():
    torch.manual_seed(0)
    model = _Traced(nn.Sequential(batch_norm_network(), nn.Dropout(), nn.Linear(3, 3)))
    model.train()
    model.network[0][1].eval()
    model.network[1].eval()
    model.network[0][3].weight.requires_grad_(False)
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(k)) if k % 2 else None
    model.network[0][0].register_forward_hook(lambda module, args, output: None)
    model.network[2].register_forward_pre_hook(lambda module, args: None)
    return model


def _state(model):
    modules = list(model.modules())
    return {
        "parameters": [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()],
        "gradients": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "buffers": [(name, id(b), b.clone()) for name, b in model.named_buffers()],
        "attributes": [(list(vars(m)), list(m._modules), list(m._parameters), list(m._buffers)) for m in modules],
        "modes": [m.training for m in modules],
        "hooks": [
            [len(getattr(m, name)) for name in vars(m) if "hook" in name and hasattr(getattr(m, name), "__len__")]
            for m in modules
        ],
        "torch": torch.get_rng_state(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _changes(before, after):
    return [what for what in before if not _equal(before[what], after[what])]


def _random_batches(stop=None):
    for k in range(3):
        if k == 1 and stop is not None:
            raise stop
        np.random.rand(), random.random()
        yield torch.randn(4, 3, 14, 14), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("stop", [None, RuntimeError("broken file"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("kind", ["mas", "fisher"])
def test_the_model_and_the_generators_are_left_as_they_were(kind, reduction, stop):
    model = _model_with_a_state()
    before = _state(model)

    if stop is None:
        estimate_importance(model, _random_batches(), kind, reduction=reduction)
    else:
        with pytest.raises(type(stop)):
            estimate_importance(model, _random_batches(stop), kind, reduction=reduction)

    assert _changes(before, _state(model)) == []


class _Centred(nn.Linear):
    """Mixes samples without failing on a single one."""

    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(0)


class _Interrupted(nn.Module):
    """Fails at one of its forwards, wherever that is in the pass."""

    def __init__(self, network, failing_call):
        super().__init__()
        self.network, self.calls_left = network, iter(range(failing_call - 1, -1, -1))

    def forward(self, x):
        if next(self.calls_left, None) == 0:  # an attribute would be put back after each forward
            raise KeyboardInterrupt("in a forward")
        return self.network(x)


@pytest.mark.parametrize("failing_call", range(1, 9))
@pytest.mark.parametrize("network", ["mlp", "attention", "data_dependent", "mixes samples"])
def test_an_interrupt_in_any_forward_leaves_the_model_as_it_was(network, failing_call):
    inner, x = (_Centred(6, 3), torch.randn(4, 6)) if network == "mixes samples" else make_network(network, 4)
    model = _Interrupted(inner, failing_call)
    before = _state(model)

    with pytest.raises((KeyboardInterrupt, ValueError), match=r"in a forward|mixes"):
        estimate_importance(model, [x] * 10, "mas")

    assert _changes(before, _state(model)) == []


def test_training_goes_on_after_an_estimate_in_inference_mode():
    """A buffer that is an inference tensor afterwards would make the next fit crash."""
    model, x = _Traced(batch_norm_network()), torch.randn(4, 3, 14, 14)
    with torch.inference_mode():
        estimate_importance(model, [x.clone()], "mas")

    model.train()(x).square().sum().backward()

    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.dim() == 4)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_a_buffer_that_forward_replaces_is_left_as_it_was(reduction):
    model, x = _Traced(mlp(), in_place=False), torch.randn(4, 12)
    before = _state(model)

    estimate_importance(model, [x, x], "mas", reduction=reduction)

    assert _changes(before, _state(model)) == []


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        pytest.param(MixesSamples(), torch.randn(4, 6), id="mixes samples"),
        pytest.param(mlp(), torch.full((4, 12), float("nan")), id="NaN"),
        pytest.param(mlp(), torch.randn(4, 11), id="wrong shape"),
        pytest.param(mlp(), (torch.randn(4, 12), torch.tensor([0, 1, 7, 2])), id="wrong label"),
    ],
)
@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_a_refused_model_is_left_as_it_was(model, batch, reduction):
    before = _state(model)

    if not (reduction == "batch" and isinstance(model, MixesSamples)):
        with pytest.raises((ValueError, RuntimeError)):
            estimate_importance(
                model, [batch], "empirical_fisher" if isinstance(batch, tuple) else "mas", reduction=reduction
            )
    else:
        estimate_importance(model, [batch], "mas", reduction=reduction)

    assert _changes(before, _state(model)) == []
