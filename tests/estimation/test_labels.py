"""True labels anywhere in a batch, and Fisher importances of sequences, maps and one logit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import naive_importance, relative_error
from torch import Tensor, nn

from pl_personalize import estimate_importance

each_reduction = pytest.mark.parametrize("reduction", ["sample", "batch"])


# Where the labels are


class Text(nn.Module):
    """Words, and how many of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 8)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        keep = torch.arange(words.shape[1]) < lengths[:, None]
        return self.head((self.embed(words) * keep[..., None]).sum(1))


def _text() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model, words = Text().double(), torch.randint(0, 10, (6, 5))
    return model, words, torch.randint(1, 6, (6,)), torch.randint(0, 8, (6,))


@pytest.mark.parametrize("labels", [2, -1, lambda batch: batch[2]], ids=["index", "from the end", "function"])
def test_labels_beside_more_than_one_input(labels: Any) -> None:
    model, words, lengths, y = _text()
    packed = torch.cat([words, lengths[:, None]], 1)
    right = naive_importance(model, packed, "empirical_fisher", y, lambda m, row: m(row[:, :5], row[:, 5]))

    found = estimate_importance(
        model, [(words, lengths, y)], "empirical_fisher", labels=labels, forward=lambda m, b: m(b[0], b[1])
    )

    assert relative_error(found, right) < 1e-10


@each_reduction
def test_labels_by_a_key_of_the_batch(reduction: Any) -> None:
    model, words, lengths, y = _text()
    right = estimate_importance(
        model, [{"words": words, "lengths": lengths, "labels": y}], "empirical_fisher", reduction=reduction
    )

    found = estimate_importance(
        model, [{"words": words, "lengths": lengths, "tag": y}], "empirical_fisher", labels="tag", reduction=reduction
    )

    assert relative_error(found, right) == 0.0


@each_reduction
def test_unclear_labels_are_refused_before_any_work(reduction: Any) -> None:
    model, words, lengths, y = _text()

    def untouched(model: nn.Module, batch: Any) -> Tensor:
        pytest.fail("the model was called")

    with pytest.raises(ValueError, match=r"3 items \(tuple\).*labels=2"):
        estimate_importance(model, [(words, lengths, y)], "empirical_fisher", forward=untouched, reduction=reduction)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("fisher", {"labels": 2}, "takes no labels; got labels=2. It is for 'empirical_fisher'"),
        ("empirical_fisher", {"labels": True}, "labels must be .* got True"),
        ("empirical_fisher", {"labels": 0}, "labels=0 is also the model's input"),
        ("mas", {"class_dim": 1}, "takes no class_dim; got class_dim=1. It is for 'fisher', 'empirical_fisher'"),
        ("fisher", {"class_dim": 0}, "class_dim must .* got 0"),
        ("fisher", {"class_dim": True}, "class_dim must .* got True"),
        ("fisher", {"generator": True}, "generator must .* got True"),
        ("fisher", {"generator": "7"}, "generator must .* got '7'"),
    ],
)
def test_bad_options_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_importance(nn.Linear(4, 2), (pytest.fail("read") for _ in range(1)), kind, **options)


def test_a_seed_draws_what_its_generator_draws_each_time() -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    right = estimate_importance(model, [x], "fisher", generator=torch.Generator().manual_seed(3))

    for _ in range(2):
        assert relative_error(estimate_importance(model, [x], "fisher", generator=3), right) == 0.0


# Fisher information of sequences, maps, and one logit


class Sequence(nn.Module):
    """Logits for each position, in the last dimension, or as a map."""

    def __init__(self, class_dim: int) -> None:
        super().__init__()
        self.layer, self.head, self.class_dim = nn.Linear(4, 6), nn.Linear(6, 5), class_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh()).movedim(-1, self.class_dim)


def _naive_fisher(model: Sequence, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of the sum over positions of -log p(label)."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for one, label in zip(x, labels, strict=True):
        scores = model(one[None]).movedim(model.class_dim, -1).log_softmax(-1).reshape(-1, 5)
        loss = sum(-scores[k, int(c)] for k, c in enumerate(label.flatten()) if c != -100)
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += gradient.square() / len(x)
    return total


@pytest.mark.parametrize(("shape", "class_dim"), [((3,), -1), ((3,), 1), ((2, 3), 1), ((2, 3), -1), ((), -1), ((), 1)])
def test_fisher_of_sequences_and_maps(shape: tuple[int, ...], class_dim: int) -> None:
    torch.manual_seed(0)
    model, x = Sequence(class_dim).double(), torch.randn(4, *shape, 4, dtype=torch.float64)
    labels = torch.randint(0, 5, (4, *shape))
    if shape:
        labels[1, 0] = -100
    right = _naive_fisher(model, x, labels)

    found = estimate_importance(
        model, [(x[:3], labels[:3]), (x[3:], labels[3:])], "empirical_fisher", class_dim=class_dim
    )
    assert relative_error(found, right) < 1e-10

    chances = model(x).detach().movedim(class_dim, -1).softmax(-1).reshape(-1, 5)
    drawn = torch.multinomial(chances, 1, replacement=True, generator=torch.Generator().manual_seed(7))
    found = estimate_importance(model, [x], "fisher", class_dim=class_dim, generator=7)
    assert relative_error(found, _naive_fisher(model, x, drawn.view(4, *shape))) < 1e-10


def test_the_expectation_over_the_labels_of_two_positions() -> None:
    torch.manual_seed(0)
    model, x = Sequence(-1).double(), torch.randn(1, 2, 4, dtype=torch.float64)
    chances = model(x).detach().softmax(-1)[0]
    right = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for pair in torch.cartesian_prod(torch.arange(5), torch.arange(5)):
        weight = chances[0, pair[0]] * chances[1, pair[1]]
        for name, value in _naive_fisher(model, x, pair[None]).items():
            right[name] += weight * value

    found = estimate_importance(model, [x], "fisher", class_dim=-1, draws="all")

    assert relative_error(found, right) < 1e-10


@pytest.mark.parametrize("class_dim", [3, -4, 2])
def test_a_dimension_that_the_logits_do_not_have_is_refused(class_dim: int) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Unflatten(1, (5, 1)))  # of size 1 in the last dimension
    with pytest.raises(ValueError, match=rf"class_dim={class_dim} is no dimension.*\(2, 5, 1\)"):
        estimate_importance(model, [torch.randn(2, 4)], "fisher", class_dim=class_dim)


def test_positions_without_a_class_dimension_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\).*class_dim=-1.*class_dim=1"):
        estimate_importance(nn.Linear(4, 5), [torch.randn(2, 3, 4)], "fisher")


@pytest.mark.parametrize("kind", ["fisher", "empirical_fisher"])
def test_one_logit_and_a_sigmoid_by_the_way_that_the_message_shows(kind: Any) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 1).double(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 2
    with pytest.raises(ValueError, match=r"got \(6, 1\).*forward=lambda.*pad"):
        estimate_importance(model, [(x, y)], kind)
    chance = model(x).sigmoid().detach()
    factor = chance * (1 - chance) if kind == "fisher" else (chance - y[:, None]).square()

    found = estimate_importance(
        model,
        [(x, y)],
        kind,
        draws="all" if kind == "fisher" else 1,
        forward=lambda model, batch: torch.nn.functional.pad(model(batch[0]).view(-1, 1), (1, 0)),
    )

    right = {"weight": (factor * x.square()).mean(0, keepdim=True), "bias": factor.mean(0)}
    assert relative_error(found, right) < 1e-10
