"""AdaBN: misuse that is refused before training."""

from types import SimpleNamespace

import pytest
import torch
from adabn_runs import Net, assert_identical, assert_same, clone, fitted, wanted
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import NoTraining, Rows, in_order
from small_runs import quiet_trainer as trainer
from torch import nn

from pl_personalize.callbacks import AdaBN, MASImportance


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
