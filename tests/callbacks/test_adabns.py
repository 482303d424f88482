"""AdaBNS: the parameters and statistics that change."""

import copy

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
    plain_loop,
    running,
    trainer,
    wanted,
)
from lightning.pytorch import LightningModule
from torch import nn

from pl_personalize.callbacks import AdaBNS


@pytest.mark.parametrize("statistics", OPTIONS)
def test_only_scales_and_shifts_are_trained(tmp_path, statistics):
    net = Net(dropout=0.2)
    before = clone(net)
    net, _ = fitted(tmp_path, AdaBNS(statistics), net=net, data=loader(shuffle=True))
    moved = {
        "adapt": set(running(before)),
        "keep": set(),
        "batch": {name for name in before if "running" in name or "num_batches" in name},
    }[statistics]
    assert changed(before, clone(net)) == affine(net) | moved


@pytest.mark.parametrize("statistics", OPTIONS)
def test_the_result_is_that_of_a_plain_loop(tmp_path, statistics):
    net = Net()
    start = copy.deepcopy(net)
    if statistics == "adapt":
        wanted(net).apply(start)
    expected = plain_loop(start, loader(), batch_mode=statistics == "batch")
    net, _ = fitted(tmp_path, AdaBNS(statistics), net=net)
    assert_same(clone(net), expected)


def test_statistics_are_adapted_before_the_first_step_and_then_fixed(tmp_path):
    net = Net()
    expected = wanted(net)
    net, watch = fitted(tmp_path, AdaBNS(), net=net, data=loader())
    assert len(watch.states) == 6
    assert_same(running(watch.states[0]), expected)
    for state in [*watch.states, clone(net)]:
        assert changed(running(watch.states[0]), state) == set()
    assert watch.modes == [[False, False]] * 6
    assert {int(layer.num_batches_tracked) for layer in norms(net).values()} == {0}


@pytest.mark.parametrize(
    "options",
    [
        {"exact": True},
        {"prior_samples": 20},
        {"forward": lambda model, batch: model((batch if isinstance(batch, torch.Tensor) else batch[0]).square())},
    ],
    ids=["exact", "prior", "forward"],
)
def test_options_are_those_of_the_function(tmp_path, options):
    net = Net()
    expected, plain = wanted(net, **options), wanted(net)
    net, _ = fitted(tmp_path, AdaBNS(**options), net=net)
    assert_same(running(clone(net)), expected)
    assert (expected["head.1.running_mean"] - plain["head.1.running_mean"]).abs().max() > 1e-3


def test_moving_statistics_move_by_the_momentum_of_each_batch(tmp_path):
    net = Net()
    before = clone(net)
    x = Rows().x[:4]
    hidden = net.features[0](x).detach()
    _, watch = fitted(tmp_path, AdaBNS("batch"), net=net)
    after = watch.states[1]
    torch.testing.assert_close(
        after["features.1.running_mean"], 0.9 * before["features.1.running_mean"] + 0.1 * hidden.mean(0)
    )
    torch.testing.assert_close(
        after["features.1.running_var"], 0.9 * before["features.1.running_var"] + 0.1 * hidden.var(0)
    )
    assert watch.modes == [[True, True]] * 6


@pytest.mark.parametrize("statistics", OPTIONS)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], 0.1, weight_decay=0.5),
    ],
    ids=["sgd", "adamw", "adamw of what needs a gradient"],
)
def test_weight_decay_does_not_touch_frozen_weights(tmp_path, make, statistics):
    net = Net()
    net.make_optimizer = make
    for p in net.parameters():
        p.grad = torch.ones_like(p)  # of an earlier training
    before = clone(net)
    net, _ = fitted(tmp_path, AdaBNS(statistics), net=net)
    assert {n for n in changed(before, clone(net)) if "running" not in n and "num_batches" not in n} == affine(net)


@pytest.mark.parametrize("statistics", ["adapt", "keep"])
def test_a_last_batch_of_one_image_does_no_harm(tmp_path, statistics):
    net = Net()
    start = copy.deepcopy(net)
    if statistics == "adapt":
        wanted(net, size=11).apply(start)
    net, watch = fitted(tmp_path, AdaBNS(statistics), net=net, data=loader(batch_size=11))
    assert len(watch.states) == 4
    assert_same(clone(net), plain_loop(start, loader(batch_size=11)))


def test_a_batch_of_one_image_cannot_be_normalised_by_itself(tmp_path):
    net = Net()
    before = flags(net)
    with pytest.raises(ValueError):  # noqa: PT011 -- the message is PyTorch's own
        fitted(tmp_path, AdaBNS("batch"), net=net, data=loader(batch_size=11))
    assert flags(net) == before


