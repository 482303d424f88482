"""Entries that are one tensor in some experts: merged as one only where they are one in all of them."""

import itertools

import pytest
import torch
from networks import TiedWeights
from reference import naive_merge
from torch import nn

from pl_personalize import estimate_importance, merge, merge_prefixes
from pl_personalize.artifacts import TensorFile, save_tensors


def _tied(value):
    shared = torch.full((2,), value)
    return {"embed": shared, "lm_head": shared}


def _apart(embed, lm_head):
    return {"embed": torch.full((2,), embed), "lm_head": torch.full((2,), lm_head)}


def _numbers(state):
    return {name: value[0].item() for name, value in state.items()}


ONES = {"embed": torch.ones(2), "lm_head": torch.ones(2)}


@pytest.mark.parametrize("importances", [None, [ONES, ONES], [ONES, {"embed": torch.ones(2)}]])
@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_apart_in_one_expert_is_merged_apart(tmp_path, lazy, importances):
    apart, tied = _apart(1.0, 5.0), _tied(3.0)
    if lazy:
        apart, tied = (
            TensorFile(save_tensors(tmp_path / name, state, kind="expert"), kind="expert")
            for name, state in (("apart", apart), ("tied", tied))
        )

    for experts, omegas in (([apart, tied], importances), ([tied, apart], importances and importances[::-1])):
        merged = merge(experts, omegas)

        assert _numbers(merged) == {"embed": 2.0, "lm_head": 4.0}
        assert merged["embed"].data_ptr() != merged["lm_head"].data_ptr()
        assert _numbers(merge_prefixes(experts, omegas)[-1]) == {"embed": 2.0, "lm_head": 4.0}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_experts_of_which_two_are_apart(order):
    experts = [[_apart(1.0, 5.0), _tied(2.0), _apart(3.0, 8.0)][k] for k in order]

    assert _numbers(merge(experts)) == {"embed": 2.0, "lm_head": 5.0}


def test_entries_that_are_tied_in_another_order():
    first, second = _tied(1.0), dict(reversed(_tied(3.0).items()))

    merged = merge([first, second])

    assert merged["embed"] is merged["lm_head"]
    assert _numbers(merged) == {"lm_head": 2.0, "embed": 2.0}


def test_three_entries_that_are_tied_in_pairs():
    """a is b in one expert, b is c in the other; all are merged apart."""
    one, other = torch.tensor([1.0]), torch.tensor([5.0])
    experts = [{"a": one, "b": one, "c": torch.tensor([3.0])}, {"a": torch.tensor([7.0]), "b": other, "c": other}]

    assert {name: value.item() for name, value in merge(experts).items()} == {"a": 4.0, "b": 3.0, "c": 4.0}


def test_each_uses_its_own_importance_and_the_tied_one_that_of_the_tensor():
    """``named_parameters`` lists a tied weight under its first name alone."""
    apart, tied = {"embed": torch.tensor([1.0]), "lm_head": torch.tensor([5.0])}, {"embed": torch.tensor([3.0])}
    tied["lm_head"] = tied["embed"]
    omegas = [{"embed": torch.tensor([1.0]), "lm_head": torch.tensor([4.0])}, {"embed": torch.tensor([3.0])}]

    merged = merge([apart, tied], omegas)

    assert merged["embed"].item() == (1 * 1 + 3 * 3) / 4
    assert merged["lm_head"].item() == pytest.approx((4 * 5 + 3 * 3) / 7)


@pytest.mark.parametrize("normalize", ["sum", "max", "layer"])
def test_normalizing_counts_a_tied_importance_once(normalize):
    apart, tied = {"embed": torch.tensor([1.0]), "lm_head": torch.tensor([5.0])}, {"embed": torch.tensor([3.0])}
    tied["lm_head"] = tied["embed"]
    omegas = [{"embed": torch.tensor([1.0]), "lm_head": torch.tensor([4.0])}, {"embed": torch.tensor([3.0])}]
    scale = {"sum": 5.0, "max": 4.0}.get(normalize)

    merged = merge([apart, tied], omegas, normalize=normalize)

    for name in ("embed", "lm_head"):
        mass = omegas[0][name] / (scale or omegas[0][name])
        torch.testing.assert_close(merged[name], (mass * apart[name] + 3.0) / (mass + 1))


