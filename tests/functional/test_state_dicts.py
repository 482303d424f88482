"""Entries that are one tensor, and the versions of modules."""

import pytest
import torch
from torch import nn

from pl_personalize import Importance
from pl_personalize.functional.state_dicts import (
    PrefixView,
    kind_of,
    module_versions,
    shared_entries,
    versions_above,
    with_versions,
)


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (lambda t: t, True),
        (lambda t: t.detach(), True),
        (lambda t: t.view_as(t), True),
        (lambda t: t.clone(), False),
        (lambda t: t.T, False),
        (lambda t: t.view(-1), False),
        (lambda t: t[1:], False),
        (lambda t: t.view(torch.int32), False),
    ],
)
def test_shared_entries_are_the_same_numbers_in_the_same_place(other, shared):
    tensor = torch.randn(3, 3)

    assert shared_entries({"first": tensor, "second": other(tensor)}) == ({"second": "first"} if shared else {})


@pytest.mark.parametrize(
    "value",
    [
        {"steps": 3},
        None,
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.empty(0),
    ],
)
def test_what_has_no_storage_is_shared_with_none(value):
    assert shared_entries({"a": value, "b": value}) == {}


def test_a_conjugate_is_another_number_in_the_same_place():
    value = torch.ones(2, dtype=torch.complex64)

    assert shared_entries({"a": value, "b": value.conj(), "c": value}) == {"c": "a"}


def test_versions_of_a_part_and_of_a_whole():
    whole = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2)).state_dict()
    part = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()

    assert module_versions(PrefixView(whole, "0")) == module_versions(part)
    assert versions_above(module_versions(part), "0") == {
        name: entry for name, entry in module_versions(whole).items() if name.startswith("0")
    }
    assert module_versions(dict(part)) is None
    assert module_versions(PrefixView(dict(whole), "0")) is None
    assert versions_above(None, "0") == {}
    assert not hasattr(with_versions(part, None), "_metadata")
    assert with_versions(dict(part), module_versions(part))._metadata == part._metadata


def test_a_prefix_view_passes_on_what_the_state_dict_knows():
    tied = torch.ones(2)
    importance = Importance(
        {"body.a": tied, "body.b": tied, "bodyguard": torch.ones(1), "head.a": tied}, kind="mas", num_samples=1
    )

    view = PrefixView(importance, "body")

    assert list(view) == ["a", "b"]
    assert len(view) == 2
    assert view["a"] is tied
    assert "guard" not in view
    assert shared_entries(view) == {"b": "a"}
    assert kind_of(view) == kind_of(importance) == "mas (sample)"
    assert view.bounds("a") == (1.0, 1.0)
    tied.mul_(2)
    assert view.bounds("a") is None


def test_a_prefix_view_of_a_dict_knows_nothing_of_importances():
    view = PrefixView({"outer.body.w": torch.ones(1)}, "outer")

    assert kind_of(view) is None
    assert view.bounds("body.w") is None
    assert list(PrefixView(view, "body")) == ["w"]
    with pytest.raises(KeyError):
        view["w"]


def test_ties_across_the_prefix_are_none_inside():
    """What is tied with an entry outside of the view is a tensor of its own."""
    tied = torch.ones(2)

    assert shared_entries(PrefixView({"head.w": tied, "body.a": tied, "body.b": tied}, "body")) == {"b": "a"}
