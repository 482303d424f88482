"""A module and checks of results, for tests of callbacks that estimate."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from small_runs import Rows
from torch import Tensor, nn

from pl_personalize import adapt_batchnorm, estimate_importance
from pl_personalize.callbacks import (
    AdaBN,
    FisherImportance,
    MASImportance,
)

MAKERS = [MASImportance, functools.partial(FisherImportance, draws="all"), AdaBN]


class Net(LightningModule):
    def __init__(self, lr: Any = 0.1, other: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.lr, self.scores = float(lr), iter([0.0, 1.0, 2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", next(self.scores, 9.0), on_epoch=True)
        self.log("mean", self(batch[0]).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", self(batch[0]).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def result(callback: Any) -> dict[str, Tensor]:
    return dict(callback.statistics if isinstance(callback, AdaBN) else callback.importance)


def expected(callback: Any, net: nn.Module) -> dict[str, Tensor]:
    """Over all rows, of the weights and statistics that the model has now."""
    if isinstance(callback, AdaBN):
        return dict(adapt_batchnorm(net, [Rows().x]))
    options = {} if isinstance(callback, MASImportance) else {"draws": "all"}
    return dict(estimate_importance(net, [Rows().x], callback.kind, **options))


def assert_right(callback: Any, net: nn.Module) -> None:
    torch.testing.assert_close(result(callback), expected(callback, net), rtol=1e-4, atol=1e-6)
