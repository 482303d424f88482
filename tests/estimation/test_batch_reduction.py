"""`reduction="batch"` equals the published code's formulas."""

import pytest
import torch
from networks import labelled_batches, labels_of, make_network
from reference import naive_batch_importance, relative_error
from torch import nn

from pl_personalize import estimate_importance

# The published code's estimate


@pytest.mark.parametrize("kind", ["mas", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("sizes", [[3, 3, 2], [1, 7], [8]], ids=str)
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "tied"])
def test_reduction_batch_equals_the_protocols_formulas(name, kind, sizes):
    model, x = make_network(name, 8)
    batches = labelled_batches(x, sizes)
    generator = torch.Generator().manual_seed(5)
    labels = [batch_labels for _, batch_labels in batches]
    if kind == "fisher":
        chances = [model.eval()(images).softmax(1) for images, _ in batches]
        labels = [torch.multinomial(p, 1, replacement=True, generator=generator)[:, 0] for p in chances]
    right = naive_batch_importance(model, [images for images, _ in batches], kind, labels)

    importance = estimate_importance(
        model.train(), batches, kind, reduction="batch", generator=torch.Generator().manual_seed(5)
    )

    assert relative_error(importance, right) <= 1e-10
    assert (importance.kind, importance.num_samples, importance.reduction) == (kind, 8, "batch")
    assert set(importance.routes.values()) == {"batch"}


@pytest.mark.parametrize(("kind", "floor"), [("mas", 0.0), ("fisher", 1e-8), ("empirical_fisher", 0.0)])
def test_only_the_published_fisher_has_a_floor(kind, floor):
    model, x = make_network("mlp", 4)
    nn.init.zeros_(model[1].weight), nn.init.constant_(model[1].bias, -1.0)  # the first layer's units are dead

    importance = estimate_importance(model, [(x, labels_of(x))], kind, reduction="batch")

    assert importance["1.weight"].unique().tolist() == [floor]
    assert estimate_importance(model, [(x, labels_of(x))], kind)["1.weight"].unique().tolist() == [0.0]


def test_the_published_estimate_cancels_what_the_exact_one_does_not():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.tensor([[1.0], [3.0]])

    assert estimate_importance(model, [x], "mas")["weight"].item() == pytest.approx((2 + 18) / 2)
    assert estimate_importance(model, [x[:1], x[1:]], "mas", reduction="batch")["weight"].item() == pytest.approx(10)
    signed = nn.Sequential(nn.Linear(1, 1))
    nn.init.ones_(signed[0].weight), nn.init.zeros_(signed[0].bias)
    batch = torch.tensor([[1.0], [-1.0]])
    assert estimate_importance(signed, [batch], "mas", reduction="batch")["0.bias"].item() == 0.0
    assert estimate_importance(signed, [batch], "mas")["0.bias"].item() == 2.0
