"""A server and users with known shifts: classes as Gaussians, seen through a random body."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_personalize.models import TaskNetwork

CLASSES, INPUTS, FEATURES = 5, 12, 30
_CENTERS = 1.1 * torch.randn(CLASSES, INPUTS, generator=torch.Generator().manual_seed(0))


def data(priors: Sequence[float] | None = None, count: int = 600, seed: int = 1, camera: Tensor | None = None):
    """Samples with class priors, by default equal ones; a camera is added to the inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(priors) if priors else torch.ones(CLASSES)
    labels = torch.multinomial(weights, count, replacement=True, generator=generator)
    labels[:CLASSES] = torch.arange(CLASSES)
    inputs = _CENTERS[labels] + torch.randn(count, INPUTS, generator=generator)
    return inputs if camera is None else inputs + camera, labels


def loader(tensors: tuple[Tensor, ...], batch_size: int = 64) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size)


def network(seed: int = 0, classes: int = CLASSES) -> TaskNetwork:
    """A random body and head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TaskNetwork(nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.Tanh()), nn.Linear(FEATURES, classes))


SERVER = loader(data(seed=1)), loader(data(count=400, seed=2))
MIX = [0.7, 0.2, 0.05, 0.03, 0.02]
CAMERA = torch.linspace(-2, 2, INPUTS).roll(3)


def accuracy(model: nn.Module, tensors: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(tensors[0]).argmax(1) == tensors[1]).float().mean())


def entries(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the entries that differ."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
