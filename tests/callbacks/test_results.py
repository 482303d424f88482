"""Results and files of the estimating callbacks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from result_runs import MAKERS, Net, assert_right
from small_runs import NoTraining, Rows, in_order, quiet_trainer, run_forked, run_script

from pl_personalize import BatchNormStatistics, Importance
from pl_personalize.callbacks import (
    AdaBN,
    AdaBNS,
    FisherImportance,
    MASImportance,
    ParameterPenalty,
)
from pl_personalize.callbacks.result_slot import ResultSlot


@pytest.mark.parametrize("make", MAKERS)
def test_a_run_that_is_resumed_after_its_end(tmp_path, make):
    checkpoint = ModelCheckpoint(tmp_path / "ck", save_last=True)
    quiet_trainer(tmp_path, checkpoint, enable_checkpointing=True).fit(first := Net(), in_order(Rows()))
    callback, net = make(), Net()
    quiet_trainer(tmp_path, callback).fit(net, in_order(Rows()), ckpt_path=tmp_path / "ck" / "last.ckpt")
    assert torch.equal(net.head.weight, first.head.weight)
    assert_right(callback, first)
    assert Path(callback.path).is_file()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"max_steps": 0}])
def test_a_run_of_no_step(tmp_path, make, options):
    callback = make()
    quiet_trainer(tmp_path, callback, **options).fit(Net(), in_order(Rows()))
    assert_right(callback, Net())


@pytest.mark.parametrize("make", MAKERS)
def test_a_run_of_no_batch_is_refused_unless_data_were_passed(tmp_path, make):
    with pytest.raises(MisconfigurationException, match="limit_train_batches=0"):
        quiet_trainer(tmp_path, make(), limit_train_batches=0).fit(Net(), in_order(Rows()))
    never = make()
    never.should_estimate = lambda trainer, pl_module: False
    quiet_trainer(tmp_path, never, limit_train_batches=0).fit(Net(), in_order(Rows()))
    callback = make(in_order(Rows()))
    quiet_trainer(tmp_path, callback, limit_train_batches=0).fit(Net(), in_order(Rows(4)))
    assert_right(callback, Net())


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("run", ["fit", "predict"])
@pytest.mark.parametrize("dirpath", [True, False])
def test_a_trial_run_leaves_the_file_of_a_real_one(tmp_path, make, run, dirpath):
    options = {"filename": "user-7"} | ({"dirpath": tmp_path / "mine"} if dirpath else {})
    real, trial = make(**options), make(**options)
    getattr(quiet_trainer(tmp_path, real), run)(Net(), in_order(Rows()))
    written = Path(real.path).read_bytes()
    getattr(quiet_trainer(tmp_path, trial, fast_dev_run=True), run)(Net(), in_order(Rows()))
    assert Path(real.path).read_bytes() == written
    assert trial.path is None
    assert (trial.statistics if isinstance(trial, AdaBN) else trial.importance).num_samples == 4


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("run", ["fit", "predict"])
@pytest.mark.parametrize("folder", ["taken", "taken/below", "taken/far/below"])
def test_a_folder_that_cannot_be_is_refused_before_the_run(tmp_path, make, run, folder):
    (tmp_path / "taken").write_text("a file")
    trainer = quiet_trainer(tmp_path, make(dirpath=tmp_path / folder), NoTraining())
    with pytest.raises(MisconfigurationException, match=r"cannot write .*taken is not a writable folder.*dirpath="):
        getattr(trainer, run)(Net(), in_order(Rows()))


def test_a_folder_without_write_permission_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(MisconfigurationException, match="is not a writable folder"):
        quiet_trainer(tmp_path, MASImportance(), NoTraining()).fit(Net(), in_order(Rows()))


def test_a_folder_in_the_place_of_the_file_is_refused_before_the_run(tmp_path):
    (tmp_path / "importances" / "mas.safetensors").mkdir(parents=True)
    with pytest.raises(MisconfigurationException, match="it is a folder"):
        quiet_trainer(tmp_path, MASImportance(), NoTraining()).fit(Net(), in_order(Rows()))


@pytest.mark.parametrize("make", MAKERS)
def test_a_disk_that_is_full_costs_the_file_alone(tmp_path, make, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr(BatchNormStatistics, "save", full)
    monkeypatch.setattr(Importance, "save", full)
    callback, net = make(), Net()
    with pytest.raises(MisconfigurationException, match=r"cannot write .*No space left.*in memory.*save\(\)"):
        quiet_trainer(tmp_path, callback).fit(net, in_order(Rows()))
    assert_right(callback, net)


@pytest.mark.parametrize(
    "callback", [MASImportance(), FisherImportance(), AdaBN(), AdaBNS(), ParameterPenalty(1.0)], ids=lambda c: type(c)
)
@pytest.mark.parametrize("what", ["Trainer", "module"])
def test_pytorch_lightning_is_refused_with_what_to_change(callback, what):
    foreign = type("Own", (type("Base", (), {"__module__": "pytorch_lightning.core"}),), {})()
    given = {"Trainer": SimpleNamespace(callbacks=[], strategy=None), "module": Net()} | {what: foreign}
    with pytest.raises(MisconfigurationException, match=rf"the {what} is from `pytorch_lightning`.*import lightning"):
        callback.setup(given["Trainer"], given["module"], "fit")


def test_a_result_slot_holds_the_last_run():
    slot = ResultSlot()
    assert (slot.mark, slot.path) == (None, None)
    slot.write("a" * 32, "/long/" + "ä" * 1000 + ".safetensors")
    slot.write("b", "/short.safetensors")
    assert (slot.mark, slot.path) == ("b", "/short.safetensors")
    slot.write("c", None)
    assert (slot.mark, slot.path) == ("c", None)
    with pytest.raises(ValueError, match="too long"):
        slot.write("d", "x" * 9000)


SPAWNED = """
import json, sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from pl_personalize.callbacks import AdaBN, MASImportance, ParameterPenalty

