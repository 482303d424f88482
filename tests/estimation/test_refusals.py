"""Bad options, bad input, and models without importances per sample are refused."""

import pytest
import torch
from networks import MixesSamples, mlp
from torch import nn

from pl_personalize import estimate_importance

# What is refused


def _untouched():
    pytest.fail("a batch was read before the options were checked")
    yield


def _frozen():
    return mlp().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "kind", "options", "message"),
    [
        (mlp(), "ewc", {}, "Unknown importance kind 'ewc'. Known: mas, fisher, empirical_fisher"),
        (mlp(), "mas", {"reduction": "mean"}, "reduction must be one of sample, batch; got 'mean'"),
        (mlp(), "fisher", {"draws": 0}, 'positive integer or "all"; got 0'),
        (mlp(), "fisher", {"draws": 1.5}, 'positive integer or "all"; got 1.5'),
        (mlp(), "fisher", {"draws": "every"}, "got 'every'"),
        (mlp(), "mas", {"draws": 3}, "kind='mas' takes no draws; got draws=3. It is for 'fisher'"),
        (mlp(), "fisher", {"draws": "all", "reduction": "batch"}, "draws='all' needs reduction='sample'"),
        (mlp(), "mas", {"max_scratch_mb": 0}, "max_scratch_mb must be positive and finite; got 0"),
        (mlp(), "mas", {"exclude": ("5.wieght",)}, r"'5\.wieght' is no parameter.*5\.weight"),
        (mlp(), "mas", {"exclude": ("1", "")}, "'' is no parameter"),
        (mlp(), "mas", {"exclude": "5.weight"}, "sequence of names; got the string '5.weight'"),
        (mlp(), "mas", {"module": "body"}, "no module 'body'"),
        (mlp(), "mas", {"module": "1.weight"}, r"no module '1\.weight'"),
        (mlp(), "mas", {"exclude": ("1", "3", "5")}, "No parameter needs a gradient"),
        (mlp(), "mas", {"module": "1", "exclude": ("1",)}, "No parameter needs a gradient"),
        (_frozen(), "mas", {}, "No parameter needs a gradient"),
        (nn.ReLU(), "mas", {}, "No parameter needs a gradient"),
    ],
)
def test_bad_options_are_refused_before_a_batch_is_read(model, kind, options, message):
    with pytest.raises(ValueError, match=message):
        estimate_importance(model, _untouched(), kind, **options)


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x):
        return self.layer(x).repeat_interleave(2, 0)


_X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
_Y = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize(
    ("model", "batches", "kind", "message"),
    [
        pytest.param(mlp(), [], "mas", "dataloader has no samples", id="empty loader"),
        pytest.param(mlp(), [_X[:0]], "mas", "dataloader has no samples", id="empty batch"),
        pytest.param(mlp(), [_X], "empirical_fisher", "true labels are needed.*Tensor", id="no labels"),
        pytest.param(
            mlp(), [{"input": _X}], "empirical_fisher", "true labels are needed.*dict", id="no labels in a dict"
        ),
        pytest.param(mlp(), [(_X, _Y[:3])], "empirical_fisher", "label", id="too few labels"),
        pytest.param(mlp(), [(_X, _Y[:1])], "empirical_fisher", "label", id="one label"),
        pytest.param(mlp(), [(_X, _Y + 1)], "empirical_fisher", "label", id="label out of range"),
        pytest.param(mlp(), [(_X, _Y + 0.5)], "empirical_fisher", "label", id="labels are no integers"),
        pytest.param(nn.Linear(12, 1), [(_X, _Y)], "fisher", r"at least two classes; got \(4, 1\)", id="one class"),
        pytest.param(nn.Linear(12, 1), [(_X, _Y)], "empirical_fisher", "at least two classes", id="one class, labels"),
        pytest.param(nn.Unflatten(1, (3, 4)), [_X], "mas", "No parameter needs a gradient", id="no parameters"),
        pytest.param(mlp(), [_X * float("nan")], "mas", "NaN", id="NaN"),
        pytest.param(mlp(), [_X, _X * float("nan")], "mas", "NaN", id="NaN later"),
        pytest.param(mlp(), [_X * float("nan")], "fisher", "NaN", id="NaN, fisher"),
        pytest.param(mlp(), [torch.tensor(1.0)], "mas", "batch dimension; got Tensor", id="no batch"),
        pytest.param(_Twice(), [_X], "mas", "rows", id="twice the rows"),
    ],
)
def test_bad_input_is_refused(model, batches, kind, message, reduction):
    with pytest.raises(ValueError, match=message):
        estimate_importance(model, batches, kind, reduction=reduction)


def test_a_model_that_mixes_samples_is_refused_by_the_modules_name():
    model = nn.Sequential(MixesSamples())

    with pytest.raises(ValueError, match=r"'0\.norm' \(BatchNorm1d\).* mix.* samples.*track_running_stats=False"):
        estimate_importance(model, [torch.randn(4, 6)], "mas")


def test_logits_that_no_parameter_can_change_are_refused():
    """All importances would be zero, and a merge would ignore the expert."""
    with pytest.raises(ValueError, match="gradient"):
        estimate_importance(mlp(), [_X], "mas", forward=lambda model, batch: model(batch).detach())


@pytest.mark.parametrize("batches", [1, 2], ids=["one batch", "the next batch"])
def test_mixing_shows_although_the_first_samples_are_the_same(batches):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            return self.last(x - x.mean(0))

    same, different = torch.ones(3, 6), torch.randn(3, 6)
    data = [torch.cat([same, different])] if batches == 1 else [same, different]
    with pytest.raises(ValueError, match="mixes the samples"):
        estimate_importance(Centred(), data, "mas")


def test_a_model_that_fails_on_one_sample_gives_its_own_reason():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            if len(x) < 2:
                raise RuntimeError("pairs only")
            return self.last(x)

    with pytest.raises(ValueError, match="fails on one of its samples alone: pairs only"):
        estimate_importance(Pairs(), [torch.randn(4, 6)], "mas")
