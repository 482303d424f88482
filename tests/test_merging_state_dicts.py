"""What a state dict has beside real tensors: versions of modules, entries of other types, complex parameters."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from pl_personalize import merge, merge_prefixes
from pl_personalize.artifacts import TensorFile, load_tensors, save_tensors


class Versioned(nn.Module):
    """A layer whose files of version 1 had the weight transposed."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].T
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Counter(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.weight, self.steps = nn.Parameter(torch.full((2,), float(steps))), {"steps": [steps]}

    def get_extra_state(self):
        return self.steps

    def set_extra_state(self, state):
        self.steps = state


def _loaded(state, factory):
    model = factory()
    model.load_state_dict(state)
    return model


def _versioned():
    return nn.Sequential(nn.Linear(3, 3), Versioned())


@pytest.mark.parametrize("weighted", [False, True])
def test_a_merge_is_of_the_modules_version(weighted):
    models = [_versioned() for _ in range(3)]
    states = [model.state_dict() for model in models]
    omegas = [{name: torch.ones_like(p) for name, p in model.named_parameters()} for model in models]

    merges = merge_prefixes(states, omegas if weighted else None)
    merges.append(merge(states, omegas if weighted else None))
    merges.append(merge(states, omegas if weighted else None, out=_versioned().state_dict()))

    for state, count in zip(merges, (1, 2, 3, 3, 3), strict=True):
        mean = sum(model[1].weight for model in models[:count]) / count
        torch.testing.assert_close(_loaded(state, _versioned)[1].weight, mean)
        assert dict(state._metadata) == dict(states[0]._metadata)


def test_a_merge_of_files_is_of_the_modules_version(tmp_path):
    models = [_versioned() for _ in range(2)]
    files = [
        TensorFile(save_tensors(tmp_path / f"{k}", model.state_dict(), kind="expert"), kind="expert")
        for k, model in enumerate(models)
    ]
    mean = (models[0][1].weight + models[1][1].weight) / 2

    merged = merge(files)
    again, _ = load_tensors(save_tensors(tmp_path / "merged", merged, kind="merged"), kind="merged")

    for state in (merged, again):
        torch.testing.assert_close(_loaded(state, _versioned)[1].weight, mean)
    assert torch.equal(_loaded(files[0], _versioned)[1].weight, models[0][1].weight)


def test_a_network_that_needs_its_version_loads_its_merge():
    models = [torchvision.models.mnasnet0_5(num_classes=3) for _ in range(2)]

    merged = merge([model.state_dict() for model in models])

    loaded = _loaded(merged, lambda: torchvision.models.mnasnet0_5(num_classes=3))
    weights = [dict(model.named_parameters())["layers.0.weight"] for model in (loaded, *models)]
    torch.testing.assert_close(weights[0], (weights[1] + weights[2]) / 2)


def test_experts_that_do_not_tell_their_version():
    state = _versioned().state_dict()
    plain = dict(state)

    assert not hasattr(merge([plain, plain]), "_metadata")
    assert dict(merge([state, plain])._metadata) == dict(state._metadata)
    assert [hasattr(prefix, "_metadata") for prefix in merge_prefixes([plain, state, plain])] == [False, True, True]


def test_the_versions_are_a_copy():
    state = _versioned().state_dict()

    merge([state])._metadata["1"]["version"] = 7

    assert state._metadata["1"] == {"version": 2}


def test_experts_of_different_versions_are_refused_with_the_module():
    new, old = _versioned().state_dict(), copy.deepcopy(_versioned().state_dict())
    old._metadata["1"]["version"] = 1

    with pytest.raises(ValueError, match=r"module '1' has version 2 in expert 1 and 1 in expert 2.*Load each expert"):
        merge([new, old])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("out", [False, True])
def test_what_is_no_tensor_comes_from_the_last_expert(weighted, out):
    experts = [Counter(k).state_dict() for k in (1, 3)]
    omegas = [{"weight": torch.ones(2)}] * 2 if weighted else None
    target = Counter(0).state_dict() if out else None

    merged = merge(experts, omegas, out=target)

    assert list(merged) == list(experts[1])
    assert merged["weight"].tolist() == [2.0, 2.0]
    assert merged["_extra_state"] == {"steps": [3]}
    merged["_extra_state"]["steps"].append(4)
    assert experts[1]["_extra_state"] == {"steps": [3]}
    assert _loaded(merged, lambda: Counter(0)).steps == {"steps": [3, 4]}


def test_each_prefix_has_what_is_no_tensor_of_its_expert():
    prefixes = merge_prefixes([Counter(k).state_dict() for k in (1, 3)])

    assert [prefix["_extra_state"] for prefix in prefixes] == [{"steps": [1]}, {"steps": [3]}]


@pytest.mark.parametrize("entry", ["_extra_state", "weight"])
def test_what_is_no_tensor_cannot_be_chosen(entry):
    experts = [Counter(k).state_dict() for k in (1, 3)]
    experts[1]["weight"] = [1.0]
    experts[1]["other"] = experts[0]["other"] = torch.ones(1)
    with pytest.raises(ValueError, match=f"'{entry}' is a (dict|list) and cannot be averaged"):
        merge(experts, parameters=[entry])


def test_what_is_a_tensor_in_one_expert_alone_is_refused():
    experts = [{"w": [1.0], "v": torch.ones(1)}, {"w": torch.ones(1), "v": torch.ones(1)}]
    with pytest.raises(ValueError, match=r"'w' is a list in expert 1 and torch.float32 \(1,\) in expert 2"):
        merge(experts)


def test_out_without_a_tensor_is_refused():
    with pytest.raises(ValueError, match=r"out\['w'\] is a list"):
        merge([{"w": torch.ones(1)}], out={"w": [1.0]})


CHECKPOINT = {"epoch": 3, "state_dict": {"w": torch.ones(2)}, "lr_schedulers": []}


@pytest.mark.parametrize(
    ("experts", "importances", "message"),
    [
        ([CHECKPOINT] * 2, None, "Expert 1 has no tensors.*as a checkpoint has; pass its entry 'state_dict'"),
        ([{"w": torch.ones(2)}, CHECKPOINT], None, "Expert 2 has no tensors"),
        ([{"model": {"w": torch.ones(2)}, "n": 3}], None, "the entries model, n; pass its entry 'model'"),
        ([{"w": [1.0, 2.0]}], None, "the entries w; pass tensors by name"),
        ([{"w": torch.ones(2)}], [CHECKPOINT], "importances of expert 1 have no tensors.*'state_dict'"),
        ([{"w": torch.ones(2)}], [{"w": 1.0}], "importances of expert 1 have no tensors.*pass tensors by name"),
        (
            [{"w": torch.ones(2), "v": torch.ones(2)}],
            [{"w": 1.0, "v": torch.ones(2)}],
            "importance of 'w' for expert 1 is a float",
        ),
    ],
)
@pytest.mark.parametrize("merger", [merge, merge_prefixes])
def test_a_checkpoint_is_recognised(merger, experts, importances, message):
    with pytest.raises(ValueError, match=message):
        merger(experts, importances)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("out", [False, True])
def test_complex_parameters_are_merged(dtype, weighted, out):
    experts = [OrderedDict(w=torch.randn(5, dtype=dtype), v=torch.randn(2)) for _ in range(3)]
    omegas = [{"w": torch.rand(5), "v": torch.rand(2)} for _ in experts] if weighted else None
    mass = torch.stack([o["w"] for o in omegas] if weighted else [torch.ones(5)] * 3)
    right = (mass * torch.stack([expert["w"] for expert in experts])).sum(0) / mass.sum(0)

    for target in (None, experts[0]) if out else (None,):
        merged = merge(experts, omegas, out=target)

        torch.testing.assert_close(merged["w"], right.to(dtype), rtol=1e-6, atol=1e-6)


def test_what_is_complex_in_one_expert_alone_is_refused():
    with pytest.raises(
        ValueError, match=r"'w' is torch.float32 \(2,\) in expert 1 and torch.complex64 \(2,\) in expert 2"
    ):
        merge([{"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.complex64)}])


def test_complex_importances_are_refused_by_expert_and_name():
    state = {"w": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(ValueError, match=r"'w' for expert 1 is torch.complex64"):
        merge([state, state], [state, state])


def _adapter(seed, **entries):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.lora_A.weight": (2, 6), "q.lora_B.weight": (5, 2), "q.bias": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | entries


def test_the_mean_of_factors_is_warned_of():
    with pytest.warns(UserWarning, match=r"'q.lora_A.weight' and 'q.lora_B.weight' are factors.*merge_and_unload"):
        merge([_adapter(0), _adapter(1)])
    with pytest.warns(UserWarning, match="factors of one weight"):
        merge_prefixes([_adapter(0), _adapter(1)], [_adapter(2, **{n: v.abs() for n, v in _adapter(2).items()})] * 2)


@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_is_warned_of(make):
    states = [make(nn.Linear(3, 2)).state_dict() for _ in range(2)]
    norm, direction = sorted(name for name in states[0] if name != "bias")
    other_direction = states[1] | {norm: states[0][norm]}
    for expert in (states[1], other_direction):
        with pytest.warns(UserWarning, match="remove_parametrizations"):
            merge([states[0], expert])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge([states[0], states[1] | {direction: states[0][direction]}])  # exact: norms of one direction


@pytest.mark.parametrize(
    ("experts", "options"),
    [
        ([_adapter(0)], {}),
        ([_adapter(0), _adapter(1)], {"parameters": ["q.bias"]}),
        ([_adapter(0), _adapter(1)], {"parameters": ["q.lora_A.weight"]}),
        ([_adapter(0), _adapter(1, **{"q.lora_A.weight": _adapter(0)["q.lora_A.weight"]})], {}),  # exact: A is shared
        ([{"a_g": torch.rand(3), "b_v": torch.rand(3), "c_v": torch.rand(3, 2)} for _ in range(2)], {}),
        ([{"a_g": torch.rand(3), "a_v": torch.rand(3)} for _ in range(2)], {}),  # of one shape: no norm of the other
    ],
    ids=["one expert", "not merged", "one factor alone", "one factor for all", "other names", "other shapes"],
)
def test_there_is_no_false_alarm(experts, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(experts, **options)
