"""What a forward leaves in a model is put back, by whichever container it is in."""

from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn

from pl_personalize.per_sample.module_state import ForwardState, evaluating


class _Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.lists, self.nested, self.names = [1], {"a": [{}], "b": ({1},)}, {"x"}
        self.ordered, self.default, self.queue = OrderedDict(a=1), defaultdict(list), deque([1, 2], maxlen=2)
        self.count, self.gone = 0, "there"
        self.register_buffer("table", None)

    def forward(self, x):
        self.lists[0] = 2
        self.nested["a"][0]["k"] = 1
        self.nested["b"][0].add(2)
        self.nested["c"] = 3
        self.names.clear()
        self.ordered.move_to_end("a"), self.ordered.update(b=2)
        self.default["new"].append(1)
        self.queue.append(3)
        self.count, self.new, self.table = self.count + 1, x, x
        if hasattr(self, "gone"):
            del self.gone
        return x


def _kept(module):
    names = ("lists", "nested", "names", "ordered", "default", "queue", "count", "gone", "table", "new")
    return {name: repr(getattr(module, name, "absent")) for name in names}


@pytest.mark.parametrize("context", [ForwardState, evaluating])
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_forward_sets_is_put_back(context, fails):
    model = nn.Sequential(_Keeps())
    before, containers = _kept(model[0]), [id(model[0].nested), id(model[0].nested["a"][0]), id(model[0].queue)]

    try:
        with context(model):
            model(torch.ones(1))
            assert _kept(model[0]) != before
            if fails:
                raise KeyError("in the middle")
    except KeyError:
        assert fails

    assert _kept(model[0]) == before
    assert [id(model[0].nested), id(model[0].nested["a"][0]), id(model[0].queue)] == containers


def test_it_can_be_put_back_between_two_forwards():
    model = _Keeps()
    before = _kept(model)

    with ForwardState(model) as state:
        for _ in range(2):
            model(torch.ones(1))
            state.put_back()
            assert _kept(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_what_a_module_does_in_train_is_done_and_its_mode_is_kept(training):
    class Clears(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = {"old": 1}

        def train(self, mode=True):
            if mode:
                self.cache.clear()
            return super().train(mode)

    model = nn.Sequential(Clears(), nn.Dropout())
    for module in model.modules():
        module.training = training
    model[1].training = not training

    with evaluating(model):
        assert (model[0].cache, model[0].training, model[1].training) == ({}, False, False)
    assert (model[0].cache, model[0].training, model[1].training) == ({"old": 1}, training, not training)
