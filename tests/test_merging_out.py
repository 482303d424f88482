"""Merges that are written into memory that is there: a model's, or an expert's."""

import pytest
import torch
from networks import TiedWeights, batch_norm_network

from pl_personalize import merge

E_ = [{"w": torch.zeros(2), "v": torch.zeros(2, 2), "n": torch.tensor(1)} for _ in range(2)]
I_ = [{"w": torch.ones(2), "v": torch.ones(2, 2)} for _ in range(2)]


@pytest.mark.parametrize("weighted", [True, False], ids=["importances", "mean"])
def test_out_is_written_in_place(weighted):
    model = batch_norm_network()
    experts = [batch_norm_network().state_dict() for _ in range(3)]
    importances = [{name: torch.rand_like(p) for name, p in model.named_parameters()} for _ in range(3)]
    right = merge(experts, importances if weighted else None)
    target = model.state_dict()
    places = {name: value.data_ptr() for name, value in target.items()}

    merged = merge(experts, importances if weighted else None, out=target)

    assert list(merged) == list(right)
    assert {name: value.data_ptr() for name, value in merged.items()} == places
    for name, value in model.state_dict().items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("k", [0, 1, 2])
def test_out_may_be_an_expert(monkeypatch, k):
    monkeypatch.setattr("pl_personalize.functional.merging._CHUNK_CPU", 1000)
    torch.manual_seed(0)
    experts = [{"w": torch.randn(2500), "n": torch.tensor(k)} for k in range(3)]
    importances = [{"w": torch.rand(2500)} for _ in range(3)]
    right = merge(experts, importances)

    merged = merge(experts, importances, out=experts[k])

    assert merged["w"] is experts[k]["w"]
    assert all(torch.equal(merged[name], right[name]) for name in right)


def test_out_with_tied_entries_keeps_them_tied_and_equal():
    experts = [TiedWeights().state_dict() for _ in range(2)]
    right, tied = merge(experts), TiedWeights().state_dict()
    apart = {name: value.clone() for name, value in tied.items()}

    assert all(torch.equal(value, right[name]) for name, value in merge(experts, out=tied).items())
    assert all(torch.equal(value, right[name]) for name, value in merge(experts, out=apart).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": None}, "out has no entries w; it has "),
        ({"w": torch.zeros(3)}, r"out\['w'\] is torch.float32 \(3,\); the experts' is torch.float32 \(2,\)"),
        ({"w": torch.zeros(2, dtype=torch.float64)}, r"is torch.float64 \(2,\); the experts' is torch.float32 \(2,\)"),
        ({"v": torch.zeros(2, 2).T.contiguous().T}, "of out are not contiguous in memory: v"),
    ],
)
def test_out_that_does_not_fit_is_refused_before_anything_is_written(change, message):
    out = {name: value for name, value in {**E_[0], **change}.items() if value is not None}
    before = {name: value.clone() for name, value in out.items()}
    with pytest.raises(ValueError, match=message):
        merge(E_, I_, out=out)
    assert all(torch.equal(value, before[name]) for name, value in out.items())


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize(
    ("thetas", "omegas"),
    [
        ([[1.0, 3.0], [2.0, 5.0]], [[1.0, 0.0], [1.0, 0.0]]),
        ([[1e20, 1.0], [3e20, 2.0]], [[1e20, 1.0], [1e20, 3.0]]),
        ([[3e38, 1.0], [-3e38, 2.0]], None),
    ],
    ids=["nothing is important", "large", "far apart"],
)
def test_an_expert_that_is_overwritten_is_needed_until_the_end(thetas, omegas, k):
    def made():
        importances = None if omegas is None else [{"w": torch.tensor(o)} for o in omegas]
        return [{"w": torch.tensor(theta)} for theta in thetas], importances

    right = merge(*made())["w"]
    experts, importances = made()
    assert torch.equal(merge(experts, importances, out=experts[k])["w"], right)


def test_out_that_ties_what_the_experts_have_apart_is_refused():
    tied = TiedWeights().state_dict()
    experts = [{name: value.clone() for name, value in tied.items()} for _ in range(2)]
    with pytest.raises(ValueError, match=r"'a.weight' and 'b.weight' of out are one tensor, but two in at least one"):
        merge(experts, out=tied)
