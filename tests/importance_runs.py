"""A module and runs of importance callbacks, for their tests."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import relative_error
from small_runs import Rows, in_order
from small_runs import quiet_trainer as trainer
from torch import nn
from torch.utils.data import DataLoader

from pl_personalize import Importance, estimate_importance


class Net(LightningModule):
    """A user's own module: classifier of (n, 6), with or without batch norm; dropout, so that modes matter."""

    def __init__(self, norm: bool = True, lr: float = 0.1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            norms = [nn.BatchNorm1d(5)] if norm else []
            self.features = nn.Sequential(nn.Linear(6, 5), *norms, nn.Tanh(), nn.Dropout(0.3))
            self.classifier = nn.Linear(5, 3)
        self.lr = lr
        self.score = iter(())

    def forward(self, x):
        return self.classifier(self.features(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", next(self.score, 0.0))

    def predict_step(self, batch, batch_idx):
        return self(batch if isinstance(batch, torch.Tensor) else batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def fitted(tmp_path, callback, *, net=None, loader=None, **options) -> LightningModule:
    net = net or Net()
    trainer(tmp_path, callback, **options).fit(net, in_order(Rows()) if loader is None else loader)
    return net


def wanted(net, dataset, kind="mas", **options) -> Importance:
    return estimate_importance(net, [(dataset.x, dataset.y)], kind, **options)


def assert_same(values, reference, tolerance=1e-6):
    assert relative_error(values, reference) < tolerance


def assert_no_result(callback):
    assert callback.path is None
    with pytest.raises(MisconfigurationException, match="has no importances yet"):
        _ = callback.importance


class Watch(Callback):
    """The weights after each epoch, and at the end."""

    def __init__(self):
        self.epochs, self.end = [], None

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(copy.deepcopy(pl_module.state_dict()))


def best_of_three(tmp_path, callback, scores=(0.1, 0.9, 0.3), net=None, **options):
    net, watch = net or Net(), Watch()
    net.score = iter(scores)
    options = {"monitor": "score", "mode": "max"} | options
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", **options)
    t = trainer(tmp_path, watch, callback, checkpoint, max_epochs=3, enable_checkpointing=True)
    t.fit(net, in_order(Rows()), DataLoader(Rows(3), batch_size=3))
    return net, watch, checkpoint
