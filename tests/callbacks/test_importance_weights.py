"""Importance callbacks: the weights that importances are of."""

from pathlib import Path

import pytest
import torch
from importance_runs import Net, assert_no_result, assert_same, best_of_three, wanted
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import relative_error
from small_runs import Rows, in_order
from small_runs import quiet_trainer as trainer
from torch.utils.data import DataLoader

from pl_personalize.callbacks import MASImportance


@pytest.mark.parametrize("norm", [True, False])
def test_the_best_weights_are_used_and_the_last_put_back(tmp_path, norm):
    callback = MASImportance()
    net, watch, checkpoint = best_of_three(tmp_path, callback, net=Net(norm))

    assert "epoch=1" in checkpoint.best_model_path
    assert all(torch.equal(value, watch.epochs[2][name]) for name, value in net.state_dict().items())
    best = Net(norm)
    best.load_state_dict(watch.epochs[1])
    assert_same(callback.importance, wanted(best, Rows()))
    assert relative_error(callback.importance, wanted(net, Rows())) > 1e-3


def test_the_last_weights_are_used_if_asked_for(tmp_path):
    callback = MASImportance(weights="last")
    net, _, _ = best_of_three(tmp_path, callback)
    assert_same(callback.importance, wanted(net, Rows()))


def test_a_checkpoint_that_monitors_nothing_has_no_best(tmp_path):
    callback = MASImportance()
    net, _, checkpoint = best_of_three(tmp_path, callback, monitor=None, save_top_k=1, mode="min")
    assert checkpoint.best_model_path
    assert_same(callback.importance, wanted(net, Rows()))


def test_a_best_checkpoint_that_cannot_be_read_is_not_replaced_by_other_weights(tmp_path):
    class Break(Callback):
        def on_train_end(self, trainer, pl_module):
            Path(trainer.checkpoint_callback.best_model_path).write_bytes(b"broken")

    callback, net = MASImportance(), Net()
    net.score = iter([0.5])
    t = trainer(tmp_path, Break(), callback, ModelCheckpoint(tmp_path, monitor="score"), enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"best checkpoint cannot be used: .*ckpt.* weights='last'"):
        t.fit(net, in_order(Rows()), DataLoader(Rows(3), batch_size=3))
    assert_no_result(callback)


def test_a_module_that_saves_a_part_of_its_weights(tmp_path):
    """Lightning's ``strict_loading = False``: the frozen part is not in the checkpoint."""

    class Adapter(Net):
        def __init__(self):
            super().__init__()
            self.strict_loading = False

        def on_save_checkpoint(self, checkpoint):
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: v for name, v in weights.items() if name.startswith("classifier.")}

    callback = MASImportance()
    net, watch, _ = best_of_three(tmp_path, callback, net=Adapter())
    mixed = Net()
    classifier = {name: v for name, v in watch.epochs[1].items() if name.startswith("classifier.")}
    mixed.load_state_dict(watch.epochs[2] | classifier)
    assert_same(callback.importance, wanted(mixed, Rows()))
    assert all(torch.equal(value, watch.epochs[2][name]) for name, value in net.state_dict().items())
