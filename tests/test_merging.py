"""Merging state dicts: equal to plain Python, right about what is not merged, and strict about its arguments."""

import weakref

import pytest
import torch
from networks import TiedWeights, batch_norm_network, make_network
from reference import naive_merge
from torch import nn

from pl_personalize import Importance, merge, merge_prefixes
from pl_personalize.artifacts import TensorFile, save_tensors

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _experts(factory=batch_norm_network, count=3, dtype=torch.float32):
    """State dicts of networks that differ in every entry."""
    states = []
    for k in range(count):
        torch.manual_seed(k)
        state = factory().to(dtype).state_dict()
        for name, value in state.items():
            if name.endswith("num_batches_tracked"):
                value.fill_(10 * (k + 1))
        states.append(state)
    return states


def _importances(experts, zeros=True):
    """For the parameters, from 1e-6 to 1e+2; the first entry of each tensor has none in any expert."""
    generator = torch.Generator().manual_seed(0)
    importances = []
    for expert in experts:
        values = {
            name: torch.rand(value.shape, generator=generator) * 10.0 ** torch.randint(-6, 3, (), generator=generator)
            for name, value in expert.items()
            if not name.endswith(STATISTICS)
        }
        for value in values.values():
            value.view(-1)[0] = 0.0 if zeros else 1.0
        importances.append(values)
    return importances


def _assert_merged(merged, experts, importances=None, weights=None, zero="mean", rtol=1e-5, atol=1e-6):
    """Every entry against a plain Python loop; statistics and integers are the last expert's."""
    assert list(merged) == list(experts[-1])
    for name, value in merged.items():
        if name.endswith(STATISTICS):
            assert torch.equal(value, experts[-1][name]), name
            continue
        omegas = None if importances is None else [importance[name] for importance in importances]
        right = naive_merge([expert[name] for expert in experts], omegas, weights, zero)
        assert value.dtype == experts[-1][name].dtype
        torch.testing.assert_close(
            value.double(), right, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("zero", ["mean", "reference"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.25]])
@pytest.mark.parametrize("weighted", [True, False], ids=["importances", "mean"])
def test_merging_equals_plain_python(weighted, weights, zero):
    experts = _experts()
    importances = _importances(experts) if weighted else None

    merged = merge(experts, importances, weights=weights, zero=zero)

    _assert_merged(merged, experts, importances, weights, zero)


def test_importances_that_changed_in_place_are_looked_at_anew():
    importances = [Importance({"w": torch.tensor([1.0, 1.0])}, kind="mas", num_samples=1) for _ in range(2)]
    for importance, scale in zip(importances, (1e-38, 3e-38), strict=True):
        importance["w"].mul_(scale)

    merged = merge([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 4.0])}], importances)

    torch.testing.assert_close(merged["w"], torch.tensor([4.0, 3.5]))


def test_an_importance_that_became_negative_is_refused_by_its_name():
    importances = [Importance({"w": torch.tensor([1.0, 1.0])}, kind="mas", num_samples=1) for _ in range(2)]
    importances[1]["w"].neg_()

    with pytest.raises(ValueError, match="The importance of 'w' for expert 2 has a negative entry"):
        merge([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 4.0])}], importances)


def test_importances_that_became_zero_unseen_are_so():
    importances = [Importance({"w": torch.tensor([1.0, 1.0])}, kind="mas", num_samples=1) for _ in range(2)]
    for importance in importances:
        importance["w"].data[0] = 0  # no version counts this

    merged = merge([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 4.0])}], importances)

    assert merged["w"].tolist() == [3.0, 3.0]


@torch.inference_mode()
def test_importances_may_be_made_and_merged_in_inference_mode():
    importances = [Importance({"w": torch.tensor([1.0, 1.0])}, kind="mas", num_samples=1) for _ in range(2)]
    importances[1]["w"].mul_(3)

    merged = merge([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 4.0])}], importances)

    assert merged["w"].tolist() == [4.0, 3.5]


def test_by_hand():
    experts = [
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(1)},
        {"w": torch.tensor([4.0, 6.0]), "n": torch.tensor(5)},
    ]
    importances = [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}]

    assert merge(experts, importances)["w"].tolist() == [1.0, 4.0]
    assert merge(experts, importances, zero="reference")["w"].tolist() == [1.0, 0.0]
    assert merge(experts, importances, weights=[1, 3])["w"].tolist() == [2.0, 5.0]
    assert merge(experts)["w"].tolist() == [2.0, 4.0]
    assert merge(experts, weights=[3, 1])["w"].tolist() == [1.0, 3.0]
    assert merge(experts)["n"].item() == 5


