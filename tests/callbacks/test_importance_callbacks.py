"""Importance callbacks: estimates and their data."""

import copy
from pathlib import Path

import pytest
import torch
from importance_runs import Net, assert_no_result, assert_same, fitted, wanted
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import relative_error
from small_runs import ROWS, Data, Rows, in_order
from small_runs import quiet_trainer as trainer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler

from pl_personalize import Importance, estimate_importance
from pl_personalize.callbacks import FisherImportance, MASImportance


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "no batch norm"])
def test_the_train_data_in_order_each_sample_once(tmp_path, norm):
    data, callback = Rows(), MASImportance()
    net = Net(norm)
    trainer(tmp_path, callback, Forget(data)).fit(net, in_order(data))

    assert data.read == list(range(ROWS))
    assert_same(callback.importance, wanted(net, data))
    assert (callback.importance.num_samples, callback.importance.kind) == (ROWS, "mas")
    assert all(value.dtype == torch.float32 for value in callback.importance.values())


class Forget(Callback):
    """Forgets the reads of training; it comes before the callback in the list of hooks."""

    def __init__(self, data):
        self.data = data

    def on_train_epoch_end(self, trainer, pl_module):
        self.data.read.clear()


def test_the_file_is_the_importance(tmp_path):
    callback = MASImportance()
    fitted(tmp_path, callback)
    loaded = Importance.load(callback.path)
    assert Path(callback.path) == tmp_path / "importances" / "mas.safetensors"
    assert {n: v.tolist() for n, v in loaded.items()} == {n: v.tolist() for n, v in callback.importance.items()}
    assert (loaded.kind, loaded.num_samples) == ("mas", ROWS)


def test_folder_and_name_may_be_chosen(tmp_path):
    callback = FisherImportance(dirpath=tmp_path / "a" / "b", filename="task-1")
    fitted(tmp_path, callback)
    assert Path(callback.path) == tmp_path / "a" / "b" / "task-1.safetensors"
    assert Importance.load(callback.path).kind == "fisher"


@pytest.mark.parametrize(
    ("run", "loader"),
    [
        pytest.param("fit", lambda data, sampler: in_order(data, sampler=sampler), id="fit"),
        pytest.param("predict", lambda data, sampler: DataLoader(data, batch_size=4, sampler=sampler), id="predict"),
        # Not with predict: there Lightning drops the sampler inside a batch sampler and predicts all the rows.
        pytest.param(
            "fit",
            lambda data, sampler: DataLoader(data, batch_sampler=BatchSampler(sampler, 4, False)),
            id="batch sampler",
        ),
    ],
)
def test_a_subset_sampler_says_which_samples_there_are(tmp_path, run, loader):
    """The rest may be the validation split."""
    data, rows, callback, net = Rows(), [15, 3, 8, 1, 20, 9, 2], MASImportance(), Net()
    getattr(trainer(tmp_path, callback), run)(net, loader(data, SubsetRandomSampler(rows)))
    assert callback.importance.num_samples == 7
    assert_same(callback.importance, estimate_importance(net, [data.x[sorted(rows)]], "mas"))


def test_a_dataset_of_whole_batches(tmp_path):
    """``DataLoader(batch_size=None)``: an item is a batch."""
    data, net, callback = Rows(), Net(), MASImportance()
    parts = [(data.x[k : k + 4], data.y[k : k + 4]) for k in range(0, ROWS, 4)]
    fitted(tmp_path, callback, net=net, loader=DataLoader(parts, batch_size=None, shuffle=True))
    assert callback.importance.num_samples == ROWS
    assert_same(callback.importance, wanted(net, data))


def test_own_collate_and_workers_are_kept(tmp_path):
    data, callback, net = Rows(), MASImportance(), Net()

    def collate(items):
        return torch.stack([x for x, _ in items]) * 2, torch.stack([y for _, y in items])

    loader = in_order(data, collate_fn=collate, num_workers=1)
    fitted(tmp_path, callback, net=net, loader=loader)
    assert_same(callback.importance, estimate_importance(net, [data.x * 2], "mas"))


