"""Passes over a user's data: samplers, loaders and hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pass_runs import ONE_USER, Mine, Net, Seen, Wrapped, assert_sees, trained
from small_runs import NoTraining, Rows, in_order, quiet_trainer
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
    WeightedRandomSampler,
)

from pl_personalize.callbacks import AdaBN, AdaBNS, MASImportance


def predicted(tmp_path: Any, loaders: Any, net: Net | None = None, **options: Any) -> list[Tensor]:
    """What is predicted, after checks that every callback sees just that."""
    net = net or Net()
    for make in (MASImportance, AdaBN):
        seen, callback = Seen(), make()
        quiet_trainer(tmp_path, callback, seen, **options).predict(net, loaders)
        assert_sees(callback, net, seen.inputs)
    return seen.inputs


class Pairs:
    """A batch sampler that is no subclass of torch's: pairs from the end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return iter([[k, k - 1] for k in range(self.count - 1, 0, -2)])

    def __len__(self):
        return self.count // 2


SAMPLERS = {
    "list": {"sampler": ONE_USER, "batch_size": 4},
    "range": {"sampler": range(14, 21), "batch_size": 4},
    "own class": {"sampler": Mine(ONE_USER), "batch_size": 4},
    "weights of 0 and 1": {
        "sampler": WeightedRandomSampler([float(k in ONE_USER) for k in range(23)], 7, replacement=False),
        "batch_size": 4,
    },
    "batch sampler": {"batch_sampler": BatchSampler(Mine(ONE_USER), 4, drop_last=False)},
    "repeated": {"sampler": [14, 14, 15, 20], "batch_size": 2},
    "without batches": {"sampler": ONE_USER, "batch_size": None, "collate_fn": lambda row: row[None]},
}


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "batch sampler"])
def test_a_sampler_that_picks_one_users_images(tmp_path, name):
    data = Rows(labels=False)
    inputs = torch.cat(predicted(tmp_path, DataLoader(data, **SAMPLERS[name])))
    allowed = [tuple(row.tolist()) for row in data.x[ONE_USER]]
    assert {tuple(row.tolist()) for row in inputs} <= set(allowed)
    assert len(inputs) == (4 if name == "repeated" else 7)


@pytest.mark.parametrize("make", [MASImportance, AdaBN])
@pytest.mark.parametrize("hook", [False, True])
def test_a_sampler_that_lightning_drops_in_predict_is_refused(tmp_path, make, hook):
    """Inside a batch sampler: everybody's images would be predicted."""

    class Data(LightningDataModule):
        def predict_dataloader(self):
            return DataLoader(Rows(), batch_sampler=BatchSampler(Mine(ONE_USER), 4, drop_last=False))

    trainer = quiet_trainer(tmp_path, make(), seen := Seen())
    data = {"datamodule": Data()} if hook else {"dataloaders": Data().predict_dataloader()}
    with pytest.raises(MisconfigurationException, match=r"Mine inside a BatchSampler.*DataLoader\(…, sampler="):
        trainer.predict(Net(), **data)
    assert seen.inputs == []


def test_a_part_of_the_data_in_order_inside_a_batch_sampler_is_refused_too(tmp_path):
    loader = DataLoader(Rows(), batch_sampler=BatchSampler(SequentialSampler(range(4)), 2, False))
    with pytest.raises(MisconfigurationException, match="SequentialSampler inside a BatchSampler"):
        quiet_trainer(tmp_path, MASImportance()).predict(Net(), loader)
    whole = DataLoader(Rows(), batch_sampler=BatchSampler(SequentialSampler(Rows()), 4, False))
    assert len(torch.cat(predicted(tmp_path, whole))) == 23

    class FirstThree(SequentialSampler):
        def __iter__(self):
            return iter(range(3))

    some = DataLoader(Rows(), batch_sampler=BatchSampler(FirstThree(Rows()), 2, False))
    with pytest.raises(MisconfigurationException, match="FirstThree inside a BatchSampler"):
        quiet_trainer(tmp_path, MASImportance()).predict(Net(), some)


def labelled(batch: Any) -> Any:
    return tuple(torch.stack(part) for part in zip(*((x, torch.as_tensor(y)) for x, y in batch), strict=True))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "without batches"])
def test_a_sampler_in_training(tmp_path, name):
    assert len(torch.cat(trained(tmp_path, DataLoader(Rows(), **SAMPLERS[name])))) == (4 if name == "repeated" else 7)


def test_an_own_batch_sampler(tmp_path):
    inputs = trained(tmp_path, DataLoader(Rows(), batch_sampler=Pairs(8)))
    assert torch.equal(torch.cat(inputs), Rows().x[[7, 6, 5, 4, 3, 2, 1, 0]])


