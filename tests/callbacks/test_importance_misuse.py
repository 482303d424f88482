"""Importance callbacks: misuse that is refused before training."""

from types import SimpleNamespace

import pytest
import torch
from importance_runs import Net, assert_same, fitted, wanted
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import NoTraining, Rows, in_order
from small_runs import quiet_trainer as trainer
from torch import nn

from pl_personalize.callbacks import FisherImportance, MASImportance


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused(strategy):
    fake = object.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=f"MASImportance needs whole parameters .* {strategy.__name__}"):
        MASImportance().setup(SimpleNamespace(strategy=fake), Net(), "fit")


@pytest.mark.parametrize(
    "options", [{"module": "feature"}, {"exclude": ["classifier", "feat"]}, {"exclude": ["classifier.w"]}]
)
def test_unknown_names_are_refused(tmp_path, options):
    with pytest.raises(MisconfigurationException, match=r"Net: .*'(feature|feat|classifier\.w)'"):
        trainer(tmp_path, NoTraining(), MASImportance(**options)).fit(Net(), in_order(Rows()))


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_a_stage_without_dataloader_is_refused(tmp_path, stage):
    with pytest.raises(MisconfigurationException, match=f"needs a datamodule or a module with {stage}_dataloader"):
        trainer(tmp_path, NoTraining(), MASImportance(stage)).fit(Net(), in_order(Rows()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MASImportance("validate"), "'validate'"),
        (lambda: MASImportance(weights="first"), "'first'"),
        (lambda: MASImportance(reduction="mean"), "'mean'"),
        (lambda: MASImportance(max_scratch_mb=0), "max_scratch_mb"),
        (lambda: FisherImportance(draws=0), "draws"),
        (lambda: FisherImportance(draws="every"), "draws"),
        (lambda: FisherImportance(draws="all", labels="true"), "draws"),
        (lambda: FisherImportance(draws=2, reduction="batch"), "draws"),
        (lambda: FisherImportance(labels="ground_truth"), "'ground_truth'"),
        (lambda: MASImportance(module="features", exclude=["features"]), "features"),
    ],
    ids=[
        "stage",
        "weights",
        "reduction",
        "scratch",
        "draws 0",
        "draws every",
        "draws of true labels",
        "draws of a batch",
        "labels",
        "everything excluded",
    ],
)
def test_wrong_options_are_refused_before_training(tmp_path, make, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, NoTraining(), make()).fit(Net(), in_order(Rows()))


def test_a_module_that_is_built_in_configure_model_can_be_named(tmp_path):
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

    net, callback = Late(), MASImportance(module="features")
    fitted(tmp_path, callback, net=net)
    assert_same(callback.importance, wanted(net, Rows(), module="features"))


class Rejected(Net):
    """A batch norm that mixes the samples of a batch in eval mode."""

    def __init__(self):
        super().__init__()
        self.features.append(nn.BatchNorm1d(5, track_running_stats=False))


@pytest.mark.parametrize(
    ("net", "make", "message"),
    [
        (Rejected, MASImportance, "mix samples"),
        (Net, lambda: MASImportance([]), "no samples"),
        (Net, lambda: FisherImportance([torch.zeros(4, 6)], labels="true"), "labels are needed"),
    ],
    ids=["mixes samples", "empty loader", "no labels"],
)
def test_what_only_the_data_show_is_refused_before_training(tmp_path, net, make, message):
    class Steps(Callback):
        count = 0

        def on_train_batch_end(self, *args):
            Steps.count += 1

    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, make(), Steps()).fit(net(), in_order(Rows()))
    assert Steps.count == 0


def test_two_callbacks_do_not_write_one_file(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"the same file, mas\.safetensors"):
        trainer(tmp_path, MASImportance(), MASImportance()).fit(Net(), in_order(Rows()))
    trainer(tmp_path, MASImportance(), MASImportance(filename="other")).fit(Net(), in_order(Rows()))
    assert {path.stem for path in (tmp_path / "importances").iterdir()} == {"mas", "other"}
