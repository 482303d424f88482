"""A module and checks of what callbacks see, for tests of passes over data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import (
    Sampler,
)

from pl_personalize import estimate_importance
from pl_personalize.callbacks import AdaBN, MASImportance


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


def trained(tmp_path: Any, loader: Any, net: Net | None = None, **options: Any) -> list[Tensor]:
    """What the last epoch trained on, after checks that every callback sees the same samples."""
    for make in (MASImportance, AdaBN):
        seen, callback, own = Seen(), make(), net or Net()
        quiet_trainer(tmp_path, callback, seen, **options).fit(own, loader)
        assert_sees(callback, own, seen.inputs)
    return seen.inputs


class Mine(Sampler[int]):
    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


ONE_USER = list(range(14, 21))


class Wrapped:
    """No DataLoader at all."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)