def test_a_real_model_that_ties_and_one_that_does_not():
    tied, apart = TiedWeights(), TiedWeights()
    apart.b.weight = nn.Parameter(torch.randn(6, 6))
    models, x = [tied, apart], torch.randn(5, 6)
    omegas = [estimate_importance(model, [x], "mas") for model in models]

    for k in (1, -1):
        merged = merge([model.state_dict() for model in models[::k]], omegas[::k])

        for name in ("a.weight", "b.weight"):
            right = naive_merge(
                [model.get_parameter(name) for model in models],
                [omega[name if name in omega else "a.weight"] for omega in omegas],
            )
            torch.testing.assert_close(merged[name].double(), right, rtol=1e-5, atol=1e-6)
        apart.load_state_dict(merged)


@pytest.mark.parametrize("parameters", [None, ["lm_head"]])
def test_an_importance_that_cannot_be_had_is_refused_with_both_names(parameters):
    """The importances of the expert that has both are of one of them alone."""
    with pytest.raises(ValueError, match=r"Expert 1 has no importance for 'lm_head'.*one tensor with 'embed'"):
        merge([_apart(1.0, 5.0), _tied(3.0)], [{"embed": torch.ones(2)}] * 2, parameters=parameters)


def test_parameters_that_are_named_leave_out_what_is_tied_in_one_expert():
    merged = merge([_apart(1.0, 5.0), _tied(3.0)], [{"embed": torch.ones(2)}] * 2, parameters=["embed"])

    assert _numbers(merged) == {"embed": 2.0, "lm_head": 3.0}
    assert merged["embed"].data_ptr() != merged["lm_head"].data_ptr()


def test_entries_that_are_not_merged_and_tied_with_one_that_is():
    last = torch.tensor([9.0])
    experts = [{n: torch.tensor([float(k)]) for k, n in enumerate("abc")}, dict.fromkeys("abc", last)]

    merged = merge(experts, parameters=["a"])

    assert {name: value.item() for name, value in merged.items()} == {"a": 4.5, "b": 9.0, "c": 9.0}
    assert merged["b"].data_ptr() == merged["c"].data_ptr() != last.data_ptr()


@pytest.mark.parametrize("weighted", [False, True])
def test_prefixes_tie_what_is_tied_in_all_experts_so_far(weighted):
    experts = [_tied(1.0), _tied(3.0), _apart(5.0, 8.0)]
    omegas = [{"embed": torch.ones(2)}, {"embed": torch.full((2,), 3.0)}, ONES] if weighted else None

    prefixes = merge_prefixes(experts, omegas)

    for t, prefix in enumerate(prefixes):
        right = merge(experts[: t + 1], omegas and omegas[: t + 1])
        assert _numbers(prefix) == _numbers(right)
        assert (prefix["embed"] is prefix["lm_head"]) == (right["embed"] is right["lm_head"]) == (t < 2)


def test_out_that_ties_what_one_expert_has_apart_is_refused_and_not_written():
    out = _tied(7.0)
    for experts in ([_apart(1.0, 5.0), _tied(3.0)], [_tied(3.0), _apart(1.0, 5.0)]):
        with pytest.raises(ValueError, match="'embed' and 'lm_head' of out are one tensor, but two in at least one of"):
            merge(experts, out=out)
    assert _numbers(out) == {"embed": 7.0, "lm_head": 7.0}


def test_out_that_ties_what_is_merged_with_what_is_not_is_refused():
    with pytest.raises(ValueError, match="'embed' and 'lm_head' of out"):
        merge([_apart(1.0, 5.0), _tied(3.0)], parameters=["embed"], out=_tied(7.0))


def test_out_may_have_more_entries_than_the_experts_and_tie_them():
    """Two entries of the experts that are one tensor with a third of out are one tensor, too."""
    out = {"other": torch.zeros(2)}
    out.update(dict.fromkeys(("embed", "lm_head"), out["other"]))
    with pytest.raises(ValueError, match="'embed' and 'lm_head' of out"):
        merge([_apart(1.0, 5.0), _apart(1.0, 5.0)], out=out)

    assert _numbers(merge([_tied(1.0), _tied(3.0)], out=out)) == {"embed": 2.0, "lm_head": 2.0}


def test_out_of_its_own_for_what_is_apart_in_one_expert():
    out = _apart(0.0, 0.0)

    merge([_apart(1.0, 5.0), _tied(3.0)], out=out)

    assert _numbers(out) == {"embed": 2.0, "lm_head": 4.0}
