"""A module and data for tests of ParameterPenalty."""

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from small_runs import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROWS = 16


class Net(LightningModule):
    """A user's own module, with a head."""

    def __init__(self, norm: bool = True, seed: int = 0, momentum: float = 0.9, classes: int = 3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            norms = [nn.BatchNorm1d(5)] if norm else []
            self.body = nn.Sequential(nn.Linear(6, 5), *norms, nn.Tanh(), nn.Linear(5, 4))
            self.head = nn.Linear(4, classes)
        self.momentum, self.lr = momentum, 0.1

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).to(batch[0].dtype), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum)


class WithTerm(Net):
    """The same, with the penalty written into its loss: one parameter at a time, as in the papers."""

    def __init__(self, strength, omega, anchor, **options):
        super().__init__(**options)
        self.strength, self.omega, self.anchor = strength, omega, anchor

    def penalty(self):
        total = 0.0
        for name, p in self.named_parameters():
            if name in self.omega:
                total = total + (self.omega[name].to(p.dtype) * (p - self.anchor[name].to(p.dtype)) ** 2).sum()
        return self.strength * total

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty()


def data(rows=ROWS, seed=1, dtype=torch.float32, **options):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return DataLoader(TensorDataset(x, torch.arange(rows) % 3), **({"batch_size": 4} | options))


def trainer(tmp_path, *callbacks, **options):
    return quiet_trainer(tmp_path, *callbacks, **({"max_epochs": 3} | options))


def trained(tmp_path, net, *callbacks, loader=None, **options):
    trainer(tmp_path, *callbacks, **options).fit(net, data() if loader is None else loader)
    return net


def random_omega(net, seed=5, names=None):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator, dtype=torch.float64)
        for name, p in net.named_parameters()
        if names is None or name in names
    }


def point(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def distance(net, other):
    """The largest difference of a parameter, relative to the parameters' size."""
    return max(
        float((p.double() - q.double()).abs().max() / p.double().abs().max())
        for p, q in zip(point(net).values(), point(other).values(), strict=True)
    )


class Gradients(Callback):
    """What each optimiser step starts with; it comes after the penalty in the list of hooks."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(
            {name: None if p.grad is None else p.grad.clone() for name, p in pl_module.named_parameters()}
        )


def continued(net, omega, anchor):
    with_term = WithTerm(1.0, omega, anchor)
    with_term.load_state_dict(net.state_dict())
    return with_term.train()
