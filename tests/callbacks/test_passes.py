"""What the callbacks see of a user's data: what the user's loaders yield, and when it is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import NoTraining, Rows, in_order, quiet_trainer, run_forked
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from pl_personalize import adapt_batchnorm, estimate_importance
from pl_personalize.callbacks import AdaBN, AdaBNS, FisherImportance, MASImportance


class Net(LightningModule):
    """A classifier with one batch-norm layer, right at the input: its statistics are those of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Seen(Callback):
    """Notes the inputs of ``predict`` and of the last epoch of ``fit``."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.inputs.clear()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.inputs.append(batch[0].clone())

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.inputs.append((batch if isinstance(batch, Tensor) else batch[0]).clone())


def assert_sees(callback: Any, net: nn.Module, inputs: list[Tensor]) -> None:
    """The callback's result is that of these inputs."""
    count = sum(map(len, inputs))
    if isinstance(callback, AdaBN):
        found = callback.statistics
        torch.testing.assert_close(found["norm.running_mean"], torch.cat(inputs).mean(0), rtol=1e-4, atol=1e-5)
    else:
        found = callback.importance
        torch.testing.assert_close(dict(found), dict(estimate_importance(net, inputs, "mas")), rtol=1e-4, atol=1e-6)
    assert found.num_samples == count


def predicted(tmp_path: Any, loaders: Any, net: Net | None = None, **options: Any) -> list[Tensor]:
    """What is predicted, after checks that every callback sees just that."""
    net = net or Net()
    for make in (MASImportance, AdaBN):
        seen, callback = Seen(), make()
        quiet_trainer(tmp_path, callback, seen, **options).predict(net, loaders)
        assert_sees(callback, net, seen.inputs)
    return seen.inputs


def trained(tmp_path: Any, loader: Any, net: Net | None = None, **options: Any) -> list[Tensor]:
    """What the last epoch trained on, after checks that every callback sees the same samples."""
    for make in (MASImportance, AdaBN):
        seen, callback, own = Seen(), make(), net or Net()
        quiet_trainer(tmp_path, callback, seen, **options).fit(own, loader)
        assert_sees(callback, own, seen.inputs)
    return seen.inputs


# Samplers


class Mine(Sampler[int]):
    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


class Pairs:
    """A batch sampler that is no subclass of torch's: pairs from the end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return iter([[k, k - 1] for k in range(self.count - 1, 0, -2)])

    def __len__(self):
        return self.count // 2


ONE_USER = list(range(14, 21))
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


# Classes of loaders


class Scaled(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield x / 255, y


class Wrapped:
    """No DataLoader at all."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)


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


# Hooks


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


# Several loaders


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


# Limits


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


# Streams


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


# What a pass leaves as it was


def order(tmp_path: Any, make_loader: Any, *callbacks: Callback) -> list[Tensor]:
    """All inputs of a fit of two epochs."""

    class Note(Callback):
        inputs: list[Tensor] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.inputs.append(batch[0].clone())

    note = Note()
    note.inputs = []
    torch.manual_seed(3)
    quiet_trainer(tmp_path, note, *callbacks, max_epochs=2).fit(Net(), make_loader())
    return note.inputs


def own_generator() -> DataLoader:
    return DataLoader(Rows(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))


def generator_of_the_sampler() -> DataLoader:
    data = Rows()
    return DataLoader(data, 4, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(5)))


class Turning(Mine):
    """A sampler with a state of its own: each pass begins one later."""

    def __iter__(self):
        self.indices = self.indices[1:] + self.indices[:1]
        return iter(self.indices)


class AroundAnother(DataLoader):
    def __init__(self, loader: DataLoader) -> None:
        super().__init__(loader.dataset, batch_size=loader.batch_size)
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


class CountsEpochs:
    epoch = 0

    def __iter__(self):
        self.epoch += 1
        yield from DataLoader(Rows(), 4, shuffle=True, generator=torch.Generator().manual_seed(self.epoch))