@pytest.mark.parametrize("statistics", ["adapt", "keep"])
def test_validation_between_the_steps_does_not_set_the_statistics_free(tmp_path, statistics):
    net, watch = Net(), Watch()
    expected = wanted(net) if statistics == "adapt" else running(clone(net))
    t = trainer(tmp_path, AdaBNS(statistics), watch, val_check_interval=1, num_sanity_val_steps=1)
    t.fit(net, loader(), loader(Rows(5, seed=2)))
    assert watch.modes == [[False, False]] * 6
    for state in watch.states:
        assert_same(running(state), expected)


@pytest.mark.parametrize("statistics", OPTIONS)
def test_layers_outside_the_module_do_not_change(tmp_path, statistics):
    net = Net()
    before = clone(net)
    net, _ = fitted(tmp_path, AdaBNS(statistics, module="head"), net=net)
    now = changed(before, clone(net))
    assert {"head.1.weight", "head.1.bias"} <= now
    assert [name for name in now if not name.startswith("head.1.")] == []
    assert all(layer.track_running_stats for layer in norms(net).values())
    assert net.features[1].training


def test_layers_below_the_module_are_adapted_behind_the_others_as_they_are(tmp_path):
    net = Net()
    expected = wanted(net, module="head")
    net, watch = fitted(tmp_path, AdaBNS(module="head"), net=net)
    found = running(watch.states[0])
    assert_same({n.removeprefix("head."): v for n, v in found.items() if n.startswith("head.")}, expected)


def test_layers_without_scales_and_shifts_are_adapted_too(tmp_path):
    net = Net()
    net.features[1] = nn.BatchNorm1d(5, affine=False)
    expected, before = wanted(net), clone(net)
    net, _ = fitted(tmp_path, AdaBNS(), net=net)
    assert_same(running(clone(net)), expected)
    assert changed(before, clone(net)) == {"head.1.weight", "head.1.bias", *running(before)}


def test_frozen_layers_are_trained_and_frozen_again(tmp_path):
    net = Net()
    for p in norms(net)["features.1"].parameters():
        p.requires_grad_(False)
    net.features[1].eval()
    before, then = clone(net), flags(net)
    net, _ = fitted(tmp_path, AdaBNS(), net=net)
    assert changed(before, clone(net)) == affine(net) | set(running(before))
    assert flags(net) == then


def test_a_layer_under_two_names(tmp_path):
    class Twice(Net):
        def __init__(self):
            super().__init__()
            self.other = self.features[1]
            self.between = nn.Linear(5, 5)

        def forward(self, x):
            return self.head(self.other(self.between(self.features(x))))

    torch.manual_seed(1)
    net = Twice()
    expected, before = wanted(net), clone(net)
    net, _ = fitted(tmp_path, AdaBNS(), net=net)
    assert_same({n: v for n, v in running(clone(net)).items() if not n.startswith("other")}, expected)
    names = affine(net) | set(expected)
    assert {n for n in changed(before, clone(net)) if not n.startswith("other")} == names
    assert net.other.weight is net.features[1].weight


@pytest.mark.parametrize("case", ["no batch norm", "no scales and shifts"])
@pytest.mark.parametrize("statistics", OPTIONS)
def test_where_there_is_nothing_to_train_all_is_as_without(tmp_path, statistics, case):
    def made():
        net = Net(norm=case != "no batch norm")
        if case != "no batch norm":
            net.features[1], net.head[1] = nn.BatchNorm1d(5, affine=False), nn.BatchNorm1d(4, affine=False)
        return net

    plain, mine = made(), made()
    trainer(tmp_path).fit(plain, loader())
    with pytest.warns(UserWarning, match="AdaBNS does nothing, and all parameters are trained"):
        trainer(tmp_path, AdaBNS(statistics)).fit(mine, loader())
    assert changed(clone(plain), clone(mine)) == set()
    assert changed(clone(made()), clone(mine)) >= {"features.0.weight", "head.3.bias"}


def test_a_module_that_is_built_in_configure_model(tmp_path):
    """Lightning calls the hook after the callbacks' ``setup``."""

    class Late(Net):
        def __init__(self):
            LightningModule.__init__(self)
            self.features = self.head = None
            self.make_optimizer = lambda parameters: torch.optim.SGD(parameters, 0.1)

        def configure_model(self):
            if self.features is None:
                built = Net()
                self.features, self.head = built.features, built.head

    net, _ = fitted(tmp_path, AdaBNS(), net=Late())
    assert changed(clone(Net()), clone(net)) == affine(net) | set(running(clone(net)))
