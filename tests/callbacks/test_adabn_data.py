"""AdaBN: the data that statistics are estimated on, in fit and in other runs."""

import pytest
import torch
from adabn_runs import Net, assert_identical, assert_same, best_of_three, clone, fitted, running, wanted, with_state
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import ROWS, Data, Rows, in_order
from small_runs import quiet_trainer as trainer

from pl_personalize import ArtifactError, BatchNormStatistics
from pl_personalize.callbacks import AdaBN


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
