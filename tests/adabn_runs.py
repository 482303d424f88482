"""A module with batch norm and runs of AdaBN, for its tests."""

import copy

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import Rows, in_order
from small_runs import quiet_trainer as trainer
from torch import nn

from pl_personalize.adaptation import estimate_batchnorm


class Net(LightningModule):
    """A user's own module, with two batch-norm layers and dropout; it notes what each test step saw."""

    def __init__(self, norm: bool = True, lr: float = 0.1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, second = ([nn.BatchNorm1d(5)], [nn.BatchNorm1d(4)]) if norm else ([], [])
            self.features = nn.Sequential(nn.Linear(6, 5), *first, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4), *second)
            self.classifier = nn.Linear(4, 3)
        self.lr = lr
        self.score = iter(())
        self.tested, self.outputs = [], []

    def forward(self, x):
        return self.classifier(self.features(x).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", next(self.score, 0.0))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.tested.append(clone(self))
        self.outputs.append(self(batch[0]).clone())

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch if isinstance(batch, torch.Tensor) else batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def fitted(tmp_path, callback, *, net=None, loader=None, **options):
    net = net or Net()
    trainer(tmp_path, callback, **options).fit(net, in_order(Rows()) if loader is None else loader)
    return net


def clone(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def running(state):
    return {name: value for name, value in state.items() if "running" in name}


def with_state(state):
    net = Net()
    net.load_state_dict(state)
    return net


def wanted(net, *datasets, size=4, **options):
    """Statistics of the datasets in order, in batches that do not go across them."""
    net = copy.deepcopy(net)
    batches = [part for dataset in datasets for part in dataset.x.to(net.dtype).split(size)]
    return estimate_batchnorm(net, batches, **options)


def assert_same(found, expected, tolerance=1e-5):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=tolerance, atol=tolerance)


def assert_identical(found, expected):
    assert set(found) == set(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def differ(a, b):
    return all((a[name] - b[name]).abs().max() > 1e-3 for name in b)


class Watch(Callback):
    """The weights after each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(clone(pl_module))


def best_of_three(tmp_path, callback, scores=(0.1, 0.9, 0.3), net=None, after=None, **options):
    net, watch = net or Net(), Watch()
    net.score = iter(scores)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", **({"monitor": "score", "mode": "max"} | options))
    t = trainer(tmp_path, watch, callback, checkpoint, max_epochs=3, enable_checkpointing=True)
    t.fit(net, in_order(Rows()), in_order(Rows(3)))
    if after is not None:
        after(t, net)
    return net, watch, checkpoint
