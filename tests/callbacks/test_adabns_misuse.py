"""AdaBNS: misuse, LightningCLI and two processes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from adabns_runs import (
    OPTIONS,
    ROWS,
    Net,
    Rows,
    assert_same,
    changed,
    clone,
    fitted,
    flags,
    loader,
    plain_loop,
    running,
    trainer,
    wanted,
)
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import cli_of, run_forked
from torch import nn

from pl_personalize.callbacks import AdaBNS


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused(strategy):
    net = Net()
    with pytest.raises(MisconfigurationException, match=f"AdaBNS needs whole parameters .* {strategy.__name__}"):
        AdaBNS().setup(SimpleNamespace(strategy=object.__new__(strategy)), net, "fit")
    assert flags(net) == flags(Net())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": "fixed"}, "'adapt', 'keep' or 'batch'; got 'fixed'"),
        ({"prior_samples": -1}, "AdaBNS: prior_samples.*-1"),
        ({"module": "heads"}, "AdaBNS on Net: .*'heads'"),
    ],
    ids=["statistics", "prior", "module"],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fitted(tmp_path, AdaBNS(**options))


@pytest.mark.parametrize("statistics", OPTIONS)
def test_a_layer_without_running_statistics_is_refused_by_name(tmp_path, statistics):
    net = Net()
    net.head[1] = nn.BatchNorm1d(4, track_running_stats=False)
    before = flags(net)
    with pytest.raises(MisconfigurationException, match=r"AdaBNS on Net: .*'head\.1' keeps no running statistics"):
        fitted(tmp_path, AdaBNS(statistics), net=net)
    assert flags(net) == before


def test_data_that_cannot_be_adapted_to_are_refused_before_the_first_step(tmp_path):
    net, data = Net(), Rows()
    data.x[3] = float("nan")
    before, then = clone(net), flags(net)
    with pytest.raises(MisconfigurationException, match=r"AdaBNS on Net: .*'features\.1' is not finite"):
        fitted(tmp_path, AdaBNS(), net=net, data=loader(data))
    assert changed(before, clone(net)) == set()
    assert flags(net) == then


class CLIData(LightningDataModule):
    def train_dataloader(self):
        return loader()


def test_lightning_cli_yaml(tmp_path):
    rest = """
    - class_path: pl_personalize.callbacks.AdaBNS
      init_args:
        statistics: adapt
        module: head
        exact: true
        prior_samples: 8
model:
  dropout: 0.1
"""
    cli = cli_of(tmp_path, Net, CLIData, rest)
    before, expected = clone(cli.model), wanted(cli.model, module="head", exact=True, prior_samples=8)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    head = clone(cli.model.head)
    assert_same(running(head), expected)
    assert {n for n in changed(before, clone(cli.model)) if "head" in n} == {f"head.{n}" for n in expected} | {
        "head.1.weight",
        "head.1.bias",
    }


DDP_SCRIPT = """
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from pl_personalize.callbacks import AdaBNS

FOLDER = Path(sys.argv[1])
STATE = torch.load(FOLDER / "start.pt", weights_only=True)
ROWS = list(zip(*torch.load(FOLDER / "rows.pt", weights_only=True)))


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.0))
        self.head = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
        self.load_state_dict(STATE)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.features(batch[0])), batch[1])

    def forward(self, x):
        return self.head(self.features(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class After(Callback):
    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), FOLDER / f"end-{trainer.global_rank}.pt")


if __name__ == "__main__":
    Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=FOLDER,
        callbacks=[AdaBNS(exact=True), After()],
    ).fit(Net(), DataLoader(ROWS, batch_size=6))
"""


def test_two_processes_give_what_one_gives(tmp_path):
    """Each takes half of the rows in one step: the mean of their gradients is that of all rows."""
    net, data = Net(), Rows()
    torch.save(net.state_dict(), tmp_path / "start.pt")
    torch.save((data.x, data.y), tmp_path / "rows.pt")
    run_forked(tmp_path, DDP_SCRIPT)
    ends = [torch.load(tmp_path / f"end-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert changed(*ends) == set()
    start = copy.deepcopy(net)
    wanted(net, size=ROWS).apply(start)
    expected = plain_loop(start, [(data.x, data.y)], epochs=4)
    assert_same(ends[0], expected)
    trainer(tmp_path, AdaBNS(exact=True), max_epochs=4).fit(net, loader(batch_size=ROWS))
    assert_same(ends[0], clone(net))
