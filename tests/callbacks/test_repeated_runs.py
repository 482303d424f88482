"""Callbacks in runs after a first one."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from result_runs import Net
from small_runs import NoTraining, Rows, in_order, quiet_trainer
from torch.utils.data import DataLoader

from pl_personalize.callbacks import (
    AdaBN,
    AdaBNS,
    MASImportance,
    ParameterPenalty,
    PlateauSchedule,
)


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