@pytest.mark.parametrize(
    "make_loader",
    [lambda: Wrapped(own_generator()), lambda: AroundAnother(own_generator()), CountsEpochs],
    ids=["wrapper", "subclass around another", "count of epochs"],
)
@pytest.mark.parametrize("make", [MASImportance, AdaBN])
def test_loaders_with_a_state_elsewhere_are_not_read_before_training(tmp_path, make_loader, make):
    plain = order(tmp_path, make_loader)
    loader = make_loader()
    for callback in (make(), make(loader)):
        watched = order(tmp_path, lambda loader=loader: loader, callback)
        assert all(torch.equal(*pair) for pair in zip(plain, watched, strict=True))
        loader = make_loader()


def test_the_first_training_batch_is_tried_out_unchanged(tmp_path):
    class InPlace(Net):
        def forward(self, x):
            return super().forward(x.mul_(2))

    note = Seen()
    quiet_trainer(tmp_path, AdaBN(), note).fit(InPlace(), Wrapped(in_order(Rows(4))))
    assert torch.equal(note.inputs[0], Rows(4).x)


def test_hooks_that_draw_leave_the_random_state(tmp_path):
    class Draws(Net):
        def predict_dataloader(self):
            return DataLoader(Rows(labels=False), batch_size=4, sampler=torch.randperm(23)[:8].tolist())

        val_dataloader = predict_dataloader

        def predict_step(self, batch, batch_idx):
            return batch + torch.rand(())

    def drawn(*callbacks: Callback) -> Tensor:
        torch.manual_seed(1)
        found = quiet_trainer(tmp_path, *callbacks).predict(Draws())
        quiet_trainer(tmp_path, *callbacks).fit(Draws(), in_order(Rows(4)))
        return torch.cat([*found, torch.rand(1, 6)])

    assert torch.equal(drawn(), drawn(MASImportance("val")))


@pytest.mark.parametrize(
    "make_loader",
    [
        lambda: DataLoader(Rows(), batch_size=4, shuffle=True),
        own_generator,
        generator_of_the_sampler,
        lambda: DataLoader(Rows(), 4, sampler=Turning(list(range(23)))),
        lambda: DataLoader(Rows(), batch_sampler=BatchSampler(Turning(list(range(23))), 4, False)),
    ],
    ids=["global", "generator", "sampler's generator", "state", "state below a batch sampler"],
)
@pytest.mark.parametrize("make", [MASImportance, AdaBN, AdaBNS])
def test_training_draws_the_same_batches(tmp_path, make_loader, make):
    plain, watched = order(tmp_path, make_loader), order(tmp_path, make_loader, make())
    assert all(torch.equal(*pair) for pair in zip(plain, watched, strict=True))


def test_a_loader_can_be_used_again_as_if_there_had_been_no_pass(tmp_path):
    loader, untouched = own_generator(), own_generator()
    quiet_trainer(tmp_path, MASImportance()).fit(Net(), loader)
    quiet_trainer(tmp_path).fit(Net(), untouched)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(loader, untouched, strict=True))


def test_a_prediction_writer_hears_of_the_predicted_batches_alone(tmp_path):
    class Writer(BasePredictionWriter):
        indices: Any = None

        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
            self.indices = batch_indices

    writer, loader = Writer("epoch"), DataLoader(Rows(), 4, sampler=ONE_USER)
    quiet_trainer(tmp_path, MASImportance(), AdaBN(), writer).predict(Net(), loader)
    assert writer.indices == [[[14, 15, 16, 17], [18, 19, 20]]]


# What a module does in its forward


