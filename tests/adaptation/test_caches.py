"""What modules keep from a forward in eval mode is not kept from the forwards of an adaptation."""

import pytest
import torch
from torch import nn

from pl_personalize import adapt_batchnorm

WAYS = {
    "default": {},
    "at once": {"exact": True},
    "layer by layer": {"exact": True, "max_scratch_mb": 1e-6},
}
each_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


class Table(nn.Module):
    """Adds biases; in eval mode they are looked up once and kept until the next training."""

    def __init__(self, where):
        super().__init__()
        self.biases, self.places = nn.Parameter(torch.randn(3)), [0, 1, 2, 0, 1, 2]
        self.where, self.kept, self.calls, self.last = where, {}, [], None

    def train(self, mode=True):
        if mode:
            self.kept, self.last = {}, None
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x + self.biases[self.places]
        self.calls.append(len(x))
        if self.where == "dict":
            if "cpu" not in self.kept:
                self.kept["cpu"] = self.biases[self.places]
            return x + self.kept["cpu"]
        if self.last is None:
            self.last = self.biases[self.places]
        return x + self.last


def network(where):
    return nn.Sequential(Table(where), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.BatchNorm1d(4)).double()


X = (torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1).double()


@each_way
@pytest.mark.parametrize("where", ["dict", "attribute"])
def test_an_adapted_model_computes_what_is_loaded_later(where, options):
    model, other = network(where).train(), network(where)
    adapt_batchnorm(model, X.split(5), **options)
    assert (model[0].kept, model[0].calls, model[0].last) == ({}, [], None)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.eval()(X), other.eval()(X), rtol=0, atol=0)


@each_way
@pytest.mark.parametrize("where", ["dict", "attribute"])
def test_an_adapted_model_computes_with_its_new_statistics(where, options):
    """Also if it was used in eval mode before, and goes on to be."""
    model = network(where).eval()
    model(X)
    kept = model[0].kept if where == "dict" else model[0].last
    adapt_batchnorm(model, X.split(5), **options)
    assert (model[0].kept if where == "dict" else model[0].last) is kept
    fresh = network(where)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(X), fresh.eval()(X), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].running_mean, (X + model[0].biases[model[0].places]).mean(0))
