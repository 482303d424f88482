"""Options of FisherImportance: where labels are, seeds, positions; in Python and as YAML has them."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import relative_error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize import estimate_importance
from pl_personalize.callbacks import FisherImportance


class _Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def _estimated(tmp_path, tensors, **options):
    torch.manual_seed(0)
    model, callback = _Net(), FisherImportance(dirpath=tmp_path, **options)
    trainer = Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.predict(model, DataLoader(TensorDataset(*tensors), 4))
    return model, callback


X, LENGTHS, Y = torch.randn(8, 4), torch.arange(8) % 2, torch.arange(8) % 3


@pytest.mark.parametrize(
    ("labels", "kind"),
    [("true", "empirical_fisher"), (True, "empirical_fisher"), ("sampled", "fisher"), (False, "fisher")],
)
def test_truth_values_are_what_yaml_makes_of_true_and_false(labels, kind):
    assert FisherImportance(labels=labels).kind == kind


@pytest.mark.parametrize("labels", [2, lambda batch: batch[2]], ids=["index", "function"])
def test_true_labels_are_where_they_are_said_to_be(tmp_path, labels):
    model, callback = _estimated(tmp_path, (X, LENGTHS, Y), labels=labels)

    assert callback.kind == callback.importance.kind == "empirical_fisher"
    assert relative_error(callback.importance, estimate_importance(model, [(X, Y)], "empirical_fisher")) < 1e-5


def test_a_seed_draws_the_same_in_each_estimate(tmp_path):
    model, callback = _estimated(tmp_path, (X,), generator=5)
    right = estimate_importance(model, [(X[:4],), (X[4:],)], "fisher", generator=5)
    first = callback.importance

    trainer = Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.predict(model, DataLoader(TensorDataset(X), 4))

    assert relative_error(first, right) == 0.0
    assert relative_error(callback.importance, right) == 0.0


def test_positions(tmp_path):
    x = torch.randn(8, 5, 4)
    model, callback = _estimated(tmp_path, (x,), class_dim=-1, generator=1)

    right = estimate_importance(model, [(x[:4],), (x[4:],)], "fisher", class_dim=-1, generator=1)
    assert relative_error(callback.importance, right) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "tag"}, r"got 'tag'.*labels=lambda batch: batch\['tag'\]"),
        ({"labels": 0}, "labels=0"),
        ({"labels": 1.5}, "got 1.5"),
        ({"class_dim": 0}, "class_dim"),
        ({"generator": "seed"}, "got 'seed'"),
        ({"labels": True, "draws": 3}, "draws=3"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        FisherImportance(**options)
