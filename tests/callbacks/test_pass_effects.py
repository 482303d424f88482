"""Passes over a user's data: effects on the run, logging in forward, several processes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pass_runs import ONE_USER, Mine, Net, Seen, Wrapped
from small_runs import Rows, in_order, quiet_trainer, run_forked
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
)

from pl_personalize import adapt_batchnorm
from pl_personalize.callbacks import AdaBN, AdaBNS, FisherImportance, MASImportance


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
