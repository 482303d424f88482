"""Passes over a user's data: limits and streams."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pass_runs import Net, Seen, assert_sees, trained
from small_runs import Rows, in_order, quiet_trainer
from torch.utils.data import (
    DataLoader,
    IterableDataset,
)

from pl_personalize.callbacks import AdaBN, AdaBNS, FisherImportance, MASImportance


@pytest.mark.parametrize(("limit", "rows"), [(2, 8), (0.5, 12), (1.0, 23)])
def test_a_pass_is_of_as_many_batches_as_an_epoch_of_training(tmp_path, limit, rows):
    assert len(torch.cat(trained(tmp_path, in_order(Rows()), limit_train_batches=limit))) == rows


def test_a_limit_of_validation_is_none_of_a_stage_that_is_named(tmp_path):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return in_order(Rows(8))

        def val_dataloader(self):
            return in_order(Rows(6, seed=2))

    net, callback = Net(), MASImportance("val")
    quiet_trainer(tmp_path, callback, limit_val_batches=0).fit(net, datamodule=Data())
    assert_sees(callback, net, [Rows(6, seed=2).x])


class Endless(IterableDataset):
    def __iter__(self):
        row = 0
        while True:
            yield Rows()[row % 23]
            row += 1


@pytest.mark.parametrize("make", [MASImportance, lambda: FisherImportance(draws="all"), AdaBN, AdaBNS])
@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"limit_train_batches": 3, "max_epochs": 2}, 3),
        ({"max_steps": 2, "max_epochs": -1}, 2),
        ({"max_steps": 2, "max_epochs": -1, "accumulate_grad_batches": 2}, 4),
    ],
    ids=["limit", "steps", "accumulated"],
)
def test_of_an_endless_stream_as_many_batches_as_training_takes(tmp_path, make, options, batches):
    net, callback = Net(), make()
    quiet_trainer(tmp_path, callback, **options).fit(net, DataLoader(Endless(), 4))
    if isinstance(callback, AdaBNS):
        torch.testing.assert_close(net.norm.running_mean, Rows().x[: 4 * batches].mean(0))
    else:
        found = callback.statistics if isinstance(callback, AdaBN) else callback.importance
        assert found.num_samples == 4 * batches


def test_an_endless_stream_of_a_stage_that_is_named(tmp_path):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return in_order(Rows(8))

        def val_dataloader(self):
            return DataLoader(Endless(), 4)

    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    net, callback = Validated(), MASImportance("val")
    quiet_trainer(tmp_path, callback, limit_val_batches=2).fit(net, datamodule=Data())
    assert_sees(callback, net, [Rows().x[:8]])


def test_a_stream_without_a_length_that_ends_is_read_to_its_end(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([Rows()[k] for k in range(10)])

    assert len(torch.cat(trained(tmp_path, DataLoader(Stream(), 4), max_epochs=2))) == 10


def test_an_endless_stream_of_which_nothing_is_taken_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"makes no step.*limit_train_batches"):
        quiet_trainer(tmp_path, MASImportance(), max_epochs=0).fit(Net(), DataLoader(Endless(), 4))


def test_a_stream_that_refuses_to_say_its_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([Rows()[k] for k in range(10)])

        def __len__(self):
            raise NotImplementedError

    callback, net = MASImportance(), Net()
    quiet_trainer(tmp_path, callback, enable_progress_bar=True).fit(net, DataLoader(Stream(), 4))
    assert_sees(callback, net, [Rows().x[:10]])


@pytest.mark.parametrize(
    "make", [MASImportance, AdaBN, AdaBNS, lambda *data: AdaBN(*data or ["train"])], ids=["mas", "bn", "bns", "named"]
)
def test_a_run_over_an_iterator_is_refused_before_it_begins(tmp_path, make):
    """A pass would take the batches away from the run, or find none left."""
    with pytest.raises(MisconfigurationException, match=r"(MAS|AdaBN).*are a generator, an iterator .* once only"):
        quiet_trainer(tmp_path, make(), seen := Seen()).fit(Net(), (batch for batch in in_order(Rows())))
    assert seen.inputs == []
    if make in (MASImportance, AdaBN):
        with pytest.raises(MisconfigurationException, match=r"(MAS|AdaBN).*are a generator, an iterator .* once only"):
            quiet_trainer(tmp_path, make(), seen).predict(Net(), (batch for batch in in_order(Rows())))
        net, callback = Net(), make([Rows().x])  # other data leave them to the run
        quiet_trainer(tmp_path, callback, seen).predict(net, (batch for batch in in_order(Rows())))
        assert_sees(callback, net, [Rows().x])
        assert len(torch.cat(seen.inputs)) == 23
