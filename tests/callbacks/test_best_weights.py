"""Weights whose importances and statistics are estimated."""

from __future__ import annotations

import argparse
import functools
import pathlib
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from result_runs import MAKERS, Net, assert_right, expected
from small_runs import Rows, in_order, quiet_trainer
from torch import nn

from pl_personalize.callbacks import (
    MASImportance,
)


class Averaged(Net):
    """Averages its weights as Lightning's tutorials do: in a hook of its own, after those of all callbacks."""

    def on_train_epoch_end(self) -> None:
        self.history = [*getattr(self, "history", []), self.head.weight.detach().clone()]

    def on_train_end(self) -> None:
        self.head.weight.data.copy_(torch.stack(self.history).mean(0))


@pytest.mark.parametrize("make", MAKERS)
def test_weights_that_the_module_averages_at_the_end(tmp_path, make):
    callback, net = make(), Averaged(lr=0.5)
    quiet_trainer(tmp_path, callback, max_epochs=4).fit(net, in_order(Rows()))
    assert not torch.equal(net.head.weight, net.history[-1])
    assert_right(callback, net)


class AveragesLate(Callback):
    def on_train_end(self, trainer, pl_module):
        pl_module.head.weight.data.mul_(0.5)


@pytest.mark.parametrize("make", MAKERS)
def test_callbacks_that_average_may_come_after(tmp_path, make):
    callback, net = make(), Net()
    averages = [StochasticWeightAveraging(0.05, swa_epoch_start=2), AveragesLate()]
    quiet_trainer(tmp_path, callback, *averages, max_epochs=5).fit(net, in_order(Rows()))
    assert_right(callback, net)


class Colour(Enum):
    RED = 1


HYPERPARAMETERS = {
    "path": pathlib.Path("data"),
    "partial": functools.partial(int, base=2),
    "enum": Colour.RED,
    "number": np.float64(0.5),
    "array": np.arange(3),
    "module": nn.CrossEntropyLoss(),
    "function": F.relu,
    "namespace": argparse.Namespace(a=1),
    "own object": SimpleNamespace(x=torch.ones(2)),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_the_best_weights_whatever_the_hyperparameters_are(tmp_path, make, name):
    """The first epoch is the best; the Trainer's own checkpoint is read without running code in it."""
    callback, best = make(), ModelCheckpoint(tmp_path / "ck", monitor="score", mode="min")
    net = Net(lr=0.5, other=HYPERPARAMETERS[name])
    trainer = quiet_trainer(tmp_path, callback, best, max_epochs=3, enable_checkpointing=True)
    trainer.fit(net, in_order(Rows()), in_order(Rows(3)))

    of_best = Net()
    saved = torch.load(best.best_model_path, weights_only=False)
    of_best.load_state_dict(saved["state_dict"])
    assert saved["epoch"] == 0
    assert type(saved["hyper_parameters"]["other"]) is type(HYPERPARAMETERS[name])
    assert not torch.equal(of_best.head.weight, net.head.weight)
    assert_right(callback, of_best)


class Counts(Net):
    """Keeps more in a checkpoint than tensors."""

    epochs = 0

    def on_train_epoch_end(self):
        self.epochs += 1

    def get_extra_state(self):
        return {"epochs": self.epochs}

    def set_extra_state(self, state):
        self.epochs = state["epochs"]


class LeavesOut(Net):
    """Does not save a part, and puts it back when a checkpoint is loaded."""

    def on_save_checkpoint(self, checkpoint):
        for name in [name for name in checkpoint["state_dict"] if name.startswith("norm.")]:
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint):
        own = {name: value for name, value in self.state_dict().items() if name.startswith("norm.")}
        checkpoint["state_dict"].update(own)


class Broken(LeavesOut):
    def on_load_checkpoint(self, checkpoint):
        raise KeyError("mine")


class RebuildsHead(Net):
    """Reads entries of its own and of Lightning, replaces a layer, and loads other weights than the state dict's."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["average"] = {name: torch.zeros_like(value) for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        self.head = torch.nn.Linear(*reversed(checkpoint["state_dict"]["head.weight"].shape))
        checkpoint["state_dict"] = checkpoint["average"]
        self.loaded = checkpoint["epoch"]


def with_best(tmp_path, net, folder):
    callback, best = MASImportance(), ModelCheckpoint(folder, monitor="score", mode="min")
    trainer = quiet_trainer(tmp_path, callback, best, max_epochs=3, enable_checkpointing=True)
    trainer.fit(net, in_order(Rows()), in_order(Rows(3)))
    return callback


def test_what_is_no_tensor_is_the_last_weights_again(tmp_path):
    net = Counts()
    with_best(tmp_path, net, tmp_path / "ck")
    assert net.epochs == 3


def test_a_module_that_replaces_its_layers_as_it_is_loaded(tmp_path):
    net = RebuildsHead()
    head = net.head
    callback = with_best(tmp_path, net, tmp_path / "ck")
    assert net.head is head
    assert head.weight.abs().sum() > 0
    assert callback.importance["head.weight"].abs().sum() == 0  # of average weights, all zero


def test_a_module_that_mends_its_checkpoint_as_it_is_loaded(tmp_path):
    net = LeavesOut()
    callback = with_best(tmp_path, net, tmp_path / "ck")
    assert callback.importance.num_samples == 23
    assert not torch.allclose(callback.importance["head.weight"], expected(callback, net)["head.weight"])
    with pytest.raises(MisconfigurationException, match=r"KeyError: 'mine'.*weights='last'"):
        with_best(tmp_path, Broken(), tmp_path / "other")


def test_a_best_checkpoint_on_a_remote_file_system(tmp_path):
    callback = with_best(tmp_path, Net(), "memory://checkpoints")
    local = with_best(tmp_path, Net(), tmp_path / "ck")
    torch.testing.assert_close(dict(callback.importance), dict(local.importance))