FOLDER, STRATEGY = Path(sys.argv[1]), sys.argv[2]
X = torch.randn(23, 6, generator=torch.Generator().manual_seed(1))


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(what, *callbacks, **options):
    trainer = Trainer(
        accelerator="cpu", devices=2 if STRATEGY == "ddp_fork" else 1, strategy=STRATEGY, max_epochs=1,
        logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=FOLDER,
        callbacks=[*callbacks], **options,
    )
    getattr(trainer, what)(Net(), DataLoader(X, batch_size=4))


if __name__ == "__main__":
    mas, adabn = MASImportance(), AdaBN()
    run("fit", mas, adabn)
    found = [[mas.path, mas.importance.num_samples], [adabn.path, adabn.statistics.num_samples]]
    first = mas.importance
    if STRATEGY == "ddp_fork":  # spawning takes seconds
        run("predict", mas, limit_predict_batches=1)
        found.append([mas.path, mas.importance.num_samples])
        assert mas.importance is not first
    penalty = ParameterPenalty(1.0, mas.importance)
    found.append(penalty.importances is None)
    (FOLDER / "found.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("strategy", "run", "predicted"),
    [("ddp_fork", run_forked, [8]), pytest.param("ddp_spawn", run_script, [], marks=pytest.mark.slow)],
)
def test_the_process_that_launched_others_has_their_results(tmp_path, strategy, run, predicted):
    run(tmp_path, SPAWNED, strategy)
    mas, adabn = tmp_path / "importances" / "mas.safetensors", tmp_path / "batchnorm" / "adabn.safetensors"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == [[str(mas), 23], [str(adabn), 23], *([str(mas), count] for count in predicted), False]
    assert Importance.load(mas).num_samples == [23, *predicted][-1]


def test_loggers_hear_of_the_result_before_they_close(tmp_path):
    logger = CSVLogger(tmp_path)
    quiet_trainer(tmp_path, MASImportance(), logger=logger).fit(Net(), in_order(Rows()))
    assert "importance/mas/norm/head.weight" in Path(logger.log_dir, "metrics.csv").read_text()
