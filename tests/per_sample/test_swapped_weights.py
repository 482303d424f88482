"""A forward with other weights computes with these, whatever a module keeps in eval mode."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pl_personalize.per_sample.module_state import call_with_weights


class CachedInADict(nn.Module):
    """Keeps what it computes in eval mode until it is trained again."""

    def __init__(self):
        super().__init__()
        self.b, self.cache = nn.Parameter(torch.randn(6)), {}

    def train(self, mode=True):
        if mode:
            self.cache.clear()
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x * self.b.sin()
        if "b" not in self.cache:
            self.cache["b"] = self.b.sin()
        return x * self.cache["b"]


class CachedInAnAttribute(nn.Module):
    """Computes it when it is put in eval mode, as an attribute that is not there in training."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.randn(6))

    def train(self, mode=True):
        super().train(mode)
        if mode and hasattr(self, "table"):
            del self.table
        elif not mode:
            self.table = self.b.sin()
        return self

    def forward(self, x):
        return x * (self.b.sin() if self.training else self.table)


class CachedInABuffer(CachedInAnAttribute):
    def train(self, mode=True):
        nn.Module.train(self, mode)
        if mode and hasattr(self, "table"):
            del self.table
        elif not mode:
            self.register_buffer("table", self.b.sin().detach(), persistent=False)
        return self


class KeptUntilCleared(CachedInADict):
    """Never cleared by itself, and filled in a forward alone."""

    train = nn.Module.train


@pytest.mark.parametrize("kind", [CachedInADict, CachedInAnAttribute, CachedInABuffer, KeptUntilCleared])
def test_each_forward_is_of_its_own_weights(kind):
    model, x = nn.Sequential(kind(), nn.Linear(6, 2)).eval(), torch.randn(3, 6)
    before = {module: dict(vars(module)) for module in model.modules()}
    others = [nn.Sequential(kind(), nn.Linear(6, 2)).eval() for _ in range(3)]

    for other in others:
        out = call_with_weights(model, other.state_dict(), x)

        assert torch.equal(out, other(x))
    assert all(vars(module).keys() == before[module].keys() for module in before)
    assert not getattr(model[0], "cache", {})
    assert not model.training


@pytest.mark.parametrize("kind", [CachedInADict, CachedInAnAttribute])
def test_what_was_kept_before_is_not_used(kind):
    model, other, x = kind().eval(), kind().eval(), torch.randn(3, 6)
    own = model(x)

    assert torch.equal(call_with_weights(model, other.state_dict(), x), other(x))
    assert torch.equal(model(x), own)


def test_a_network_without_memory_computes_the_same_bits_and_keeps_its_modes():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[1].train()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    out = call_with_weights(model, state, torch.ones(3, 6))

    right = functional_call(
        model, {name: value.clone() for name, value in model.state_dict().items()}, torch.ones(3, 6)
    )
    assert torch.equal(out, right)
    assert [module.training for module in model] == [False, True, False]
