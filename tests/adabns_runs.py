"""A module with batch norm and runs of AdaBNS, for its tests."""

import copy

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from small_runs import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pl_personalize.adaptation import estimate_batchnorm

ROWS = 12


OPTIONS = ["adapt", "keep", "batch"]


class Net(LightningModule):
    """A user's own module: two batch-norm layers, one of which is below ``head``."""

    def __init__(self, norm: bool = True, lr: float = 0.1, dropout: float = 0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            norms = [nn.BatchNorm1d(5), nn.BatchNorm1d(4)] if norm else [nn.Identity(), nn.LayerNorm(4)]
            self.features = nn.Sequential(nn.Linear(6, 5), norms[0], nn.Tanh(), nn.Dropout(dropout))
            self.head = nn.Sequential(nn.Linear(5, 4), norms[1], nn.ReLU(), nn.Linear(4, 3))
            for layer in norms if norm else []:
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
        self.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr)

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Rows(Dataset):
    def __init__(self, rows=ROWS, seed=1):
        self.x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1
        self.y = torch.arange(rows) % 3

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return self.x[k], self.y[k]


class Watch(Callback):
    """What the model has when each step starts; it comes after the callback in the list of hooks."""

    def __init__(self):
        self.states, self.modes = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states.append(clone(pl_module))
        self.modes.append([m.training for m in norms(pl_module).values()])


def trainer(tmp_path, *callbacks, **options):
    return quiet_trainer(tmp_path, *callbacks, **({"max_epochs": 2} | options))


def loader(dataset=None, **options):
    return DataLoader(dataset or Rows(), **({"batch_size": 4} | options))


def fitted(tmp_path, callback, *, net=None, data=None, **options):
    net, watch = net or Net(), Watch()
    trainer(tmp_path, callback, watch, **options).fit(net, data or loader())
    return net, watch


def norms(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm1d)}


def affine(net):
    return {f"{name}.{what}" for name in norms(net) for what in ("weight", "bias")}


def running(state):
    return {name: value for name, value in state.items() if "running" in name}


def clone(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def changed(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def wanted(net, dataset=None, size=4, **options):
    return estimate_batchnorm(copy.deepcopy(net), (dataset or Rows()).x.split(size), **options)


def assert_same(found, expected, tolerance=1e-5):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def flags(net):
    return (
        [p.requires_grad for p in net.parameters()],
        [m.training for m in net.modules()],
        [(m.track_running_stats, m.momentum) for m in norms(net).values()],
    )


def plain_loop(net, data, epochs=2, lr=0.1, batch_mode=False):
    """Stochastic gradient descent of γ and β, written out."""
    net = copy.deepcopy(net)
    for layer in norms(net).values():
        layer.train(batch_mode)
    parameters = {name: p for name, p in net.named_parameters() if name in affine(net)}
    for _ in range(epochs):
        for x, y in data:
            gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(parameters.values()))
            with torch.no_grad():
                for p, gradient in zip(parameters.values(), gradients, strict=True):
                    p -= lr * gradient
    return clone(net)