def test_several_train_loaders_count_one_after_the_other(tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx):
            return sum(super(Two, self).training_step(part, batch_idx) for part in batch.values())

    net, callback, (a, b) = Two(), MASImportance(), (Rows(), Rows(10, seed=2))
    fitted(tmp_path, callback, net=net, loader={"a": in_order(a), "b": in_order(b)})
    assert callback.importance.num_samples == 33
    assert_same(callback.importance, estimate_importance(net, [a.x, b.x], "mas"))


def test_an_iterable_dataset_is_taken_as_it_is(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([data[k] for k in range(ROWS)])

    data, callback, net = Rows(), MASImportance(), Net()
    fitted(tmp_path, callback, net=net, loader=DataLoader(Stream(), batch_size=4))
    assert_same(callback.importance, wanted(net, data))


@pytest.mark.parametrize("kind", ["mas", "all", "true", "sampled"])
def test_kinds(tmp_path, kind):
    data, net = Rows(), Net()
    callback = {
        "mas": MASImportance,
        "all": lambda: FisherImportance(draws="all"),
        "true": lambda: FisherImportance(labels="true"),
        "sampled": lambda: FisherImportance(draws=4, generator=torch.Generator().manual_seed(6)),
    }[kind]()
    fitted(tmp_path, callback, net=net, loader=in_order(data))
    reference = {
        "mas": lambda: wanted(net, data),
        "all": lambda: wanted(net, data, "fisher", draws="all"),
        "true": lambda: wanted(net, data, "empirical_fisher"),
        "sampled": lambda: estimate_importance(
            net,
            [data.x[k : k + 4] for k in range(0, ROWS, 4)],
            "fisher",
            draws=4,
            generator=torch.Generator().manual_seed(6),
        ),
    }[kind]()
    assert_same(callback.importance, reference)
    assert callback.importance.kind == reference.kind
    assert Path(callback.path).stem == reference.kind


def test_part_of_the_module(tmp_path):
    data, net, callback = (
        Rows(),
        Net(),
        MASImportance(module="features", exclude=["features.1", "features.0.bias"]),
    )
    fitted(tmp_path, callback, net=net, loader=in_order(data))
    assert list(callback.importance) == ["0.weight"]
    assert_same(callback.importance, {"0.weight": wanted(net, data)["features.0.weight"]})


def test_own_forward_and_published_reduction(tmp_path):
    data, net = Rows(), Net()
    scaled = MASImportance(forward=lambda model, batch: 3 * model(batch[0]), filename="a")
    published = MASImportance(reduction="batch", filename="b")
    trainer(tmp_path, scaled, published).fit(net, in_order(data))
    assert_same(scaled.importance, {name: 9 * value for name, value in wanted(net, data).items()})
    batches = [data.x[k : k + 4] for k in range(0, ROWS, 4)]
    assert_same(published.importance, estimate_importance(net, batches, "mas", reduction="batch"))
    assert relative_error(published.importance, wanted(net, data)) > 0.01


def test_an_iterable_of_batches(tmp_path):
    net, data = Net(), Rows(9, seed=2)
    callback = MASImportance([data.x[:5], data.x[5:]])
    fitted(tmp_path, callback, net=net)
    assert_same(callback.importance, wanted(net, data))


@pytest.mark.parametrize(
    ("name", "stage", "parts"),
    [
        ("train", "fit", [Rows()]),
        ("val", "validate", [Rows(9, seed=2)]),
        ("test", "test", [Rows(5, seed=3), Rows(6, seed=4)]),
        ("predict", "predict", [Rows(7, seed=5)]),
    ],
)
def test_the_name_of_a_stage_of_the_datamodule(tmp_path, name, stage, parts):
    net, data, callback = Net(), Data(), MASImportance(name)
    trainer(tmp_path, callback, limit_val_batches=0).fit(net, datamodule=data)
    assert data.stages == (["fit"] if name == "train" else ["fit", stage])
    assert_same(callback.importance, estimate_importance(net, [part.x for part in parts], "mas"))
    assert callback.importance.num_samples == sum(map(len, parts))


def test_the_name_of_a_stage_of_the_module(tmp_path):
    class Serving(Net):
        def predict_dataloader(self):
            return DataLoader(Rows(7, seed=5, labels=False), batch_size=4)

    net, callback = Serving(), MASImportance("predict")
    fitted(tmp_path, callback, net=net)
    assert_same(callback.importance, wanted(net, Rows(7, seed=5)))


def test_predict_alone_on_unlabelled_images(tmp_path):
    """Lightning predicts in inference mode; a fit of the same module comes after it."""
    net, data = Net(), Rows(labels=False)
    before = copy.deepcopy(net.state_dict())
    callbacks = [MASImportance(), FisherImportance(draws="all")]
    predictions = trainer(tmp_path, *callbacks).predict(net, DataLoader(data, batch_size=4))

    for callback, reference in zip(
        callbacks, (wanted(net, data), wanted(net, data, "fisher", draws="all")), strict=True
    ):
        assert_same(callback.importance, reference)
        assert_same(Importance.load(callback.path), reference)
        assert not any(value.is_inference() for value in callback.importance.values())
    torch.testing.assert_close(torch.cat(predictions), net.eval()(data.x))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    again = MASImportance()
    fitted(tmp_path, again, net=net.train())
    assert not torch.equal(net.features[0].weight, before["features.0.weight"])
    assert not any(value.is_inference() for value in net.state_dict().values())
    assert_same(again.importance, wanted(net, Rows()))


@pytest.mark.parametrize("options", [{}, {"dataloader": DataLoader(Rows(), batch_size=4)}], ids=["predicted", "given"])
@pytest.mark.parametrize("why", ["no data", "no batches"])
def test_a_predict_run_without_a_batch_is_refused(tmp_path, why, options):
    callback = MASImportance(**options)
    limit = {"limit_predict_batches": 0} if why == "no batches" else {}
    with pytest.raises(MisconfigurationException, match="MASImportance: the predict run has no batches"):
        trainer(tmp_path, callback, **limit).predict(Net(), DataLoader(Rows(0 if why == "no data" else 5)))
    assert_no_result(callback)
    trainer(tmp_path, callback).predict(Net(), DataLoader(Rows(5)))  # the next user has some
    assert callback.importance.num_samples == (ROWS if options else 5)


def test_a_predict_run_without_a_batch_is_fine_where_nothing_is_to_be_estimated(tmp_path):
    class Never(MASImportance):
        def should_estimate(self, trainer, pl_module):
            return False

    trainer(tmp_path, Never()).predict(Net(), DataLoader(Rows(0)))


def test_predict_with_other_data_for_the_importances(tmp_path):
    net, other = Net(), Rows(9, seed=2)
    callback = MASImportance([other.x])
    trainer(tmp_path, callback).predict(net, DataLoader(Rows(labels=False), batch_size=4))
    assert_same(callback.importance, wanted(net, other))


def test_it_runs_where_it_should(tmp_path):
    class Never(MASImportance):
        def should_estimate(self, trainer, pl_module):
            return False

    callback = Never()
    net = fitted(tmp_path, callback)
    trainer(tmp_path, callback).predict(net, DataLoader(Rows(labels=False), batch_size=4))
    assert_no_result(callback)
    assert not (tmp_path / "importances").exists()


def test_a_datamodule_made_from_datasets_has_its_stages(tmp_path):
    datamodule = LightningDataModule.from_datasets(Rows(), predict_dataset=Rows(), batch_size=4)
    callback = MASImportance("predict")
    trainer(tmp_path, callback).fit(Net(), datamodule=datamodule)
    assert callback.importance.num_samples == ROWS


def test_predict_counts_what_was_predicted(tmp_path):
    callback = MASImportance()
    trainer(tmp_path, callback, limit_predict_batches=2).predict(Net(), DataLoader(Rows(), batch_size=4))
    assert callback.importance.num_samples == 8


def test_a_stream_is_not_looked_at_before_it_is_used(tmp_path):
    """What is read of it is gone."""
    data, callback = Rows(), MASImportance(batch for batch in DataLoader(Rows(), batch_size=4))
    trainer(tmp_path, callback).fit(Net(), in_order(data))
    assert callback.importance.num_samples == ROWS
