"""Importance: a mapping that knows where it comes from, on disk and combined."""

import pytest
import torch
from networks import labelled_batches, make_network
from reference import KINDS, relative_error

from pl_personalize import ArtifactError, Importance, estimate_importance
from pl_personalize.artifacts import save_tensors


def _importance(values=(0.5, 2.0), num_samples=8, kind="mas", name="layer.weight", **options):
    return Importance(
        {name: torch.tensor(values)}, kind=kind, num_samples=num_samples, routes={name: "layer"}, **options
    )


def test_bounds_are_those_of_the_values_until_these_change():
    values = torch.tensor([[0.5, 2.0], [0.0, 1.0]])
    importance = Importance({"w": values, "none": torch.empty(0)}, kind="mas", num_samples=1)

    assert importance.bounds("w") == (0.0, 2.0)
    assert importance.bounds("none") == (0.0, 0.0)

    values.mul_(4)
    assert importance.bounds("w") is None


def test_importance_is_a_mapping():
    importance = Importance(
        {"b": torch.ones(2), "a": torch.zeros(1)}, kind="fisher", num_samples=3, routes={"a": "loop", "b": "layer"}
    )

    assert list(importance) == ["b", "a"]
    assert len(importance) == 2
    assert "a" in importance
    assert "c" not in importance
    assert importance.get("c") is None
    assert dict(importance.items()).keys() == {"a", "b"}
    with pytest.raises(KeyError):
        importance["c"]
    assert repr(importance) == "Importance(kind='fisher', num_samples=3, reduction='sample', parameters=2)"


def test_the_caller_s_mapping_is_not_kept():
    values, routes = {"a": torch.ones(1)}, {"a": "loop"}
    importance = Importance(values, kind="mas", num_samples=1, routes=routes)

    values["b"], routes["b"] = torch.ones(1), "loop"

    assert list(importance) == ["a"]
    assert importance.routes == {"a": "loop"}


@pytest.mark.parametrize(
    ("values", "what"),
    [([1.0, -1e-12], "a negative entry"), ([float("nan"), 1.0], "NaN"), ([float("inf"), 1.0], "an infinite entry")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_no_importance_can_be_is_refused(values, what, dtype):
    with pytest.raises(ValueError, match=f"'layer.weight' has {what}"):
        Importance({"layer.weight": torch.tensor(values, dtype=dtype)}, kind="mas", num_samples=1)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_an_importance_has_samples(num_samples):
    with pytest.raises(ValueError, match=f"num_samples={num_samples}"):
        _importance(num_samples=num_samples)


def test_to_casts_a_copy():
    importance = _importance(reduction="batch")

    cast = importance.to(torch.float64)

    assert cast["layer.weight"].dtype == torch.float64
    assert importance["layer.weight"].dtype == torch.float32
    assert (cast.kind, cast.num_samples, cast.reduction, cast.routes) == ("mas", 8, "batch", {"layer.weight": "layer"})


def test_summary():
    importance = Importance(
        {"a": torch.tensor([[3.0, 0.0], [4.0, 0.0]]), "b": torch.ones(1)}, kind="mas", num_samples=1
    )

    assert importance.summary() == {"a": {"norm": 5.0, "zeros": 0.5}, "b": {"norm": 1.0, "zeros": 0.0}}


def test_the_summary_of_an_empty_parameter_has_no_nan():
    importance = Importance({"a": torch.empty(0)}, kind="mas", num_samples=1)

    assert importance.summary() == {"a": {"norm": 0.0, "zeros": 0.0}}


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_saving_and_loading(tmp_path, reduction):
    model, x = make_network("tied", 4)
    importance = estimate_importance(model, [x], "mas", reduction=reduction)

    path = importance.save(tmp_path / "new" / "user-7.safetensors")
    loaded = Importance.load(path)

    assert path == str(tmp_path / "new" / "user-7.safetensors")
    assert set(loaded) == set(importance)
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in importance.items()
    )
    for what in ("kind", "num_samples", "reduction", "routes"):
        assert getattr(loaded, what) == getattr(importance, what)


def test_loading_something_else_is_refused(tmp_path):
    path = save_tensors(tmp_path / "expert.safetensors", {"w": torch.ones(1)}, kind="expert")

    with pytest.raises(ArtifactError, match=r"expert\.safetensors holds 'expert'; expected 'importance'"):
        Importance.load(path)
    with pytest.raises(ArtifactError, match=r"missing\.safetensors does not exist"):
        Importance.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("values", "metadata"),
    [
        pytest.param([-1.0], {"kind": "mas", "num_samples": 3}, id="negative"),
        pytest.param([1.0], {"kind": "mas", "num_samples": 0}, id="no samples"),
        pytest.param([1.0], {"kind": "mas"}, id="an entry is missing"),
        pytest.param([1.0], {"kind": "mas", "num_samples": 3, "colour": "blue"}, id="an entry more"),
    ],
)
def test_loading_what_is_no_importance_is_refused_by_the_files_name(tmp_path, values, metadata):
    path = save_tensors(tmp_path / "x.safetensors", {"w": torch.tensor(values)}, kind="importance", metadata=metadata)

    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        Importance.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_combining_equals_one_pass_over_all_the_data(kind):
    model, x = make_network("residual", 9)
    parts = labelled_batches(x, [2, 6, 1])
    right = estimate_importance(model, parts, kind, **KINDS[kind][1])

    combined = Importance.combine(estimate_importance(model, [part], kind, **KINDS[kind][1]) for part in parts)

    assert relative_error(combined, right) <= 1e-12
    assert (combined.kind, combined.num_samples, combined.reduction) == (kind, 9, "sample")
    assert combined.routes == right.routes


def test_combining_by_hand_leaves_the_parts_alone():
    parts = [_importance((1.0, 0.0), 1), _importance((5.0, 4.0), 3)]

    combined = Importance.combine(parts)

    assert combined["layer.weight"].tolist() == [4.0, 3.0]
    assert parts[0]["layer.weight"].tolist() == [1.0, 0.0]
    alone = Importance.combine(parts[:1])
    assert alone["layer.weight"].tolist() == [1.0, 0.0]
    assert alone["layer.weight"].data_ptr() != parts[0]["layer.weight"].data_ptr()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([_importance(kind="fisher")], "different kind .*'mas' and 'fisher'"),
        ([_importance(), _importance(reduction="batch")], "different reduction .*'sample' and 'batch'"),
        ([_importance(name="layer.bias")], "differ in layer.bias, layer.weight"),
        ([_importance(values=(1.0,))], "differ in layer.weight"),
    ],
)
def test_what_cannot_be_combined_is_refused(others, message):
    with pytest.raises(ValueError, match=message):
        Importance.combine([_importance(), *others])


def test_combining_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Importance.combine([])


def test_what_one_part_did_not_reach_has_the_path_of_another():
    parts = [
        Importance(
            {"a": torch.ones(1), "b": torch.ones(1)}, kind="mas", num_samples=1, routes={"a": a, "b": "closed form"}
        )
        for a in ("none", "layer", "loop")
    ]

    assert Importance.combine(parts).routes == {"a": "layer", "b": "closed form"}