@pytest.mark.parametrize("make", [MASImportance, AdaBN])
def test_a_loader_that_is_passed_has_its_sampler_too(tmp_path, make):
    net, callback = Net(), make(DataLoader(Rows(), batch_size=3, sampler=ONE_USER))
    quiet_trainer(tmp_path, callback).predict(net, in_order(Rows(4)))
    assert_sees(callback, net, [Rows().x[ONE_USER]])


def test_a_last_batch_that_is_dropped_is_not_seen(tmp_path):
    inputs = trained(tmp_path, in_order(Rows(), drop_last=True))
    assert torch.equal(torch.cat(inputs), Rows().x[:20])


class Scaled(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield x / 255, y


@pytest.mark.parametrize("wrap", [lambda loader: loader, Wrapped], ids=["DataLoader", "own class"])
def test_a_subclass_that_changes_what_it_yields(tmp_path, wrap):
    inputs = predicted(tmp_path, wrap(Scaled(Rows(), batch_size=4)))
    torch.testing.assert_close(torch.cat(inputs), Rows().x / 255)
    trained(tmp_path, wrap(Scaled(Rows(), batch_size=4)))
    callback = MASImportance(wrap(Scaled(Rows(), batch_size=4)))
    net = Net()
    quiet_trainer(tmp_path, callback).fit(net, in_order(Rows(8)))
    assert_sees(callback, net, [Rows().x / 255])


def test_adabns_adapts_to_what_the_loader_yields(tmp_path):
    net = Net()
    quiet_trainer(tmp_path, AdaBNS()).fit(net, Scaled(Rows(), batch_size=4))
    torch.testing.assert_close(net.norm.running_mean, (Rows().x / 255).mean(0))


def test_workers_and_collate_functions_are_kept(tmp_path):
    loader = DataLoader(Rows(), batch_size=5, num_workers=1, persistent_workers=True, collate_fn=labelled)
    assert len(torch.cat(trained(tmp_path, loader))) == 23


class Cameras(Net):
    """The second loader is of another camera; the first hook runs on the CPU, the last on the device."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [part + (1 if dataloader_idx == 1 and part.is_floating_point() else 0) for part in batch]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [part * (10 if dataloader_idx == 1 and part.is_floating_point() else 1) for part in batch]


def test_transfer_hooks_hear_which_loader_a_batch_is_of(tmp_path):
    inputs = predicted(tmp_path, [in_order(Rows(8)), in_order(Rows(6, seed=2))], Cameras())
    torch.testing.assert_close(torch.cat(inputs), torch.cat([Rows(8).x, 10 * (Rows(6, seed=2).x + 1)]))


def test_hooks_of_a_datamodule(tmp_path):
    class Data(LightningDataModule):
        def predict_dataloader(self):
            return in_order(Rows(8))

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 3, batch[1]]

    net, callback = Net(), MASImportance()
    quiet_trainer(tmp_path, callback).predict(net, datamodule=Data())
    assert_sees(callback, net, [3 * Rows(8).x])


@pytest.mark.parametrize("make", [MASImportance, AdaBN, lambda: MASImportance("train"), AdaBNS])
def test_hooks_that_see_several_train_loaders_at_once_are_refused(tmp_path, make):
    class Summed(Cameras):
        def training_step(self, batch, batch_idx):
            return sum(Net.training_step(self, part, batch_idx) for part in batch)

    with pytest.raises(MisconfigurationException, match=r"Summed.on_before_batch_transfer sees .*several.*dataloader="):
        quiet_trainer(tmp_path, make(), NoTraining()).fit(Summed(), [in_order(Rows(8)), in_order(Rows(8))])


def test_dataloader_indices_count_within_a_stage(tmp_path):
    class Told(Net):
        told: list[Any] = []  # noqa: RUF012

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.told.append((self.trainer.state.stage.value, dataloader_idx))
            return batch

        def train_dataloader(self):
            return in_order(Rows(4))

        def val_dataloader(self):
            return [in_order(Rows(4)), in_order(Rows(4))]

        def test_dataloader(self):
            return in_order(Rows(4))

    quiet_trainer(tmp_path, MASImportance(["train", "val", "test"])).fit(net := Told())
    assert net.told[1:] == [("train", 0), ("validate", 0), ("validate", 1), ("test", 0)]


class Augments(Net):
    """Augments what it trains on, as many modules do."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 10, batch[1]] if self.trainer.training else batch


class TrainAndVal(LightningDataModule):
    """Divides its data anew at each ``setup("fit")``."""

    def setup(self, stage):
        if stage == "fit":
            self.rows = Rows(8, seed=getattr(self, "count", 1))
            self.count = getattr(self, "count", 1) + 1

    def train_dataloader(self):
        return in_order(self.rows)

    def val_dataloader(self):
        return in_order(Rows(6, seed=2))


def test_a_hook_is_told_the_stage_that_a_batch_is_of(tmp_path):
    net, callback = Augments(), MASImportance(["train", "val"])
    quiet_trainer(tmp_path, callback, limit_val_batches=0).fit(net, datamodule=TrainAndVal())
    assert_sees(callback, net, [10 * Rows(8, seed=1).x, Rows(6, seed=2).x])


def test_the_train_stage_by_name_is_what_was_trained_on(tmp_path):
    named, plain = MASImportance("train", filename="named"), MASImportance(filename="plain")
    data = TrainAndVal()
    quiet_trainer(tmp_path, named, plain, limit_train_batches=1).fit(net := Net(), datamodule=data)
    assert data.count == 2
    assert_sees(named, net, [Rows(8, seed=1).x[:4]])
    assert_sees(plain, net, [Rows(8, seed=1).x[:4]])


def test_a_named_stage_beside_train_loaders_whose_batches_its_hooks_would_not_fit(tmp_path):
    class Both(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {name: [part[0] * 2, part[1]] for name, part in batch.items()} if self.trainer.training else batch

        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

        def val_dataloader(self):
            return in_order(Rows(6, seed=2))

    net, callback = Both(), MASImportance("val")
    quiet_trainer(tmp_path, callback).fit(net, {"a": in_order(Rows(8)), "b": in_order(Rows(8))})
    assert_sees(callback, net, [Rows(6, seed=2).x])


def test_a_named_stage_of_batches_of_another_form(tmp_path):
    """A training batch stands in before the training, and cannot show that the estimate will fail."""

    class Other(Net):
        def predict_dataloader(self):
            return in_order(Rows(6, labels=False))

    net, callback = Other(), MASImportance("predict", forward=lambda module, batch: module(batch))
    with pytest.warns(UserWarning, match=r"trial on a training batch failed: MASImportance on Other: .*forward="):
        quiet_trainer(tmp_path, callback).fit(net, in_order(Rows(8)))
    assert_sees(callback, net, [Rows(6).x])


def test_stages_by_name_are_the_loaders_that_were_passed_to_fit(tmp_path):
    class Validated(Net):
        def val_dataloader(self):
            raise AssertionError("not the loader of this run")

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    net, callback = Validated(), MASImportance(["train", "val"])
    quiet_trainer(tmp_path, callback).fit(net, in_order(Rows(8)), in_order(Rows(6, seed=2)))
    assert_sees(callback, net, [Rows(8).x, Rows(6, seed=2).x])
    with pytest.raises(MisconfigurationException, match="are a list_iterator"):
        quiet_trainer(tmp_path, callback, NoTraining()).fit(
            net, in_order(Rows(8)), iter([next(iter(in_order(Rows())))])
        )


class Unlabelled(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["labelled"], batch_idx)


def test_each_of_several_train_loaders_is_read_by_itself(tmp_path):
    loaders = {"labelled": in_order(Rows(8)), "unlabelled": [in_order(Rows(6, seed=2)), in_order(Rows(4, seed=3))]}
    net, callback = Unlabelled(), MASImportance()
    quiet_trainer(tmp_path, callback).fit(net, loaders)
    assert_sees(callback, net, [Rows(8).x, Rows(6, seed=2).x, Rows(4, seed=3).x])


def test_a_forward_for_batches_of_several_loaders_is_refused_before_training(tmp_path):
    loaders = {"labelled": in_order(Rows(8)), "unlabelled": in_order(Rows(6, seed=2))}
    callback = MASImportance(forward=lambda module, batch: module(batch["labelled"][0]))
    with pytest.raises(MisconfigurationException, match="Each of the dataloaders is read by itself"):
        quiet_trainer(tmp_path, callback, NoTraining()).fit(Unlabelled(), loaders)


def test_combined_loaders(tmp_path):
    loaders = [in_order(Rows(8)), in_order(Rows(6, seed=2))]
    net, callback = Net(), MASImportance(CombinedLoader(loaders, "sequential"))
    quiet_trainer(tmp_path, callback).fit(net, in_order(Rows(4)))
    assert_sees(callback, net, [Rows(8).x, Rows(6, seed=2).x])
    for mode in ("max_size_cycle", "min_size", "max_size"):
        with pytest.raises(MisconfigurationException, match=rf"mode='{mode}'.*a list of the loaders"):
            MASImportance(CombinedLoader(loaders, mode))


def test_several_stages_by_name(tmp_path):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return in_order(Rows(8))

        def val_dataloader(self):
            return in_order(Rows(6, seed=2))

    net, callback = Net(), MASImportance(["train", "val"])
    quiet_trainer(tmp_path, callback, limit_val_batches=0).fit(net, datamodule=Data())
    assert_sees(callback, net, [Rows(8).x, Rows(6, seed=2).x])
    with pytest.raises(MisconfigurationException, match="got 'vall'"):
        MASImportance(["train", "vall"])
