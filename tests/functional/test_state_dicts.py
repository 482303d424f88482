"""Entries that are one tensor, and the versions of modules."""

import pytest
import torch
from torch import nn

from pl_personalize.functional.state_dicts import (
    module_versions,
    shared_entries,
    versions_above,
    versions_below,
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

    assert versions_below(module_versions(whole), "0") == module_versions(part)
    assert versions_above(module_versions(part), "0") == {
        name: entry for name, entry in module_versions(whole).items() if name.startswith("0")
    }
    assert module_versions(dict(part)) is None
    assert versions_below(None, "0") is None
    assert versions_above(None, "0") == {}
    assert not hasattr(with_versions(part, None), "_metadata")
    assert with_versions(dict(part), module_versions(part))._metadata == part._metadata
