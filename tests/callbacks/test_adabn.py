"""AdaBN on Trainers and modules that know nothing of this project."""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import ROWS, Data, NoTraining, Rows, in_order, run_forked, shuffled
from small_runs import quiet_trainer as trainer
from torch import nn
from torch.utils.data import DistributedSampler, IterableDataset, SubsetRandomSampler

from pl_personalize import ArtifactError, BatchNormStatistics, estimate_importance
from pl_personalize.adaptation import estimate_batchnorm
from pl_personalize.artifacts import tensor_checksum
from pl_personalize.callbacks import AdaBN, MASImportance


class Net(LightningModule):
    """A user's own module, with two batch-norm layers and dropout; it notes what each test step saw."""

    def __init__(self, norm: bool = True, lr: float = 0.1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, second = ([nn.BatchNorm1d(5)], [nn.BatchNorm1d(4)]) if norm else ([], [])
            self.features = nn.Sequential(nn.Linear(6, 5), *first, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4), *second)
            self.classifier = nn.Linear(4, 3)
        self.lr = lr
        self.score = iter(())
        self.tested, self.outputs = [], []

    def forward(self, x):
        return self.classifier(self.features(x).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", next(self.score, 0.0))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.tested.append(clone(self))
        self.outputs.append(self(batch[0]).clone())

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch if isinstance(batch, torch.Tensor) else batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def fitted(tmp_path, callback, *, net=None, loader=None, **options):
    net = net or Net()
    trainer(tmp_path, callback, **options).fit(net, in_order(Rows()) if loader is None else loader)
    return net


def clone(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def running(state):
    return {name: value for name, value in state.items() if "running" in name}


def with_state(state):
    net = Net()
    net.load_state_dict(state)
    return net


def wanted(net, *datasets, size=4, **options):
    """Statistics of the datasets in order, in batches that do not go across them."""
    net = copy.deepcopy(net)
    batches = [part for dataset in datasets for part in dataset.x.to(net.dtype).split(size)]
    return estimate_batchnorm(net, batches, **options)


def assert_same(found, expected, tolerance=1e-5):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=tolerance, atol=tolerance)


def assert_identical(found, expected):
    assert set(found) == set(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def differ(a, b):
    return all((a[name] - b[name]).abs().max() > 1e-3 for name in b)


# What is estimated when fit ends


def test_the_train_data_in_order_each_sample_once(tmp_path):
    class Forget(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            data.read.clear()

    data, callback = Rows(), AdaBN()
    net = fitted(tmp_path, callback, loader=in_order(data))
    data.read.clear()
    trainer(tmp_path, Forget(), callback).fit(net, in_order(data))
    assert data.read == list(range(ROWS))
    assert_same(callback.statistics, wanted(net, data))
    assert_identical(running(net.state_dict()), callback.statistics)
    assert callback.statistics.num_samples == ROWS


def test_the_file_is_the_statistics_and_says_for_which_weights(tmp_path):
    callback = AdaBN()
    net = fitted(tmp_path, callback)
    loaded = BatchNormStatistics.load(callback.path)
    assert Path(callback.path) == tmp_path / "batchnorm" / "adabn.safetensors"
    assert_identical(loaded, callback.statistics)
    assert loaded.num_samples == ROWS
    assert loaded.fingerprint == callback.statistics.fingerprint == tensor_checksum(dict(net.named_parameters()))


def test_folder_and_name_may_be_chosen(tmp_path):
    callback = AdaBN(dirpath=tmp_path / "a" / "b", filename="user-1")
    fitted(tmp_path, callback)
    assert Path(callback.path) == tmp_path / "a" / "b" / "user-1.safetensors"
    assert BatchNormStatistics.load(callback.path).num_samples == ROWS


def test_by_default_the_file_is_in_the_loggers_folder(tmp_path):
    logger, callback = CSVLogger(tmp_path, name="runs"), AdaBN()
    fitted(tmp_path, callback, logger=logger)
    assert Path(callback.path) == Path(logger.log_dir, "batchnorm", "adabn.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {"exact": True},
        {"exact": True, "max_scratch_mb": 1e-6},
        {"prior_samples": 9},
        {"exact": True, "prior_samples": 9},
    ],
    ids=str,
)
def test_options_are_those_of_the_function(tmp_path, options):
    class Before(Callback):
        def on_train_end(self, trainer, pl_module):
            self.state = clone(pl_module)

    before, callback = Before(), AdaBN(**options)
    trainer(tmp_path, before, callback).fit(Net(), in_order(Rows()))
    expected = wanted(with_state(before.state), Rows(), **options)
    assert_same(callback.statistics, expected)
    assert differ(callback.statistics, wanted(with_state(before.state), Rows(8)))


def test_part_of_the_module_and_own_forward(tmp_path):
    net, callback = Net(), AdaBN(module="features", forward=lambda model, batch: model(2 * batch[0]))
    fitted(tmp_path, callback, net=net)
    assert list(callback.statistics) == [f"{n}.running_{what}" for n in (1, 5) for what in ("mean", "var")]
    expected = wanted(net, Rows(), module="features", forward=lambda model, batch: model(2 * batch))
    assert_same(callback.statistics, expected)
    assert_identical(running(net.features.state_dict()), callback.statistics)


def test_a_subset_sampler_says_which_samples_there_are(tmp_path):
    data, rows, callback = Rows(), [15, 3, 8, 1, 20, 9, 2], AdaBN(exact=True)
    net = fitted(tmp_path, callback, loader=in_order(data, sampler=SubsetRandomSampler(rows)))
    assert callback.statistics.num_samples == 7
    assert_same(callback.statistics, estimate_batchnorm(net, [data.x[sorted(rows)]]))


def test_several_train_loaders_count_one_after_the_other(tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx):
            return sum(super(Two, self).training_step(part, batch_idx) for part in batch.values())

    net, callback, (a, b) = Two(), AdaBN(), (Rows(), Rows(10, seed=2))
    fitted(tmp_path, callback, net=net, loader={"a": in_order(a), "b": in_order(b)})
    assert callback.statistics.num_samples == 33
    assert_same(callback.statistics, wanted(net, a, b))


def test_an_iterable_dataset_is_taken_as_it_is(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([data[k] for k in range(ROWS)])

    data, callback, net = Rows(), AdaBN(), Net()
    fitted(tmp_path, callback, net=net, loader=in_order(Stream()))
    assert_same(callback.statistics, wanted(net, data))


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precision(tmp_path, precision):
    """Autocast is off while estimating."""
    net, callback = Net(), AdaBN()
    fitted(tmp_path, callback, net=net, precision=precision)
    double = precision == "64-true"
    assert {value.dtype for value in callback.statistics.values()} == {torch.float64 if double else torch.float32}
    assert_same(callback.statistics, wanted(net, Rows()), 1e-12 if double else 1e-6)


@pytest.mark.parametrize("run", ["fit", "predict"])
def test_fast_dev_run_takes_as_many_batches(tmp_path, run):
    callback, data, net = AdaBN(), Rows(), Net()
    getattr(trainer(tmp_path, callback, fast_dev_run=2), run)(net, in_order(data))
    assert callback.statistics.num_samples == 8
    assert_same(callback.statistics, estimate_batchnorm(net, data.x[:8].split(4)))


# Where the data come from


@pytest.mark.parametrize("exact", [False, True])
def test_an_iterable_of_batches_whose_labels_are_not_looked_at(tmp_path, exact):
    net, data = Net(), Rows(9, seed=2)
    garbage = torch.full((9,), float("nan"))
    callback = AdaBN([(data.x[:5], garbage[:5]), (data.x[5:], garbage[5:])], exact=exact)
    fitted(tmp_path, callback, net=net)
    assert_same(callback.statistics, wanted(net, data, size=9 if exact else 5))


def test_a_list_of_dataloaders_is_one_set_of_data(tmp_path):
    a, b = Rows(9, seed=2, labels=False), Rows(6, seed=3)
    net, callback = Net(), AdaBN([in_order(a), in_order(b)])
    fitted(tmp_path, callback, net=net)
    assert callback.statistics.num_samples == 15
    assert_same(callback.statistics, wanted(net, a, b))


@pytest.mark.parametrize(
    ("name", "stage", "parts"),
    [
        ("train", "fit", [Rows()]),
        ("val", "validate", [Rows(9, seed=2)]),
        ("test", "test", [Rows(5, seed=3), Rows(6, seed=4)]),
        ("predict", "predict", [Rows(7, seed=5)]),
    ],
)
def test_the_name_of_a_stage_of_the_datamodule(tmp_path, name, stage, parts, monkeypatch):
    told = []
    monkeypatch.setattr("pl_personalize.callbacks.adabn.rank_zero_info", told.append)
    monkeypatch.setattr(Data, "train_dataloader", lambda self: in_order(Rows()))
    net, data, callback = Net(), Data(), AdaBN(name)
    trainer(tmp_path, callback, limit_val_batches=0).fit(net, datamodule=data)
    assert data.stages == (["fit"] if name == "train" else ["fit", stage])
    assert_same(callback.statistics, wanted(net, *parts))
    assert callback.statistics.num_samples == sum(map(len, parts))
    assert ["transductive" in text for text in told] == ([True] if name == "test" else [])


def test_the_name_of_a_stage_of_the_module(tmp_path):
    class Serving(Net):
        def predict_dataloader(self):
            return in_order(Rows(7, seed=5, labels=False))

    net, callback = Serving(), AdaBN("predict")
    fitted(tmp_path, callback, net=net)
    assert_same(callback.statistics, wanted(net, Rows(7, seed=5)))


def test_a_stream_is_not_looked_at_before_it_is_used(tmp_path):
    """What is read of it is gone."""
    callback = AdaBN(batch for batch in in_order(Rows()))
    net = fitted(tmp_path, callback)
    assert callback.statistics.num_samples == ROWS
    assert_same(callback.statistics, wanted(net, Rows()))


def test_a_stream_for_the_exact_statistics(tmp_path):
    """Layer by layer, in several passes."""
    callback = AdaBN((batch for batch in in_order(Rows())), exact=True, max_scratch_mb=1e-6)
    net = fitted(tmp_path, callback)
    assert callback.statistics.layers == ["features.1", "features.5"]
    assert_same(callback.statistics, wanted(net, Rows(), size=ROWS))


def test_a_stream_for_the_best_and_the_last_weights(tmp_path):
    """Estimated twice, from data that can be read once."""
    callback = AdaBN(batch for batch in in_order(Rows()))
    net, watch, _ = best_of_three(tmp_path, callback)
    assert_same(callback.statistics, wanted(with_state(watch.epochs[1]), Rows()))
    assert_same(running(net.state_dict()), wanted(net, Rows()))


# Which weights


class Watch(Callback):
    """The weights after each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(clone(pl_module))


def best_of_three(tmp_path, callback, scores=(0.1, 0.9, 0.3), net=None, after=None, **options):
    net, watch = net or Net(), Watch()
    net.score = iter(scores)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", **({"monitor": "score", "mode": "max"} | options))
    t = trainer(tmp_path, watch, callback, checkpoint, max_epochs=3, enable_checkpointing=True)
    t.fit(net, in_order(Rows()), in_order(Rows(3)))
    if after is not None:
        after(t, net)
    return net, watch, checkpoint


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


# Test and predict runs of their own


def test_predict_alone_adapts_to_what_it_predicts(tmp_path):
    """Lightning predicts in inference mode; a fit of the same module comes after it."""
    net, data, callback = Net(), Rows(labels=False), AdaBN()
    before = clone(net)
    predictions = trainer(tmp_path, callback).predict(net, in_order(data))

    expected = wanted(with_state(before), data)
    assert_same(callback.statistics, expected)
    assert_identical(BatchNormStatistics.load(callback.path), callback.statistics)
    assert_identical(clone(net), before | dict(callback.statistics))
    torch.testing.assert_close(torch.cat(predictions), net.eval()(data.x))
    assert not any(t.is_inference() for t in (*net.buffers(), *callback.statistics.values()))

    fitted(tmp_path, AdaBN(), net=net.train())
    assert not torch.equal(net.features[0].weight, before["features.0.weight"])


def test_predict_counts_what_was_predicted(tmp_path):
    callback = AdaBN()
    trainer(tmp_path, callback, limit_predict_batches=2).predict(Net(), in_order(Rows(labels=False)))
    assert callback.statistics.num_samples == 8


def test_predict_with_other_data_to_adapt_to(tmp_path):
    net, other = Net(), Rows(9, seed=2)
    callback = AdaBN([other.x])
    trainer(tmp_path, callback).predict(net, in_order(Rows(labels=False)))
    assert_same(running(net.state_dict()), wanted(net, other, size=9))


@pytest.mark.parametrize("same", [True, False], ids=["same callback", "new callback"])
def test_a_second_predict_run_adapts_to_its_own_images(tmp_path, same):
    """Two users, one network: the weights are the same, the images are not."""
    net, callback = Net(), AdaBN()
    trainer(tmp_path, callback).predict(net, in_order(Rows(9, seed=2, labels=False)))
    callback = callback if same else AdaBN()
    trainer(tmp_path, callback).predict(net, in_order(Rows(8, seed=3, labels=False)))
    assert_same(running(net.state_dict()), wanted(net, Rows(8, seed=3)))


@pytest.mark.parametrize("run", ["test", "predict"])
def test_data_that_are_passed_count_more_than_the_file_of_an_earlier_run(tmp_path, run):
    """The same folder and the same weights, another user."""
    net = Net()
    for seed in (2, 3):
        t = trainer(tmp_path, AdaBN(in_order(Rows(8, seed=seed))))
        getattr(t, run)(net, in_order(Rows(5, seed=4)), **({"verbose": False} if run == "test" else {}))
    assert_same(running(net.state_dict()), wanted(net, Rows(8, seed=3)))


def test_predict_after_fit_adapts_to_what_it_predicts(tmp_path):
    net, callback, data = Net(), AdaBN(), Rows(9, seed=2, labels=False)
    fitted(tmp_path, callback, net=net)
    trainer(tmp_path, callback).predict(net, in_order(data))
    assert_same(running(net.state_dict()), wanted(net, data))


def test_predict_after_fit_uses_the_statistics_of_the_fit_for_data_that_were_passed(tmp_path):
    net, callback = Net(), AdaBN([Rows(9, seed=2).x])
    fitted(tmp_path, callback, net=net)
    expected = running(clone(net))
    trainer(tmp_path, callback).predict(net, in_order(Rows(labels=False)))
    assert_identical(running(net.state_dict()), expected)


def test_test_alone_adapts_to_data_that_were_passed(tmp_path):
    net, data, callback = Net(), Rows(9, seed=2, labels=False), AdaBN(in_order(Rows(9, seed=2, labels=False)))
    trainer(tmp_path, callback).test(net, in_order(Rows(5, seed=3)), verbose=False)
    assert_same(running(net.tested[0]), wanted(net, data))
    assert_identical(BatchNormStatistics.load(callback.path), callback.statistics)
    assert not any(t.is_inference() for t in net.buffers())


@pytest.mark.parametrize(
    ("name", "stage", "part"), [("predict", "predict", Rows(7, seed=5)), ("val", "validate", Rows(9, seed=2))]
)
def test_test_alone_adapts_to_a_stage_that_was_named(tmp_path, name, stage, part):
    net, data, callback = Net(), Data(), AdaBN(name)
    trainer(tmp_path, callback).test(net, datamodule=data, verbose=False)
    assert data.stages == ["test", stage]
    assert_same(running(net.tested[0]), wanted(net, part))


@pytest.mark.parametrize("limit", [1.0, 1])
def test_adapting_to_the_tested_images_is_called_transductive(tmp_path, monkeypatch, limit):
    told = []
    monkeypatch.setattr("pl_personalize.callbacks.adabn.rank_zero_info", told.append)
    net, data, callback = Net(), Data(), AdaBN("test")
    trainer(tmp_path, callback, limit_test_batches=limit).test(net, datamodule=data, verbose=False)
    assert len(told) == 1
    assert "transductive" in told[0]
    parts = [Rows(5, seed=3), Rows(6, seed=4)]
    if limit == 1 and isinstance(limit, int):
        for part in parts:
            part.x = part.x[:4]
    assert_same(running(net.tested[0]), wanted(net, *parts))


@pytest.mark.parametrize("run", ["validate", "test"])
def test_a_test_without_statistics_for_its_weights_is_refused(tmp_path, run):
    net, callback = Net(), AdaBN()
    before = clone(net)
    with pytest.raises(
        MisconfigurationException,
        match=r"no statistics for the weights at hand: .*adabn\.safetensors does not exist.*AdaBN\(dataloader\)",
    ):
        getattr(trainer(tmp_path, callback), run)(net, in_order(Rows(5, seed=3)), verbose=False)
    assert_identical(clone(net), before)
    assert (callback.statistics, callback.path) == (None, None)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_new_process_finds_the_file(tmp_path):
    """New objects; the weights come from the checkpoint, the statistics from the file."""
    _, watch, checkpoint = best_of_three(tmp_path, AdaBN(dirpath=tmp_path / "user"))
    new, callback = Net(), AdaBN(dirpath=tmp_path / "user")
    t = trainer(tmp_path, callback)
    t.test(new, in_order(Rows(5, seed=3)), ckpt_path=checkpoint.best_model_path, verbose=False)
    expected = BatchNormStatistics.load(tmp_path / "user" / "adabn.safetensors")
    assert_identical(running(new.tested[0]), expected)
    assert_same(expected, wanted(with_state(watch.epochs[1]), Rows()))
    assert_identical(callback.statistics, expected)
    assert not any(t.is_inference() for t in new.buffers())
    fitted(tmp_path, AdaBN(), net=new)


def test_a_file_of_other_weights_is_not_applied(tmp_path):
    fitted(tmp_path, AdaBN())
    written = (tmp_path / "batchnorm" / "adabn.safetensors").read_bytes()
    other = Net()
    before = clone(other)
    with pytest.raises(MisconfigurationException, match=r"adabn\.safetensors belongs to other weights"):
        trainer(tmp_path, AdaBN()).test(other, in_order(Rows(5, seed=3)), verbose=False)
    assert_identical(clone(other), before)
    assert (tmp_path / "batchnorm" / "adabn.safetensors").read_bytes() == written


def test_a_damaged_file_is_named(tmp_path):
    net = fitted(tmp_path, AdaBN())
    path = tmp_path / "batchnorm" / "adabn.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"adabn\.safetensors"):
        trainer(tmp_path, AdaBN()).test(net, in_order(Rows(5)), verbose=False)


# The run around it


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


# Misuse: before any training


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused(strategy):
    fake = object.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=f"AdaBN needs whole parameters .* {strategy.__name__}"):
        AdaBN().setup(SimpleNamespace(strategy=fake), Net(), "fit")


def test_two_callbacks_do_not_write_one_file(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"the same file, adabn\.safetensors"):
        trainer(tmp_path, NoTraining(), AdaBN(), AdaBN()).fit(Net(), in_order(Rows()))
    folder = {"dirpath": tmp_path, "filename": "x"}
    with pytest.raises(MisconfigurationException, match=r"the same file, x\.safetensors"):
        trainer(tmp_path, NoTraining(), MASImportance(**folder), AdaBN(**folder)).fit(Net(), in_order(Rows()))


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_a_stage_without_dataloader_is_refused(tmp_path, stage):
    with pytest.raises(MisconfigurationException, match=f"needs a datamodule or a module with {stage}_dataloader"):
        trainer(tmp_path, NoTraining(), AdaBN(stage)).fit(Net(), in_order(Rows()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaBN("validate"), "'validate'"),
        (lambda: AdaBN(weights="first"), "'first'"),
        (lambda: AdaBN(max_scratch_mb=0), "AdaBN: max_scratch_mb"),
        (lambda: AdaBN(prior_samples=-2), "AdaBN: prior_samples.*-2"),
        (lambda: AdaBN(module="feature"), "Net: .*'feature'"),
    ],
    ids=["stage", "weights", "scratch", "prior", "module"],
)
def test_wrong_options_are_refused_before_training(tmp_path, make, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, NoTraining(), make()).fit(Net(), in_order(Rows()))


@pytest.mark.parametrize("run", ["fit", "test", "predict"])
def test_a_layer_without_running_statistics_is_refused_by_name(tmp_path, run):
    net = Net()
    net.features[1] = nn.BatchNorm1d(5, track_running_stats=False)
    with pytest.raises(MisconfigurationException, match=r"AdaBN on Net: .*'features\.1' keeps no running statistics"):
        getattr(trainer(tmp_path, NoTraining(), AdaBN()), run)(net, in_order(Rows()))


def broken_forward(model, batch):
    raise ValueError("no such modality")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaBN([]), "no samples"),
        (lambda: AdaBN([torch.full((4, 6), float("nan"))]), "'features.1' is not finite"),
        (lambda: AdaBN([{"image": torch.zeros(4, 6)}]), "do not fit as keyword arguments"),
        (lambda: AdaBN(forward=broken_forward), "no such modality"),
        (lambda: AdaBN([torch.zeros(4, 6)], forward=broken_forward, exact=True), "no such modality"),
    ],
    ids=["empty loader", "nan", "dict", "forward", "exact"],
)
def test_what_only_the_data_show_is_refused_before_the_first_step(tmp_path, make, message):
    class Steps(Callback):
        count = 0

        def on_train_batch_end(self, *args):
            Steps.count += 1

    net = Net()
    before = clone(net)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, make(), Steps()).fit(net, in_order(Rows()))
    assert Steps.count == 0
    assert_identical(clone(net), before)


def test_one_row_is_refused_when_the_training_ends_or_counts_with_a_prior(tmp_path):
    with pytest.raises(MisconfigurationException, match="single value for each channel"):
        trainer(tmp_path, AdaBN([Rows().x[:1]])).predict(Net(), in_order(Rows(labels=False)))
    net, callback = Net(), AdaBN([Rows().x[:1]], prior_samples=3)
    before = clone(net)
    trainer(tmp_path, callback).predict(net, in_order(Rows(labels=False)))
    torch.testing.assert_close(callback.statistics["features.1.running_var"], before["features.1.running_var"])
    mean = net.features[0](Rows().x[0]) / 4
    torch.testing.assert_close(callback.statistics["features.1.running_mean"], mean)


def test_a_module_that_is_built_in_configure_model(tmp_path):
    """Lightning calls the hook after the callbacks' ``setup``."""

    class Late(Net):
        def __init__(self):
            LightningModule.__init__(self)
            self.features = self.classifier = None
            self.lr, self.score = 0.1, iter(())

        def configure_model(self):
            if self.features is None:
                built = Net()
                self.features, self.classifier = built.features, built.classifier

    net, callback = Late(), AdaBN(module="features")
    fitted(tmp_path, callback, net=net)
    assert callback.statistics.layers == ["1", "5"]
    assert_same(callback.statistics, wanted(net, Rows(), module="features"))


# LightningCLI


class CLIData(LightningDataModule):
    def train_dataloader(self):
        return in_order(Rows())

    def val_dataloader(self):
        return in_order(Rows(9, seed=2))


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
    - class_path: pl_personalize.callbacks.AdaBN
    - class_path: pl_personalize.callbacks.AdaBN
      init_args:
        dataloader: val
        exact: true
        prior_samples: 16
        weights: last
        module: features
        dirpath: {tmp_path / "cli"}
        filename: mine
        max_scratch_mb: 16
model:
  norm: true
"""
    )
    cli = LightningCLI(Net, CLIData, args=["--config", str(config)], run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    first, second = (c for c in cli.trainer.callbacks if isinstance(c, AdaBN))
    assert_same(first.statistics, wanted(cli.model, Rows()))
    *_, trained = second._before.values()  # both start from what the training left
    cli.model.features.load_state_dict(cli.model.features.state_dict() | dict(trained))
    assert_same(second.statistics, wanted(cli.model, Rows(9, seed=2), module="features", exact=True, prior_samples=16))
    assert Path(second.path) == tmp_path / "cli" / "mine.safetensors"


# Two processes

DDP_SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from pl_personalize import BatchNormStatistics
from pl_personalize.callbacks import AdaBN

FOLDER = Path(sys.argv[1])
ROWS = [(torch.randn(6, generator=torch.Generator().manual_seed(k)) + 1, k % 3) for k in range(23)]
save = BatchNormStatistics.save


def noted_save(statistics, path):
    with open(FOLDER / "saves.txt", "a") as file:
        file.write(f"{path}\\n")
    return save(statistics, path)


BatchNormStatistics.save = noted_save


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4), nn.BatchNorm1d(4)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        torch.save(self.state_dict(), FOLDER / f"test-{self.global_rank}.pt")

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class After(Callback):
    def __init__(self, what):
        self.what = what

    def note(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), FOLDER / f"{self.what}-{trainer.global_rank}.pt")
        results = [
            [c.path, c.statistics.num_samples, c.statistics.fingerprint, *(v.tolist() for v in c.statistics.values())]
            for c in trainer.callbacks
            if isinstance(c, AdaBN)
        ]
        (FOLDER / f"{self.what}-{trainer.global_rank}.json").write_text(json.dumps(results))

    def teardown(self, trainer, pl_module, stage):
        if stage == "fit":
            self.note(trainer, pl_module)

    on_predict_end = note


def trainer(what, *callbacks, **options):
    return Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=FOLDER,
        callbacks=[*callbacks, After(what)], **options,
    )


if __name__ == "__main__":
    loader = DataLoader(ROWS, batch_size=4)
    net = Net()
    fit = trainer(
        "fit",
        AdaBN(DataLoader(ROWS[:1]), prior_samples=2, filename="one"),
        AdaBN(exact=True, max_scratch_mb=1e-6, filename="layerwise"),
        AdaBN(loader, exact=True, filename="exact"),
        AdaBN(filename="train"),
    )
    fit.fit(net, DataLoader(ROWS, batch_size=4))
    trainer("test", AdaBN(filename="train")).test(net, loader, verbose=False)
    trainer("predict", AdaBN(exact=True, filename="double"), precision="64-true").predict(net, loader)
"""


def one_train_batch(net, x):
    """Train-mode batch norm with momentum 1 on one batch; all else in eval mode."""
    net = copy.deepcopy(net).eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.train()
            layer.momentum = 1.0
    with torch.no_grad():
        net(x)
    return running(net.state_dict())


def test_two_processes_give_what_one_gives(tmp_path):
    """Of 23 rows or 1 row; by default one process's batches are those of both."""
    run_forked(tmp_path, DDP_SCRIPT)

    x = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(k)) + 1 for k in range(ROWS)])
    ranks = [torch.load(tmp_path / f"fit-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_identical(ranks[0], ranks[1])
    net = nn.Module()
    net.net = nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4), nn.BatchNorm1d(4)
    )
    net.forward = net.net.forward
    net.load_state_dict(ranks[0])

    loaded = {path.stem: BatchNormStatistics.load(path) for path in (tmp_path / "batchnorm").iterdir()}
    samplers = [DistributedSampler(range(ROWS), num_replicas=2, rank=rank) for rank in (0, 1)]
    shares = [
        part for sampler, rows in zip(samplers, (12, 11), strict=True) for part in x[list(sampler)[:rows]].split(4)
    ]
    assert_same(loaded["train"], estimate_batchnorm(net, shares), 1e-6)
    assert_identical(running(ranks[0]), loaded["train"])
    assert_same(loaded["exact"], one_train_batch(net, x), 1e-4)
    assert_same(loaded["layerwise"], one_train_batch(net, x), 1e-4)
    assert_same(loaded["double"], one_train_batch(net.double(), x.double()), 1e-9)
    counts = {name: statistics.num_samples for name, statistics in loaded.items()}
    assert counts == {"train": 23, "exact": 23, "layerwise": 23, "double": 23, "one": 1}

    tested = [torch.load(tmp_path / f"test-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for state in tested:
        assert_identical(running(state), loaded["train"])
    assert sorted((tmp_path / "saves.txt").read_text().split()) == sorted(
        str(tmp_path / "batchnorm" / f"{name}.safetensors") for name in loaded
    )
    for what in ("fit", "predict"):
        results = [json.loads((tmp_path / f"{what}-{rank}.json").read_text()) for rank in (0, 1)]
        assert results[0] == results[1]
