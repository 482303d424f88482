"""AdaBNS: γ and β of batch norm are trained, for statistics that are what they should be, and nothing else is."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import quiet_trainer, run_forked
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pl_personalize.adaptation import estimate_batchnorm
from pl_personalize.callbacks import AdaBN, AdaBNS

ROWS = 12
OPTIONS = ["adapt", "keep", "batch"]


class Net(LightningModule):
    """A user's own module: two batch-norm layers, one of which is below ``head``."""

    def __init__(self, norm: bool = True, lr: float = 0.1, dropout: float = 0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            norms = [nn.BatchNorm1d(5), nn.BatchNorm1d(4)] if norm else [nn.Identity(), nn.LayerNorm(4)]
            self.features = nn.Sequential(nn.Linear(6, 5), norms[0], nn.Tanh(), nn.Dropout(dropout))
            self.head = nn.Sequential(nn.Linear(5, 4), norms[1], nn.ReLU(), nn.Linear(4, 3))
            for layer in norms if norm else []:
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
        self.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr)

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Rows(Dataset):
    def __init__(self, rows=ROWS, seed=1):
        self.x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1
        self.y = torch.arange(rows) % 3

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return self.x[k], self.y[k]


class Watch(Callback):
    """What the model has when each step starts; it comes after the callback in the list of hooks."""

    def __init__(self):
        self.states, self.modes = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states.append(clone(pl_module))
        self.modes.append([m.training for m in norms(pl_module).values()])


def trainer(tmp_path, *callbacks, **options):
    return quiet_trainer(tmp_path, *callbacks, **({"max_epochs": 2} | options))


def loader(dataset=None, **options):
    return DataLoader(dataset or Rows(), **({"batch_size": 4} | options))


def fitted(tmp_path, callback, *, net=None, data=None, **options):
    net, watch = net or Net(), Watch()
    trainer(tmp_path, callback, watch, **options).fit(net, data or loader())
    return net, watch


def norms(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm1d)}


def affine(net):
    return {f"{name}.{what}" for name in norms(net) for what in ("weight", "bias")}


def running(state):
    return {name: value for name, value in state.items() if "running" in name}


def clone(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def changed(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def wanted(net, dataset=None, size=4, **options):
    return estimate_batchnorm(copy.deepcopy(net), (dataset or Rows()).x.split(size), **options)


def assert_same(found, expected, tolerance=1e-5):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def flags(net):
    return (
        [p.requires_grad for p in net.parameters()],
        [m.training for m in net.modules()],
        [(m.track_running_stats, m.momentum) for m in norms(net).values()],
    )


def plain_loop(net, data, epochs=2, lr=0.1, batch_mode=False):
    """Stochastic gradient descent of γ and β, written out."""
    net = copy.deepcopy(net)
    for layer in norms(net).values():
        layer.train(batch_mode)
    parameters = {name: p for name, p in net.named_parameters() if name in affine(net)}
    for _ in range(epochs):
        for x, y in data:
            gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(parameters.values()))
            with torch.no_grad():
                for p, gradient in zip(parameters.values(), gradients, strict=True):
                    p -= lr * gradient
    return clone(net)


# What is trained


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


# Which layers


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


# All is put back


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


# Resuming


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


# Misuse


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


# LightningCLI


class CLIData(LightningDataModule):
    def train_dataloader(self):
        return loader()


def test_lightning_cli_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
seed_everything: false
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: pl_personalize.callbacks.AdaBNS
      init_args:
        statistics: adapt
        module: head
        exact: true
        prior_samples: 8
model:
  dropout: 0.1
"""
    )
    cli = LightningCLI(Net, CLIData, args=["--config", str(config)], run=False, save_config_callback=None)
    before, expected = clone(cli.model), wanted(cli.model, module="head", exact=True, prior_samples=8)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    head = clone(cli.model.head)
    assert_same(running(head), expected)
    assert {n for n in changed(before, clone(cli.model)) if "head" in n} == {f"head.{n}" for n in expected} | {
        "head.1.weight",
        "head.1.bias",
    }


# Two processes

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
