"""The registry of importance kinds: options that each takes, and a kind that is added."""

import pytest
import torch
from reference import relative_error
from torch import nn

from pl_personalize import Importance, estimate_importance
from pl_personalize.callbacks.importance_callback import ImportanceCallback
from pl_personalize.functional.importance_kinds import IMPORTANCE_KINDS, ImportanceKind, KindOptions


@pytest.fixture
def first_logit(monkeypatch):
    """A kind: the mean over samples of |gradient of the first logit|, registered for the test."""
    monkeypatch.setattr(IMPORTANCE_KINDS, "_entries", dict(IMPORTANCE_KINDS))

    def objective(logits, labels, options):
        assert labels is None
        assert not logits.requires_grad
        return [nn.functional.pad(torch.ones_like(logits[:, :1]), (0, logits.shape[1] - 1))]

    return IMPORTANCE_KINDS.register(ImportanceKind("first_logit", "nobody", 1, objective, batch_floor=0.25))


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("reduction", "expected"), [("sample", X.abs().mean(0)), ("batch", X.mean(0).abs() + 0.25)])
def test_a_registered_kind_is_estimated_by_its_own_objective(first_logit, reduction, expected, tmp_path):
    model = nn.Linear(4, 3)

    found = estimate_importance(model, [X], "first_logit", reduction=reduction)

    floor = first_logit.batch_floor if reduction == "batch" else 0.0
    weight = torch.stack([expected, *torch.full((2, 4), floor)])
    assert relative_error(found, {"weight": weight, "bias": torch.tensor([1.0 + floor, floor, floor])}) < 1e-6
    assert found.kind == "first_logit"
    found.save(tmp_path / "found.safetensors")
    assert Importance.load(tmp_path / "found.safetensors").kind == "first_logit"


def test_a_callback_takes_a_registered_kind(first_logit):
    class FirstLogitImportance(ImportanceCallback):
        kind = "first_logit"

    assert FirstLogitImportance().default_filename == "first_logit"


@pytest.mark.parametrize("options", [{"draws": 2}, {"draws": "all"}, {"labels": 1}, {"class_dim": 1}])
def test_a_registered_kind_takes_no_option_that_it_does_not_declare(first_logit, options):
    with pytest.raises(ValueError, match=f"kind='first_logit' takes no {next(iter(options))}"):
        estimate_importance(nn.Linear(4, 3), [X], "first_logit", **options)


@pytest.mark.parametrize("kind", ["first_logit", "Fisher", "", None])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match=r"Unknown importance kind .* Known: mas, fisher, empirical_fisher"):
        estimate_importance(nn.Linear(4, 3), [X], kind)


def test_several_cotangents_add_up_in_the_published_estimate(first_logit):
    twice = ImportanceKind("twice", "nobody", 1, lambda *args: 2 * first_logit.objective(*args))
    IMPORTANCE_KINDS.register(twice)
    model = nn.Linear(4, 3)

    found = estimate_importance(model, [X[:4], X[4:]], "twice", reduction="batch")

    assert torch.allclose(found["weight"][0], X[:4].mean(0).abs() + X[4:].mean(0).abs())


def test_options_of_the_wrong_type_are_refused():
    for options in ({"draws": True}, {"draws": 0}, {"labels": 1.5}, {"class_dim": 0}, {"generator": "7"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            KindOptions(**options)


def test_an_importance_needs_the_name_of_its_kind():
    with pytest.raises(ValueError, match="kind must be a name"):
        Importance({"w": torch.ones(1)}, kind="", num_samples=1)
