"""That every run ends with a result, or says before it begins why there can be none."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import NoTraining, Rows, in_order, quiet_trainer, run_forked, run_script
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_personalize import BatchNormStatistics, Importance, adapt_batchnorm, estimate_importance
from pl_personalize.callbacks import (
    AdaBN,
    AdaBNS,
    FisherImportance,
    MASImportance,
    ParameterPenalty,
    PlateauSchedule,
)
from pl_personalize.callbacks.result_slot import ResultSlot

MAKERS = [MASImportance, functools.partial(FisherImportance, draws="all"), AdaBN]


class Net(LightningModule):
    def __init__(self, lr: Any = 0.1, other: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.lr, self.scores = float(lr), iter([0.0, 1.0, 2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", next(self.scores, 9.0), on_epoch=True)
        self.log("mean", self(batch[0]).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", self(batch[0]).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def result(callback: Any) -> dict[str, Tensor]:
    return dict(callback.statistics if isinstance(callback, AdaBN) else callback.importance)


def expected(callback: Any, net: nn.Module) -> dict[str, Tensor]:
    """Over all rows, of the weights and statistics that the model has now."""
    if isinstance(callback, AdaBN):
        return dict(adapt_batchnorm(net, [Rows().x]))
    options = {} if isinstance(callback, MASImportance) else {"draws": "all"}
    return dict(estimate_importance(net, [Rows().x], callback.kind, **options))


def assert_right(callback: Any, net: nn.Module) -> None:
    torch.testing.assert_close(result(callback), expected(callback, net), rtol=1e-4, atol=1e-6)


# Runs without a step


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


# Trial runs


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


# Folders


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


# Which weights


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


# Other runs of a callback


def test_validate_and_test_are_adapted_alike(tmp_path):
    user = in_order(Rows(9, seed=3))
    callback = AdaBN(user)
    trainer = quiet_trainer(
        tmp_path, callback, ModelCheckpoint(tmp_path, monitor="score"), max_epochs=2, enable_checkpointing=True
    )
    trainer.fit(net := Net(), in_order(Rows()), in_order(Rows(3)))
    found = {}
    for run in ("validate", "test"):
        getattr(trainer, run)(net, user, ckpt_path="best", verbose=False)
        torch.testing.assert_close(net.norm.running_mean, Rows(9, seed=3).x.mean(0))
        found[run] = float(trainer.callback_metrics["mean"])
    assert found["validate"] == found["test"]


def test_validate_adapts_to_its_own_data_and_not_to_those_of_an_earlier_fit(tmp_path):
    trainer = quiet_trainer(tmp_path, AdaBN("val"))

    class Fitted(Net):
        def train_dataloader(self):
            return in_order(Rows())

        def val_dataloader(self):
            return in_order(Rows(5))

    trainer.fit(Fitted())
    trainer.validate(other := Net(), in_order(Rows(9, seed=3)), verbose=False)
    torch.testing.assert_close(other.norm.running_mean, Rows(9, seed=3).x.mean(0))


def test_a_search_for_a_batch_size_of_predict(tmp_path):
    class Sized(Net):
        batch_size = 2

        def predict_dataloader(self):
            return DataLoader(Rows(labels=False), batch_size=self.batch_size)

    found = [
        Tuner(quiet_trainer(tmp_path, *callbacks)).scale_batch_size(Sized(), method="predict", max_trials=2)
        for callbacks in ([], [MASImportance()])
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("run", ["validate", "test"])
def test_validate_alone_adapts_to_data_that_were_passed(tmp_path, run):
    net = Net()
    getattr(quiet_trainer(tmp_path, AdaBN([Rows(9, seed=3).x])), run)(net, in_order(Rows()), verbose=False)
    torch.testing.assert_close(net.norm.running_mean, Rows(9, seed=3).x.mean(0))


def test_the_validation_of_a_fit_is_not_adapted(tmp_path):
    class Note(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.mean = pl_module.norm.running_mean.clone()

    note = Note()
    quiet_trainer(tmp_path, AdaBN([Rows(9, seed=3).x]), note).fit(Net(), in_order(Rows()), in_order(Rows(3)))
    assert not torch.allclose(note.mean, Rows(9, seed=3).x.mean(0), atol=0.1)


@pytest.mark.parametrize("first", [True, False])
def test_a_search_for_a_learning_rate_is_no_resumed_run(tmp_path, first, recwarn):
    finder, penalty = LearningRateFinder(num_training_steps=5), ParameterPenalty(1.0, log_name=None)
    callbacks = [finder, AdaBNS(), penalty] if first else [AdaBNS(), penalty, finder]
    quiet_trainer(tmp_path, *callbacks).fit(net := Net(), in_order(Rows()))
    torch.testing.assert_close(net.norm.running_mean, Rows().x.mean(0))
    assert not [w for w in recwarn if "says nothing of where" in str(w.message)]


# Several fits


def test_each_fit_of_a_schedule_begins_anew(tmp_path):
    class Flat(Net):
        def validation_step(self, batch, batch_idx):
            self.log("score", 1.0)

    schedule, steps = PlateauSchedule("score", lr_patience=1, stop_patience=2), []
    for _ in range(3):
        trainer = quiet_trainer(tmp_path, schedule, max_epochs=10)
        trainer.fit(Flat(), in_order(Rows()), in_order(Rows(3)))
        steps.append(trainer.global_step)
    assert steps == [18, 18, 18]


def test_two_schedules_on_one_metric(tmp_path):
    """One that lowers the rate early, one that stops late."""

    class Flat(Net):
        def validation_step(self, batch, batch_idx):
            self.log("score", 1.0)

    drop = PlateauSchedule("score", lr_patience=1, stop_patience=50)
    stop = PlateauSchedule("score", lr_patience=50, stop_patience=3)
    trainer = quiet_trainer(tmp_path, drop, stop, max_epochs=10)
    trainer.fit(net := Flat(), in_order(Rows()), in_order(Rows(3)))
    assert trainer.current_epoch == 4
    assert net.optimizers().param_groups[0]["lr"] == pytest.approx(0.01)


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.norm)

    def finetune_function(self, pl_module, epoch, optimizer):
        self.unfreeze_and_add_param_group(pl_module.norm, optimizer)


@pytest.mark.parametrize("other", [lambda: AdaBNS(module="norm"), Thaws], ids=["AdaBNS", "a user's own"])
@pytest.mark.parametrize("first", [True, False])
def test_adabns_beside_a_callback_that_freezes_too_is_refused(tmp_path, other, first):
    callbacks = [other(), AdaBNS()] if first else [AdaBNS(), other()]
    with pytest.raises(MisconfigurationException, match="would each freeze what the other trains"):
        quiet_trainer(tmp_path, *callbacks, NoTraining()).fit(Net(), in_order(Rows()))


# Other packages and launchers


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