def test_the_mean_leaves_out_statistics_and_integers_but_parameters_can_name_them():
    experts = _experts()

    merged = merge(experts, parameters=["1.running_mean", "0.weight"])

    assert torch.equal(merged["4.running_mean"], experts[-1]["4.running_mean"])
    assert torch.equal(merged["3.weight"], experts[-1]["3.weight"])
    for name in ("1.running_mean", "0.weight"):
        right = naive_merge([expert[name] for expert in experts])
        torch.testing.assert_close(merged[name].double(), right, rtol=1e-6, atol=1e-6)


def test_only_what_has_importances_is_merged():
    experts = _experts()
    importances = [{"0.weight": values["0.weight"]} for values in _importances(experts)]

    merged = merge(experts, importances)

    assert [name for name in merged if not torch.equal(merged[name], experts[-1][name])] == ["0.weight"]


def test_importance_objects_and_parameters_of_a_network():
    network, x = make_network("mlp", 4, torch.float32)
    experts = [network.state_dict(), {name: value + 1 for name, value in network.state_dict().items()}]
    values = [{name: torch.full_like(p, share) for name, p in network.named_parameters()} for share in (3.0, 1.0)]

    merged = merge(experts, [Importance(v, kind="mas", num_samples=n) for v, n in zip(values, (2, 99), strict=True)])

    for name, value in merged.items():
        torch.testing.assert_close(value, experts[0][name] + 0.25)
    network.load_state_dict(merged)
    assert network(x).shape == (4, 3)


@pytest.mark.parametrize("normalize", ["sum", "max", "layer"])
def test_normalized_importances_have_no_scale(normalize):
    experts = _experts()
    importances = _importances(experts)
    names = list(importances[0])
    scaled = [
        {name: value * scale * (7.0**i if normalize == "layer" else 1.0) for i, (name, value) in enumerate(o.items())}
        for o, scale in zip(importances, (1e-4, 1.0, 300.0), strict=True)
    ]

    def divisor(omega, name):
        if normalize == "layer":
            return omega[name].max()
        parts = [getattr(omega[n].double(), normalize)() for n in names]
        return sum(parts) if normalize == "sum" else max(parts)

    right = [{name: omega[name].double() / divisor(omega, name) for name in names} for omega in importances]

    _assert_merged(merge(experts, importances, normalize=normalize), experts, right)
    _assert_merged(merge(experts, scaled, normalize=normalize), experts, right)
    assert not torch.allclose(merge(experts, scaled)["0.weight"], merge(experts, importances)["0.weight"])


