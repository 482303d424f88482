"""RefitHead and AdaptHead on a user's own module and Trainer."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from head_cases import MIX, SERVER, accuracy, changed, data, entries, loader, network
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import quiet_trainer as trainer
from torch import nn

from pl_personalize import HeadAdaptation, HeadReference, adapt_head, refit_head
from pl_personalize.callbacks import AdaptHead, RefitHead


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        made = network()
        self.net = nn.Sequential(made.body, nn.Dropout(0.2), made.head)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Server(LightningDataModule):
    def train_dataloader(self):
        return SERVER[0]

    def val_dataloader(self):
        return SERVER[1]


HEAD = {"net.2.weight", "net.2.bias"}


def test_the_head_in_memory_is_refitted_after_fit(tmp_path):
    plain, model, callback = Module(), Module(), RefitHead()
    for one, callbacks in ((plain, []), (model, [callback])):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of dropout
            trainer(tmp_path, *callbacks).fit(one, *SERVER)
    trained = entries(plain)
    assert changed(model, trained) == HEAD
    expected = refit_head(plain, *SERVER)
    for name in HEAD:
        torch.testing.assert_close(entries(model)[name], entries(plain)[name])
    assert callback.path == str(tmp_path / "heads" / "head-reference.safetensors")
    assert HeadReference.load(callback.path).fingerprint == callback.reference.fingerprint == expected.fingerprint


def test_a_model_is_refitted_without_training(tmp_path):
    model, callback = Module(), RefitHead()
    before = entries(model)
    [metrics] = trainer(tmp_path, callback).validate(model, datamodule=Server())
    assert changed(model, before) == HEAD
    assert metrics["acc"] == pytest.approx(accuracy(model.eval(), SERVER[1].dataset.tensors), abs=1e-6)
    assert metrics["acc"] > 0.8


def test_other_data_and_options(tmp_path):
    model, other = Module(), Module()
    few = loader(data(count=100, seed=8))
    callback = RefitHead(few, SERVER[1], head="net.2", directions=3)
    trainer(tmp_path, callback).validate(model, SERVER[1])
    expected = refit_head(other, few, SERVER[1], directions=3)
    assert callback.reference.fingerprint == expected.fingerprint
    assert callback.reference.directions.shape == (3, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "net.1"}, "RefitHead.*'net.1' is a Dropout"),
        ({"labels": "y"}, "RefitHead on Module: .*'y'"),
        ({"val": "vall"}, "vall"),
        ({"cameras": 4}, "RefitHead on Module: cameras= needs float images"),
        ({"labels": lambda batch: batch[1][:, None]}, "RefitHead on Module: Labels must be class indices"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, options, message):
    model = Module()
    before = entries(model)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, RefitHead(**options)).fit(model, *SERVER)
    assert changed(model, before) == set()


@pytest.mark.parametrize("options", [{"cameras": -1}, {"directions": 0}])
def test_numbers_that_are_none_are_refused_at_once(options):
    with pytest.raises(MisconfigurationException, match=r"RefitHead: .* must be an integer"):
        RefitHead(**options)


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_a_trial_run_refits_nothing(tmp_path, run):
    """One batch need not have samples of every class."""
    few = loader(tuple(part[:3] for part in data(seed=1)))
    model, callback = Module(), RefitHead(few)
    runs = Trainer(default_root_dir=tmp_path, fast_dev_run=True, callbacks=[callback], enable_progress_bar=False)
    before = entries(model)
    runs.validate(model, few) if run == "validate" else runs.fit(model, few, few)
    assert (callback.reference, callback.path) == (None, None)
    if run == "validate":
        assert changed(model, before) == set()


@pytest.fixture
def server(tmp_path):
    model, callback = Module(), RefitHead()
    trainer(tmp_path / "server", callback).validate(model, datamodule=Server())
    return model, callback


def test_the_head_is_adapted_to_the_predicted_images(server, tmp_path):
    model, reference = server[0], server[1].reference
    other, images = Module(), loader(data(MIX, count=200, seed=5))
    other.load_state_dict(entries(model))
    expected = adapt_head(other, images, reference)
    callback = AdaptHead(server[1].path)
    predicted = torch.cat(trainer(tmp_path, callback).predict(model, images))
    assert callback.outcome.shift == expected.shift == "label"
    torch.testing.assert_close(callback.outcome.class_priors, expected.class_priors)
    with torch.no_grad():
        assert torch.equal(predicted, other.eval()(images.dataset.tensors[0]).argmax(1))
    assert torch.equal(HeadAdaptation.load(callback.path).after.bias, expected.after.bias)


def test_a_later_run_starts_from_the_refitted_head(server, tmp_path):
    model, callback = server[0], AdaptHead(server[1].reference)
    before, runs = entries(model), trainer(tmp_path, callback)
    for seed in (5, 6):
        runs.predict(model, loader(data(MIX, count=200, seed=seed)))
        first = callback.outcome
    callback.outcome.undo(model)
    assert changed(model, before) == set()
    assert torch.equal(first.before.bias, before["net.2.bias"].double())


def test_after_an_error_the_model_is_as_it_was(server, tmp_path):
    model, callback = server[0], AdaptHead(server[1].reference)
    runs = trainer(tmp_path, callback)
    runs.predict(model, loader(data(MIX, count=200, seed=5)))
    adapted = entries(model)
    with pytest.raises(MisconfigurationException, match="NaN"):
        runs.predict(model, loader((torch.full((9, 12), float("nan")),)))
    assert changed(model, adapted) == set()
    assert callback.outcome.is_applied(model)


def test_other_images_than_the_predicted_ones(server, tmp_path):
    callback = AdaptHead(server[1].reference, loader(data(MIX, count=200, seed=5)), shift="label")
    trainer(tmp_path, callback).predict(server[0], loader(data(count=10, seed=6)))
    assert callback.outcome.num_images == 200


def test_a_reference_of_another_model_is_refused_and_nothing_is_predicted(server, tmp_path):
    model = Module()
    with pytest.raises(MisconfigurationException, match=r"AdaptHead.*belongs to another head"):
        trainer(tmp_path, AdaptHead(server[1].reference)).predict(model, loader(data(count=10)))
    assert not (tmp_path / "heads").exists()


def test_the_outcome_is_not_in_a_loggers_folder_and_only_its_owner_can_read_it(server, tmp_path):
    callback = AdaptHead(server[1].reference)
    runs = Trainer(
        default_root_dir=tmp_path / "device",
        logger=CSVLogger(tmp_path / "logs"),
        callbacks=[callback],
        enable_progress_bar=False,
    )
    runs.predict(server[0], loader(data(MIX, count=200, seed=5)))
    path = Path(callback.path)
    assert path == tmp_path / "device" / "heads" / "head-adaptation.safetensors"
    assert path.stat().st_mode & 0o777 == 0o600
    assert not list((tmp_path / "logs").rglob("*.safetensors"))


def test_nothing_is_adapted_in_other_runs(server, tmp_path):
    model, callback = server[0], AdaptHead(server[1].reference)
    before = entries(model)
    trainer(tmp_path, callback).validate(model, datamodule=Server())
    assert changed(model, before) == set()
    assert callback.outcome is None
