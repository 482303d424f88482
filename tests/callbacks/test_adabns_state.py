"""AdaBNS: modes and gradients restored, and resumed runs."""

import pytest
import torch
from adabns_runs import (
    OPTIONS,
    Net,
    Rows,
    Watch,
    affine,
    assert_same,
    changed,
    clone,
    fitted,
    flags,
    loader,
    norms,
    running,
    trainer,
    wanted,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from pl_personalize.callbacks import AdaBN, AdaBNS


def mixed(net=None):
    net = net or Net()
    net.features[0].bias.requires_grad_(False)
    net.head[1].weight.requires_grad_(False)
    net.head[1].eval()
    net.features[3].eval()
    return net


@pytest.mark.parametrize("statistics", OPTIONS)
def test_modes_and_requires_grad_are_put_back_after_fit(tmp_path, statistics):
    net = mixed()
    before = flags(net)
    fitted(tmp_path, AdaBNS(statistics), net=net)
    assert flags(net) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("hook", ["setup", "on_train_start", "on_train_batch_end", "on_validation_batch_start"])
def test_modes_and_requires_grad_are_put_back_after_an_exception(tmp_path, hook, error):
    def fails(*args, **options):
        raise error("stop")

    breaks, net = Callback(), mixed()
    setattr(breaks, hook, fails)
    before = flags(net)
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, AdaBNS(), breaks).fit(net, loader(), loader(Rows(5)))
    now = flags(net)
    assert (now[0], now[2]) == (before[0], before[2])
    if hook == "on_validation_batch_start":  # where Lightning leaves all in eval mode
        assert [m.training for m in norms(net).values()] == [True, False]
    else:
        assert now[1] == before[1]


@pytest.mark.parametrize("run", ["validate", "test"])
def test_other_runs_freeze_and_change_nothing(tmp_path, run):
    class See(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            seen.append([p.requires_grad for p in pl_module.parameters()])

        on_test_batch_start = on_validation_batch_start

    seen, net = [], Net()
    before, then = clone(net), flags(net)
    getattr(trainer(tmp_path, AdaBNS(), See()), run)(net, loader(), verbose=False)
    assert seen == [then[0]] * 3
    assert changed(before, clone(net)) == set()
    assert flags(net) == then


def test_a_fit_without_the_callback_trains_all_again(tmp_path):
    net, _ = fitted(tmp_path, AdaBNS())
    before = clone(net)
    trainer(tmp_path).fit(net, loader())
    assert changed(before, clone(net)) >= {"features.0.weight", "head.0.weight", "head.3.weight", *affine(net)}


def test_a_second_fit_with_the_same_callback_adapts_again(tmp_path):
    callback, net = AdaBNS(), Net()
    fitted(tmp_path, callback, net=net)
    other = Rows(8, seed=5)
    expected, before = wanted(net, other), clone(net)
    fitted(tmp_path, callback, net=net, data=loader(other))
    assert_same(running(clone(net)), expected)
    assert {n for n in changed(before, clone(net)) if "running" not in n} == affine(net)


def test_a_fit_after_a_test_of_the_best_checkpoint_adapts_again(tmp_path):
    """The checkpoint was loaded to be tested, not to be resumed."""
    net, t = Net(), None
    checkpoint = ModelCheckpoint(tmp_path, monitor="score")
    t = trainer(tmp_path, AdaBNS(), checkpoint, enable_checkpointing=True)
    t.fit(net, loader(), loader(Rows(5)))
    t.test(net, loader(), ckpt_path="best", verbose=False)
    other = Rows(8, seed=5)
    expected = wanted(net, other)
    t.fit_loop.max_epochs = 3
    t.fit(net, loader(other), loader(Rows(5)))
    assert_same(running(clone(net)), expected)


def test_adabn_after_it_estimates_with_what_was_trained(tmp_path):
    adabn, net = AdaBN([Rows(8, seed=5).x]), Net()
    trainer(tmp_path, AdaBNS(), adabn).fit(net, loader())
    assert_same(running(clone(net)), wanted(net, Rows(8, seed=5), size=8))
    assert_same(adabn.statistics, running(clone(net)))


@pytest.mark.parametrize(
    ("steps", "when"),
    [(3, {"every_n_epochs": 1}), (3, {"every_n_train_steps": 3}), (5, {"every_n_train_steps": 5})],
    ids=["between epochs", "after the last step of an epoch", "in an epoch"],
)
@pytest.mark.parametrize("statistics", OPTIONS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, statistics, steps, when):
    """All batches are the same: in an epoch, Lightning goes on with a plain loader's first batch."""
    data = Rows()
    data.x, data.y = data.x[:4].repeat(3, 1), data.y[:4].repeat(3)

    def run(checkpoints, ckpt_path=None, **options):
        net, watch = Net(), Watch()
        net.make_optimizer = lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)
        save = ModelCheckpoint(checkpoints, save_top_k=-1, filename="{step}", **when)
        options = {"max_epochs": 3, "enable_checkpointing": True} | options
        trainer(tmp_path, AdaBNS(statistics), watch, save, **options).fit(net, loader(data), ckpt_path=ckpt_path)
        return net, watch

    whole, watched = run(tmp_path / "whole")
    assert len(watched.states) == 9
    resumed, again = run(tmp_path / "resumed", tmp_path / "whole" / f"step={steps}.ckpt")
    assert again.modes == watched.modes[steps:]
    for left, right in zip(again.states, watched.states[steps:], strict=True):
        assert changed(left, right) == set()
    assert changed(clone(resumed), clone(whole)) == set()
    assert flags(resumed) == flags(whole)