@pytest.mark.parametrize("make", [MASImportance, lambda: FisherImportance(draws="all"), AdaBN, AdaBNS])
@pytest.mark.parametrize("options", [{}, {"on_step": True}], ids=["", "on step"])
def test_a_module_that_logs_in_its_forward(tmp_path, make, options):
    class Part(LightningModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(x)

    class Logs(Net):
        def forward(self, x):
            self.log("size", x.abs().mean(), batch_size=len(x), **options)
            self.log_dict({"mean": x.mean(), "samples": float(len(x))}, batch_size=len(x))
            return super().forward(x)

    def run(*callbacks: Callback) -> dict[str, float]:
        trainer = quiet_trainer(tmp_path, *callbacks)
        trainer.fit(Logs(), in_order(Rows()))
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    metrics = run(make())
    assert metrics == run()
    assert math.isfinite(metrics["size"])


def test_the_log_of_a_module_is_its_own_again(tmp_path):
    net = Net()
    quiet_trainer(tmp_path, MASImportance()).fit(net, in_order(Rows()))
    assert not {"log", "log_dict"} & vars(net).keys()


def test_batches_on_their_way_are_what_adapt_batchnorm_gets(tmp_path):
    net, callback = Net(), AdaBN()
    quiet_trainer(tmp_path, callback).predict(net, DataLoader(Rows(), 4, sampler=ONE_USER))
    expected = adapt_batchnorm(Net(), [Rows().x[ONE_USER]])
    torch.testing.assert_close(net.norm.running_var, expected["norm.running_var"])


def test_data_without_the_labels_that_are_needed_name_the_callback(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"FisherImportance on Net: .*labels"):
        quiet_trainer(tmp_path, FisherImportance(labels="true")).predict(Net(), in_order(Rows(labels=False)))


# Several processes

RANKS = """
import json, sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SubsetRandomSampler, WeightedRandomSampler

from pl_personalize.callbacks import MASImportance

FOLDER = Path(sys.argv[1])
X = torch.arange(12.0)[:, None] + 1


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(1, 2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Note(Callback):
    def __init__(self, what):
        self.what, self.batches = what, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch.flatten().tolist())

    def on_train_end(self, trainer, pl_module):
        content = json.dumps([self.batches, torch.rand(()).item()])
        (FOLDER / f"{self.what}-{trainer.global_rank}.json").write_text(content)


class ThreeTimes(DistributedSampler):
    def __iter__(self):
        return iter([*super().__iter__()] * 3)

    def __len__(self):
        return 3 * super().__len__()


class WithReplacement(DistributedSampler):
    def __iter__(self):
        return iter([self.rank] * 6)


def trainer(*callbacks, **options):
    return Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=FOLDER, callbacks=[*callbacks],
        **options,
    )


if __name__ == "__main__":
    for what, callbacks in {"plain": [], "watched": [MASImportance(DataLoader(X, 2, shuffle=True)), MASImportance(
        filename="own")]}.items():
        torch.manual_seed(0)
        sampler = WeightedRandomSampler(torch.ones(12), 12)
        trainer(*callbacks, Note(what)).fit(Net(), DataLoader(X, 2, sampler=sampler))
    try:
        loader = DataLoader(X, batch_sampler=BatchSampler(SubsetRandomSampler(range(4)), 2, False))
        trainer(MASImportance()).predict(Net(), loader, return_predictions=False)
        refused = ""
    except Exception as error:
        refused = str(error)
    often = MASImportance(filename="often")
    shares = [ThreeTimes(X, num_replicas=2, rank=rank) for rank in (0, 1)]

    class Data(Net):
        def train_dataloader(self):
            return DataLoader(X, 2, sampler=shares[self.global_rank])

    trainer(often).fit(Data())
    drawn, shares = MASImportance(filename="drawn"), [WithReplacement(X[:11], num_replicas=2, rank=r) for r in (0, 1)]
    trainer(drawn).fit(Data())
    counts = [callback.importance.num_samples for callback in (often, drawn)]
    (FOLDER / "found.json").write_text(json.dumps([refused, *counts]))
"""


def test_several_processes(tmp_path):
    """Seeds, samplers that Lightning drops, and samplers of a user's own that take samples more than once."""
    run_forked(tmp_path, RANKS)
    for rank in (0, 1):
        plain, watched = (json.loads((tmp_path / f"{what}-{rank}.json").read_text()) for what in ("plain", "watched"))
        assert plain == watched
    refused, often, drawn = json.loads((tmp_path / "found.json").read_text())
    assert "SubsetRandomSampler inside a BatchSampler" in refused
    assert (often, drawn) == (36, 12)
