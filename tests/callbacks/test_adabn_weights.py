"""AdaBN: the weights that statistics belong to."""

from pathlib import Path

import pytest
import torch
from adabn_runs import Net, assert_identical, assert_same, best_of_three, clone, differ, running, wanted, with_state
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import Rows, in_order
from small_runs import quiet_trainer as trainer

from pl_personalize import BatchNormStatistics
from pl_personalize.artifacts import tensor_checksum
from pl_personalize.callbacks import AdaBN


def test_the_file_has_the_best_and_the_model_the_last_weights_statistics(tmp_path):
    callback = AdaBN()
    net, watch, checkpoint = best_of_three(tmp_path, callback)
    assert "epoch=1" in checkpoint.best_model_path
    best, last = with_state(watch.epochs[1]), with_state(watch.epochs[2])

    loaded = BatchNormStatistics.load(callback.path)
    assert_same(loaded, wanted(best, Rows()))
    assert loaded.fingerprint == tensor_checksum(dict(best.named_parameters()))
    assert_same(running(net.state_dict()), wanted(last, Rows()))
    assert differ(loaded, running(net.state_dict()))
    others = {name: value for name, value in watch.epochs[2].items() if "running" not in name}
    assert_identical({name: net.state_dict()[name] for name in others}, others)


def test_fit_then_test_of_the_best_then_fit(tmp_path):
    data, runs = Rows(9, seed=2), {}
    callback = AdaBN(in_order(data))

    def after(t, net):
        t.test(net, in_order(Rows(5, seed=3)), ckpt_path="best", verbose=False)
        runs["tested"], runs["after test"] = list(net.tested), clone(net)
        t.fit_loop.max_epochs = 4
        net.score = iter([0.95])
        t.fit(net, in_order(Rows()), in_order(Rows(3)))
        t.test(net, in_order(Rows(5, seed=3)), ckpt_path="best", verbose=False)

    net, watch, _ = best_of_three(tmp_path, callback, after=after)
    best = with_state(watch.epochs[1])
    expected = wanted(best, data)
    for seen in runs["tested"]:
        assert_same(running(seen), expected)
        parameters = {name: p for name, p in best.named_parameters()}
        assert_identical({name: seen[name] for name in parameters}, parameters)
    assert differ(running(watch.epochs[1]), expected)
    best.load_state_dict(runs["after test"])
    torch.testing.assert_close(torch.cat(net.outputs[:2]), best.eval()(Rows(5, seed=3).x))

    again = with_state(watch.epochs[3])
    assert any(not torch.equal(p, dict(best.named_parameters())[n]) for n, p in again.named_parameters())
    assert_same(running(net.tested[-1]), wanted(again, data))
    assert_same(BatchNormStatistics.load(callback.path), wanted(again, data))
    assert not any(t.is_inference() for t in (*net.buffers(), *net.parameters()))


def test_the_last_weights_are_used_if_asked_for(tmp_path):
    callback = AdaBN(weights="last")

    def after(t, net):
        t.test(net, in_order(Rows(5, seed=3)), verbose=False)
        assert_same(running(net.tested.pop()), wanted(net, Rows()))
        net.tested.clear()
        with pytest.raises(MisconfigurationException, match=r"adabn\.safetensors belongs to other weights"):
            t.test(net, in_order(Rows(5, seed=3)), ckpt_path="best", verbose=False)

    net, watch, _ = best_of_three(tmp_path, callback, after=after)
    expected = wanted(with_state(watch.epochs[2]), Rows())
    assert_same(BatchNormStatistics.load(callback.path), expected)
    assert net.tested == []


def test_the_last_and_the_best_weights_may_both_be_tested(tmp_path):
    def after(t, net):
        for path in (None, "best"):
            t.test(net, in_order(Rows(4, seed=3)), ckpt_path=path, verbose=False)

    net, watch, _ = best_of_three(tmp_path, AdaBN(), after=after)
    assert_same(running(net.tested[0]), wanted(with_state(watch.epochs[2]), Rows()))
    assert_same(running(net.tested[1]), wanted(with_state(watch.epochs[1]), Rows()))


def test_the_prior_of_the_best_weights_is_what_its_checkpoint_has(tmp_path):
    callback = AdaBN(prior_samples=30)
    net, watch, _ = best_of_three(tmp_path, callback)
    assert_same(callback.statistics, wanted(with_state(watch.epochs[1]), Rows(), prior_samples=30))
    assert_same(running(net.state_dict()), wanted(with_state(watch.epochs[2]), Rows(), prior_samples=30))


def test_a_checkpoint_that_monitors_nothing_has_no_best(tmp_path):
    callback = AdaBN()
    net, _, checkpoint = best_of_three(tmp_path, callback, monitor=None, save_top_k=1, mode="min")
    assert checkpoint.best_model_path
    assert_same(callback.statistics, wanted(net, Rows()))


def test_a_best_checkpoint_that_cannot_be_read_is_not_replaced_by_other_weights(tmp_path):
    class Break(Callback):
        def on_train_end(self, trainer, pl_module):
            Path(trainer.checkpoint_callback.best_model_path).write_bytes(b"broken")

    callback, net = AdaBN(), Net()
    net.score = iter([0.5])
    t = trainer(tmp_path, Break(), callback, ModelCheckpoint(tmp_path, monitor="score"), enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"best checkpoint cannot be used: .*ckpt.* weights='last'"):
        t.fit(net, in_order(Rows()), in_order(Rows(3)))
    assert (callback.statistics, callback.path) == (None, None)
