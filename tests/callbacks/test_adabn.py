"""AdaBN: the statistics at the end of fit, and its options."""

from pathlib import Path

import pytest
import torch
from adabn_runs import Net, assert_identical, assert_same, clone, differ, fitted, running, wanted, with_state
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from small_runs import ROWS, Rows, cli_of, in_order
from small_runs import quiet_trainer as trainer
from torch.utils.data import IterableDataset, SubsetRandomSampler

from pl_personalize import BatchNormStatistics
from pl_personalize.adaptation import estimate_batchnorm
from pl_personalize.artifacts import tensor_checksum
from pl_personalize.callbacks import AdaBN


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


class CLIData(LightningDataModule):
    def train_dataloader(self):
        return in_order(Rows())

    def val_dataloader(self):
        return in_order(Rows(9, seed=2))


def test_lightning_cli_yaml(tmp_path):
    rest = f"""
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
    cli = cli_of(tmp_path, Net, CLIData, rest)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    first, second = (c for c in cli.trainer.callbacks if isinstance(c, AdaBN))
    assert_same(first.statistics, wanted(cli.model, Rows()))
    *_, trained = second._before.values()  # both start from what the training left
    cli.model.features.load_state_dict(cli.model.features.state_dict() | dict(trained))
    assert_same(second.statistics, wanted(cli.model, Rows(9, seed=2), module="features", exact=True, prior_samples=16))
    assert Path(second.path) == tmp_path / "cli" / "mine.safetensors"