@pytest.mark.parametrize("normalize", ["sum", "max", "layer"])
def test_normalizing_looks_at_the_merged_parameters_alone(normalize):
    experts = [{"a": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.ones(2), "b": torch.ones(2)}]
    importances = [
        {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1e6, 0.0])},
        {"a": torch.ones(2), "b": torch.ones(2)},
    ]

    merged = merge(experts, importances, parameters=["a"], normalize=normalize)

    assert merged["a"].tolist() == [0.5, 0.5]
    assert merged["b"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("normalize", [None, "sum", "max", "layer"])
def test_an_expert_without_any_importance_has_no_say(normalize):
    experts = [{"a": torch.zeros(2), "e": torch.empty(0)}, {"a": torch.ones(2), "e": torch.empty(0)}]
    importances = [{"a": torch.zeros(2), "e": torch.empty(0)}, {"a": torch.tensor([2.0, 0.0]), "e": torch.empty(0)}]

    merged = merge(experts, importances, normalize=normalize)

    assert merged["a"].tolist() == [1.0, 0.5]
    assert merged["e"].shape == (0,)


def test_tied_entries_are_merged_once_and_stay_tied():
    experts = _experts(TiedWeights)
    importances = [{name: v for name, v in o.items() if name != "b.weight"} for o in _importances(experts)]

    for merged in (merge(experts, importances), merge_prefixes(experts, importances)[-1], merge(experts)):
        assert merged["a.weight"] is merged["b.weight"]
        assert merged["a.bias"] is not merged["b.bias"]
    merged = merge(experts, importances)
    right = naive_merge([e["a.weight"] for e in experts], [o["a.weight"] for o in importances])
    torch.testing.assert_close(merged["a.weight"].double(), right, rtol=1e-5, atol=1e-6)


def test_a_tied_entry_may_be_named_by_its_second_name():
    experts = _experts(TiedWeights)
    importances = [{"b.weight": o["b.weight"]} for o in _importances(experts)]

    merged = merge(experts, importances)

    right = naive_merge([e["b.weight"] for e in experts], [o["b.weight"] for o in importances])
    torch.testing.assert_close(merged["b.weight"].double(), right, rtol=1e-5, atol=1e-6)
    assert merged["a.weight"] is merged["b.weight"]
    assert merged["last.weight"].equal(experts[-1]["last.weight"])


def test_tied_entries_that_are_not_merged_stay_tied():
    merged = merge(_experts(TiedWeights), parameters=["last.weight"])

    assert merged["a.weight"].data_ptr() == merged["b.weight"].data_ptr()


@pytest.mark.parametrize("factory", [batch_norm_network, TiedWeights])
@pytest.mark.parametrize("normalize", [None, "sum", "layer"])
def test_lazily_opened_files_give_the_same_bits(tmp_path, factory, normalize):
    experts = _experts(factory)
    importances = [{n: v for n, v in o.items() if n != "b.weight"} for o in _importances(experts)]
    files = [
        [
            TensorFile(save_tensors(tmp_path / f"{kind}{k}", values, kind=kind), kind=kind)
            for k, values in enumerate(column)
        ]
        for kind, column in (("expert", experts), ("importance", importances))
    ]

    lazy = merge(*files, normalize=normalize)
    eager = merge(experts, importances, normalize=normalize)

    assert lazy.keys() == eager.keys()
    assert all(torch.equal(lazy[name], value) for name, value in eager.items())
    if factory is TiedWeights:
        assert lazy["a.weight"] is lazy["b.weight"]


@pytest.mark.parametrize("weights", [None, [2.0, 0.5, 1.0]])
@pytest.mark.parametrize("zero", ["mean", "reference"])
@pytest.mark.parametrize("normalize", [None, "max"])
@pytest.mark.parametrize("weighted", [True, False], ids=["importances", "mean"])
def test_prefixes_equal_merges_of_the_first_experts(weighted, normalize, zero, weights):
    experts = _experts()
    importances = _importances(experts) if weighted else None

    prefixes = merge_prefixes(experts, importances, weights=weights, zero=zero, normalize=normalize)

    assert len(prefixes) == 3
    assert all(torch.equal(prefixes[0][name], value) for name, value in experts[0].items())
    for t in (2, 3):
        right = merge(
            experts[:t],
            importances and importances[:t],
            weights=weights and weights[:t],
            zero=zero,
            normalize=normalize,
        )
        assert list(prefixes[t - 1]) == list(right)
        assert all(torch.equal(prefixes[t - 1][name], value) for name, value in right.items())


@pytest.mark.parametrize("weighted", [True, False], ids=["importances", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_experts_of_another_type(dtype, weighted):
    experts = _experts(dtype=dtype)
    importances = _importances(experts) if weighted else None
    eps = max(torch.finfo(dtype).eps, 1e-7)

    _assert_merged(merge(experts, importances), experts, importances, rtol=eps, atol=eps)


@pytest.mark.parametrize("merger", [merge, lambda *args: merge_prefixes(*args)[0]])
def test_a_single_expert_is_returned_bit_by_bit_and_new(merger):
    expert = _experts(count=1)[0]

    for merged in (merger([expert]), merger([expert], _importances([expert]))):
        assert all(torch.equal(merged[name], value) for name, value in expert.items())
        assert not {v.data_ptr() for v in merged.values()} & {v.data_ptr() for v in expert.values()}


def test_nothing_of_the_experts_is_changed_or_handed_out():
    experts, untouched = _experts(), _experts()
    importances, omegas = _importances(experts), _importances(experts)

    for merged in (merge(experts, importances, normalize="sum"), *merge_prefixes(experts, importances)):
        for value in merged.values():
            value.fill_(7)

    assert all(torch.equal(a[n], b[n]) for a, b in zip(experts, untouched, strict=True) for n in a)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(importances, omegas, strict=True) for n in a)


def test_parameters_of_a_module_may_be_given_as_they_are():
    """`dict(model.named_parameters())` needs gradients; the result does not."""
    experts = [dict(nn.Linear(3, 2).named_parameters()) for _ in range(2)]

    merged = merge(experts, [{n: torch.ones_like(p) for n, p in e.items()} for e in experts])

    assert not any(value.requires_grad for value in merged.values())
    torch.testing.assert_close(merged["weight"], (experts[0]["weight"] + experts[1]["weight"]).detach() / 2)


class _File(dict):
    """Like an opened file: each read makes a new tensor, and how many of them are alive at once is counted."""

    alive = peak = 0

    def __getitem__(self, name):
        tensor = super().__getitem__(name).clone()
        _File.alive += 1
        _File.peak = max(_File.peak, _File.alive)
        weakref.finalize(tensor, self._release)
        return tensor

    @staticmethod
    def _release():
        _File.alive -= 1


@pytest.mark.parametrize("normalize", [None, "sum", "max", "layer"])
def test_the_tensors_of_many_experts_are_never_in_memory_together(monkeypatch, normalize):
    """Streaming: with 20 experts of 20 parameters, few of the 800 tensors are alive at any time."""
    monkeypatch.setattr(_File, "peak", 0)
    experts = [_File({f"w{i}": torch.full((2,), float(k)) for i in range(20)}) for k in range(20)]
    importances = [_File({f"w{i}": torch.ones(2) for i in range(20)}) for _ in range(20)]

    merged = merge(experts, importances, normalize=normalize)

    assert all(value.tolist() == pytest.approx([9.5, 9.5]) for value in merged.values())
    assert _File.alive == 0
    assert _File.peak <= 40


E_ = [{"w": torch.zeros(2), "v": torch.zeros(2, 2), "n": torch.tensor(1)} for _ in range(2)]
I_ = [{"w": torch.ones(2), "v": torch.ones(2, 2)} for _ in range(2)]


def _with(rows, k, **entries):
    changed = {**rows[k], **entries}
    return [*rows[:k], {name: value for name, value in changed.items() if value is not None}, *rows[k + 1 :]]


@pytest.mark.parametrize(
    ("experts", "importances", "options", "message"),
    [
        pytest.param([], None, {}, "no experts", id="no experts"),
        pytest.param(E_, I_[:1], {}, "2 experts but 1 importances", id="too few importances"),
        pytest.param(E_, [*I_, I_[0]], {}, "2 experts but 3 importances", id="too many importances"),
        pytest.param(E_, I_[0], {}, "single mapping", id="one mapping"),
        pytest.param(E_, [I_[0], None], {}, "Expert 2 of 2 has no importances.*importances=None", id="None"),
        pytest.param(E_, [{}, I_[0]], {}, "Expert 1 of 2 has no importances", id="empty"),
        pytest.param(E_, _with(I_, 1, w=None), {}, "Expert 2 has no importance for 'w'", id="second lacks one"),
        pytest.param(E_, _with(I_, 0, w=None), {}, "Expert 1 has no importance for 'w'", id="first lacks one"),
        pytest.param(
            E_, _with(I_, 1, w=torch.ones(3)), {}, r"'w' for expert 2 .*\(3,\).*\(2,\)", id="importance's shape"
        ),
        pytest.param(E_, _with(I_, 0, v=torch.ones(2)), {}, r"'v' for expert 1 .*\(2,\).*\(2, 2\)", id="broadcastable"),
        pytest.param(E_, _with(I_, 1, w=torch.tensor([1, -1e-9])), {}, "'w' for expert 2.*negative", id="negative"),
        pytest.param(E_, _with(I_, 0, w=torch.tensor([1, torch.nan])), {}, "'w' for expert 1.*NaN", id="NaN"),
        pytest.param(
            E_, _with(I_, 0, w=torch.tensor([1, torch.inf])), {}, "'w' for expert 1 .*infinite", id="infinite"
        ),
        pytest.param(E_, [{**i, "x": i["w"]} for i in I_], {}, "no entries x; they have w", id="importance of nothing"),
        pytest.param(
            E_, [{**i, "n": torch.tensor(1.0)} for i in I_], {}, "'n' is torch.int64", id="integer importance"
        ),
        pytest.param(E_, None, {"parameters": ["n"]}, "'n' is torch.int64", id="integer parameter"),
        pytest.param(E_, None, {"parameters": ["w", "x"]}, "no entries x; they have w", id="unknown parameter"),
        pytest.param(E_, None, {"parameters": "w"}, "sequence of names; got the string 'w'", id="string"),
        pytest.param(E_, None, {"parameters": []}, "nothing to merge", id="no parameters"),
        pytest.param(
            E_, _with(I_, 0, v=None), {"parameters": ["v"]}, "Expert 1 has no importance for 'v'", id="chosen"
        ),
        pytest.param(
            _with(E_, 0, w=torch.ones(3)),
            None,
            {},
            r"'w' is torch.float32 \(3,\) in expert 1 and torch.float32 \(2,\)",
            id="shapes",
        ),
        pytest.param(
            _with(E_, 0, v=torch.ones(2)), None, {}, r"'v' is torch.float32 \(2,\) in expert 1", id="would broadcast"
        ),
        pytest.param(_with(E_, 0, w=None), None, {}, "different entries: w", id="missing entry"),
        pytest.param(_with(E_, 1, x=torch.ones(1)), None, {}, "different entries: x", id="additional entry"),
        pytest.param(
            E_, [{f"body.{n}": v for n, v in i.items()} for i in I_], {}, "Without the prefix 'body.'", id="prefix"
        ),
        pytest.param(
            [E_[0], {f"module.{n}": v for n, v in E_[1].items()}], None, {}, "With the prefix 'module.'", id="wrapped"
        ),
        pytest.param(E_, None, {"weights": [1.0]}, "2 experts but 1 weights", id="too few weights"),
        pytest.param(E_, None, {"weights": [1.0, 0.0]}, r"positive and finite; got \[1.0, 0.0\]", id="zero weight"),
        pytest.param(E_, None, {"weights": [-1.0, 1.0]}, "positive and finite", id="negative weight"),
        pytest.param(E_, None, {"weights": [1.0, float("nan")]}, "positive and finite", id="NaN weight"),
        pytest.param(E_, None, {"weights": [1.0, float("inf")]}, "positive and finite", id="infinite weight"),
        pytest.param(E_, I_, {"zero": "zero"}, "zero must be one of mean, reference; got 'zero'", id="zero"),
        pytest.param(E_, I_, {"normalize": "mean"}, "sum, layer, max; got 'mean'", id="normalize"),
    ],
)
@pytest.mark.parametrize("merger", [merge, merge_prefixes])
def test_bad_arguments_are_refused(merger, experts, importances, options, message):
    with pytest.raises(ValueError, match=message):
        merger(experts, importances, **options)


@pytest.mark.parametrize("normalize", [None, "sum", "max", "layer"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_bad_importance_is_refused_with_every_normalization_and_for_one_expert(normalize, value):
    for count in (1, 2):
        bad = _with(I_[:count], 0, w=torch.tensor([1.0, value]))
        with pytest.raises(ValueError, match=r"'w' for expert 1 "):
            merge(E_[:count], bad, normalize=normalize)


@pytest.mark.parametrize("unimportant", ["nothing", "some entries", "everything"])
@pytest.mark.parametrize("scale", [1e-37, 1.0, 1e37])
def test_parameters_of_many_chunks_equal_plain_python(monkeypatch, scale, unimportant):
    """Longer than what is merged at a time, with importances out of float32's range in one of the chunks."""
    monkeypatch.setattr("pl_personalize.functional.merging._CHUNK_CPU", 1500)
    torch.manual_seed(0)
    size = 1500 * torch.get_num_threads() * 3 + 77
    experts = [{"w": torch.randn(size)} for _ in range(3)]
    importances = [{"w": torch.rand(size) + 0.1} for _ in range(3)]
    for importance in importances:
        importance["w"][:1000] *= scale
        if unimportant != "nothing":
            importance["w"][2000 : 3000 if unimportant == "some entries" else None] = 0
    mass = torch.stack([importance["w"].double() for importance in importances])
    theta = torch.stack([expert["w"].double() for expert in experts])
    right = torch.where(mass.sum(0) == 0, theta.mean(0), (mass * theta).sum(0) / mass.sum(0))

    merged = merge(experts, importances)["w"]

    torch.testing.assert_close(merged.double(), right, rtol=1e-5, atol=1e-6)


def test_experts_of_different_precision_are_merged_in_the_higher():
    experts = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([1.0 + 2e-10], dtype=torch.float64)}]

    assert merge(experts)["w"].item() == pytest.approx(1.0 + 1e-10, abs=1e-15)
