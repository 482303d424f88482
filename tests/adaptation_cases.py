"""Networks with batch norm, and naive references of their statistics."""

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F
from networks import batch_norm_network
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
