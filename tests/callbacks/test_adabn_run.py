"""AdaBN: effects on the run around it, and other callbacks."""

import random

import numpy as np
import pytest
import torch
from adabn_runs import (
    Net,
    Watch,
    assert_identical,
    assert_same,
    best_of_three,
    clone,
    fitted,
    running,
    wanted,
    with_state,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import Rows, in_order, shuffled
from small_runs import quiet_trainer as trainer

from pl_personalize import BatchNormStatistics, estimate_importance
from pl_personalize.callbacks import AdaBN, MASImportance


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"weights": "last", "prior_samples": 3}], ids=str)
def test_a_run_ends_as_it_would_without_the_callback(tmp_path, options):
    def end(*callbacks):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        net = Net()
        trainer(tmp_path, *callbacks, max_epochs=2).fit(net, shuffled(Rows()))
        draws = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]
        flags = [net.training, [(p.requires_grad, p.grad is None) for p in net.parameters()]]
        trainer(tmp_path, max_epochs=1).fit(net, shuffled(Rows()))
        return {name: v for name, v in net.state_dict().items() if "running" not in name}, draws, flags

    plain, mine = end(), end(AdaBN(**options))
    assert_identical(mine[0], plain[0])
    assert mine[1:] == plain[1:]


def test_data_that_draw_numbers_do_not_change_the_run(tmp_path):
    """Augmentation with the global generators, which the trial before the training reads too."""

    class Augmented(Rows):
        def __getitem__(self, k):
            x, y = super().__getitem__(k)
            return x + torch.randn(6) + np.random.randn() + random.random(), y

    def end(*callbacks):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        net = Net()
        trainer(tmp_path, *callbacks).fit(net, shuffled(Augmented()))
        return dict(net.named_parameters())

    assert_identical(end(AdaBN()), end())


def test_of_the_hooks_per_step_only_the_try_out_is_overridden():
    hooks = {name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")}
    mine = {name for name in hooks if getattr(AdaBN, name) is not getattr(Callback, name)}
    starts = {"on_train_start", "on_validation_start", "on_test_start", "on_predict_start"}
    assert mine == starts | {"setup", "on_train_batch_start", "on_fit_end", "teardown"}


def test_the_last_checkpoint_has_the_statistics_of_the_training(tmp_path):
    """It is written when the training ends: resumed from it, the training goes on as without the callback."""

    def last(*callbacks):
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path / str(len(callbacks)), save_last=True, every_n_epochs=5)
        torch.manual_seed(1)
        t = trainer(tmp_path, *callbacks, checkpoint, enable_checkpointing=True, max_epochs=1)
        t.fit(Net(), in_order(Rows()))
        return torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]

    assert_identical(last(AdaBN()), last())


def test_a_prior_is_what_there_was_before_any_adaptation(tmp_path):
    net, callback = Net().eval(), AdaBN(prior_samples=8)
    expected = wanted(net, Rows(9, seed=2), prior_samples=8)
    trainer(tmp_path, callback).predict(net, in_order(Rows(7, seed=3)))
    trainer(tmp_path, callback).predict(net, in_order(Rows(9, seed=2)))
    assert_same(callback.statistics, expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_breaks_off_leaves_no_file(tmp_path, error):
    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise error("stop")

    callback = AdaBN()
    with pytest.raises((SystemExit, error)):
        trainer(tmp_path, Break(), callback).fit(Net(), in_order(Rows()))
    assert (callback.statistics, callback.path) == (None, None)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_the_callback_has_no_state_in_a_checkpoint(tmp_path):
    assert AdaBN().state_dict() == {}
    best_of_three(tmp_path, AdaBN(forward=lambda model, batch: model(batch[0])))
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert not any("AdaBN" in key for key in torch.load(path, weights_only=True)["callbacks"])


def test_it_runs_where_it_should(tmp_path):
    class Never(AdaBN):
        def should_estimate(self, trainer, pl_module):
            return False

    callback, net = Never(), Net()
    fitted(tmp_path, callback, net=net)
    before = clone(net)
    t = trainer(tmp_path, callback)
    t.predict(net, in_order(Rows(labels=False)))
    t.test(net, in_order(Rows()), verbose=False)
    assert_identical(clone(net), before)
    assert (callback.statistics, callback.path) == (None, None)


def test_without_batch_norm_there_are_warnings_and_no_file(tmp_path):
    net, callback = Net(norm=False), AdaBN()
    t = trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match="Net has no batch-norm layers: AdaBN does nothing"):
        t.fit(net, in_order(Rows()))
    before = clone(net)
    t.test(net, in_order(Rows()), verbose=False)
    t.predict(net, in_order(Rows(labels=False)))
    assert_identical(clone(net), before)
    assert callback.statistics is None
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_together_with_importances(tmp_path):
    """Each is what it is alone: the importances are of the weights and statistics of the training."""
    adabn, mas, watch = AdaBN(), MASImportance(), Watch()
    net = Net()
    trainer(tmp_path, watch, mas, adabn).fit(net, in_order(Rows()))
    trained = with_state(watch.epochs[0])
    assert_same(adabn.statistics, wanted(trained, Rows()))
    assert_same(running(net.state_dict()), adabn.statistics)
    reference = estimate_importance(trained, [Rows().x], "mas")
    for name, value in mas.importance.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-4, atol=1e-6)
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {"adabn.safetensors", "mas.safetensors"}


def test_two_with_files_of_their_own(tmp_path):
    """The model has the statistics of the one that comes last."""
    a, b, net = AdaBN([Rows(9, seed=2).x], filename="a"), AdaBN([Rows(9, seed=3).x], filename="b"), Net()
    trainer(tmp_path, a, b).fit(net, in_order(Rows()))
    assert_same(BatchNormStatistics.load(a.path), wanted(net, Rows(9, seed=2), size=9))
    assert_same(BatchNormStatistics.load(b.path), wanted(net, Rows(9, seed=3), size=9))
    assert_identical(running(net.state_dict()), b.statistics)
